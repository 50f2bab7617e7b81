#!/usr/bin/env python3
"""Draw runs into their folders: python scripts/plot_results.py RUN_FOLDER [RUN_FOLDER ...]."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ubn_zoo.evaluation.plots import draw_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_FOLDER", help="what a training run left behind")
    try:
        for folder in parser.parse_args(arguments).runs:
            for picture in draw_run(folder):
                print(f"written: {picture}")
    except (OSError, ValueError, ImportError) as error:
        print(f"plot_results: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
