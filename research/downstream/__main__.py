"""Train detectors and segmentation networks with UBN and BatchNorm on composites of photographs.

    python -m research.downstream data --data-dir DIR --output PICTURES
    python -m research.downstream train MODEL --data PICTURES --steps 150

DIR holds photographs of single objects on plain ground in DIR/train and DIR/test; subfolders do not matter.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from research.downstream import data, train
from research.downstream.models import MODELS, NORMS
from ubn_zoo.errors import UbnZooError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("data", help="make pictures with boxes and masks")
    making.add_argument("--data-dir", type=Path, required=True, help="folder of photographs, with train and test")
    making.add_argument("--output", type=Path, required=True, help="folder to write to")
    making.add_argument("--train", type=int, default=300, help="number of training pictures (default: 300)")
    making.add_argument("--test", type=int, default=60, help="number of test pictures (default: 60)")
    training = commands.add_parser("train", help="train and evaluate a model with each norm, print the figures")
    training.add_argument("model", choices=MODELS)
    training.add_argument("--norm", choices=NORMS, nargs="+", default=NORMS, help="default: both")
    training.add_argument("--data", type=Path, required=True, help="folder that `data` wrote")
    training.add_argument("--output", type=Path, help="folder for the figures, MODEL_NORM_STEPS.json")
    training.add_argument("--encoder", default="resnet10t", help="model of timm with BatchNorm (default: resnet10t)")
    training.add_argument("--steps", type=int, default=150, help="default: 150")
    training.add_argument("--batch-size", type=int, default=4, help="default: 4")
    training.add_argument("--lr", type=float, default=1e-3, help="default: 0.001")
    training.add_argument("--threshold", type=float, default=0.15, help="of UBN (default: 0.15)")
    for command in (making, training):
        command.add_argument("--seed", type=int, default=0, help="default: 0")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    options = vars(_parser().parse_args(arguments))
    try:
        if options.pop("command") == "data":
            data.make(**options)
        else:
            torch.set_num_threads(1)
            name, norms, folder = (options.pop(key) for key in ("model", "norm", "data"))
            for norm in norms:
                print(json.dumps(train.run(name, norm, folder, **options), indent=2), flush=True)
    except UbnZooError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
