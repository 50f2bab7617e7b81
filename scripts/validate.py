"""Measure the accuracy of pretrained weights on an image folder of square images, as timm loads and feeds them.

    python scripts/validate.py --model regnetx_002_ubn.cifar10 --data-dir DIR

DIR has `test/CLASS/*` (or `val`, `validation`), its class folders in the order of the model's classes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ubn_zoo.data import find_test_split, load_image_folder
from ubn_zoo.evaluate import evaluate_pretrained
from ubn_zoo.progress import Progress


def main(arguments: Sequence[str] | None = None) -> int:
    """Load, predict, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="timm's name with its tag")
    parser.add_argument("--data-dir", type=Path, required=True, help="image folder")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    folder = options.data_dir / find_test_split(options.data_dir)
    progress = Progress(f"decode {folder}")
    data = load_image_folder(folder, report=progress)
    progress.close()
    found = evaluate_pretrained(options.model, data)
    print(f"{options.model}: top-1 {found.top1:.2f} %, loss {found.loss:.4f}, {found.images} images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
