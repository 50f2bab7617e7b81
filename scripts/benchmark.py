#!/usr/bin/env python3
"""Times UBN models and layers beside BatchNorm's: python scripts/benchmark.py --models resnet50 --csv FILE."""

import argparse
from pathlib import Path

import torch

import ubn_zoo
from ubn_zoo import benchmark

QUICK_SHAPES = [(64, 56), (512, 28), (2048, 7)]


def main() -> None:
    """Parses, times, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=["resnet50"], help="BatchNorm siblings, each against its _ubn twin"
    )
    parser.add_argument("--modes", nargs="+", default=["train", "eval"], choices=benchmark.MODES)
    parser.add_argument("--layer", action="store_true", help="layers of ResNet-50's shapes instead of models")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=10, help="counted steps of each model or layer")
    parser.add_argument("--quick", action="store_true", help="models in all modes and layers, small and few steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--contiguous", action="store_true", help="contiguous memory instead of channels_last")
    parser.add_argument("--csv", type=Path, help="also write the table here, in the layout of timm's benchmark tables")
    parser.add_argument("--plot", type=Path, help="also draw the ratios here (PNG)")
    args = parser.parse_args()
    if args.quick:
        args.batch_size, args.img_size, args.steps, args.modes = 4, 128, 3, list(benchmark.MODES)

    where = benchmark.environment(torch.device(args.device))
    print(f"ubn-zoo {ubn_zoo.__version__}; {where}")
    print(f"{'model':32s} {'mode':6s} {'median ms':>10s} {'min':>9s} {'max':>9s} {'ratio':>6s}")
    common = {
        "batch_size": args.batch_size,
        "steps": args.steps,
        "device": args.device,
        "channels_last": not args.contiguous,
    }
    runs = []
    if not args.layer:
        sizes = {"modes": args.modes, "img_size": args.img_size}
        runs += [benchmark.compare([name, f"{name}_ubn"], **sizes, **common) for name in args.models]
    if args.layer or args.quick:
        runs.append(benchmark.compare_layers(QUICK_SHAPES if args.quick else benchmark.LAYER_SHAPES, **common))
    timings = []
    for run in runs:
        for timing in run:
            print(
                f"{timing.model:32s} {timing.mode:6s} {timing.median:10.1f} "
                f"{timing.minimum:9.1f} {timing.maximum:9.1f} {timing.ratio:6.2f}",
                flush=True,
            )
            timings.append(timing)
    if args.csv:
        rows = benchmark.table(timings, channels_last=not args.contiguous, environment=where)
        benchmark.write_table(rows, args.csv)
    if args.plot:
        benchmark.draw_ratios(timings, args.plot, where)


if __name__ == "__main__":
    main()
