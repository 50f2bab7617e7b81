"""See UBN on real images, from ImageNet predictions to fine-tuning.

Classifies two photographs with a BatchNorm model and its UBN twin, which have the same ImageNet weights and make the
same predictions. Then fine-tunes a bundled model, saves it, reloads it in a new process, and draws its predictions.

Examples:
    ubn-zoo quickstart
    ubn-zoo quickstart --output quickstart --set epochs=2

Needs `pip install "ubn-zoo[quickstart]"`, but no network. A second run reports the existing results.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--output", type=Path, default=Path("quickstart_output"), metavar="DIR", help="folder of the results"
    )
    parser.add_argument("--force", action="store_true", help="repeat the quickstart even if its results exist")
    # With such small batches a second thread is only a fifth faster, and one thread gives the same numbers everywhere.
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="torch's CPU threads (default: 1)")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", action="extend", help="change the recipe digits_finetune"
    )
    parser.add_argument("--check", action="store_true", help="only reload the saved model and compare predictions")


def run(options: argparse.Namespace) -> int:
    """Run the quickstart, or only its check."""
    import torch

    from ubn_zoo.training import quickstart

    torch.set_num_threads(options.threads)
    if options.check:
        count = quickstart.check_saved_model(options.output)
        print(f"reloaded: identical predictions for all {count} held-out images")
    else:
        quickstart.run_quickstart(options.output, settings=options.set, force=options.force, report=_print)
    return 0


def _print(text: str) -> None:
    print(text, flush=True)
