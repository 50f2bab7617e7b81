#!/usr/bin/env python3
"""Times UBN models beside their BatchNorm siblings: python scripts/benchmark.py --models resnet50 --csv FILE."""

import argparse
import csv
import dataclasses
from pathlib import Path

import torch

import ubn_zoo
from ubn_zoo import benchmark


def main() -> None:
    """Parses, times, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=["resnet50"], help="BatchNorm siblings, each against its _ubn twin"
    )
    parser.add_argument("--modes", nargs="+", default=["train", "eval"], choices=["train", "eval"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=10, help="counted steps of each model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--contiguous", action="store_true", help="contiguous memory instead of channels_last")
    parser.add_argument("--csv", type=Path, help="also write the table here")
    args = parser.parse_args()

    where = benchmark.environment(torch.device(args.device))
    print(f"ubn-zoo {ubn_zoo.__version__}; {where}")
    print(f"{'model':32s} {'mode':6s} {'median ms':>10s} {'min':>9s} {'max':>9s} {'ratio':>6s}")
    rows = []
    for name in args.models:
        for timing in benchmark.compare(
            [name, f"{name}_ubn"],
            modes=args.modes,
            batch_size=args.batch_size,
            img_size=args.img_size,
            steps=args.steps,
            device=args.device,
            channels_last=not args.contiguous,
        ):
            print(
                f"{timing.model:32s} {timing.mode:6s} {timing.median:10.1f} "
                f"{timing.minimum:9.1f} {timing.maximum:9.1f} {timing.ratio:6.2f}",
                flush=True,
            )
            rows.append({**dataclasses.asdict(timing), "channels_last": not args.contiguous, "environment": where})
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
