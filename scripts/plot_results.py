#!/usr/bin/env python3
"""Draws a training table: python scripts/plot_results.py results/cifar10_small.csv docs/cifar10_small.png."""

import argparse
from pathlib import Path

from ubn_zoo.plots import draw_training
from ubn_zoo.train import read_metrics


def main() -> None:
    """Parses, draws, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path, help="metrics.csv of scripts/train_cifar10.py")
    parser.add_argument("picture", type=Path, help="PNG file to write")
    args = parser.parse_args()
    draw_training(read_metrics(args.table), args.picture)
    print(f"written: {args.picture}")


if __name__ == "__main__":
    main()
