#!/usr/bin/env python3
"""Time UBN models and layers next to BatchNorm's: python -m research.benchmark --models resnet50 --csv FILE."""

import argparse
import datetime
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

import ubn_zoo
from research import benchmark

REPOSITORY = Path(__file__).parents[2]
SETTINGS = [kind for kind in benchmark.KINDS if kind != "bn"]
QUICK_SHAPES = [(64, 56), (512, 28), (2048, 7)]
QUICK_AXES = {"batch": (2, 4, 8), "pixels": (7, 14, 28), "channels": (32, 64, 128)}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    what = parser.add_argument_group("what to measure (default: models)").add_mutually_exclusive_group()
    what.add_argument("--layer", action="store_true", help="layers of ResNet-50's shapes")
    what.add_argument("--growth", action="store_true", help="a layer over batch, pixels, channels and (CPU) ranks")
    what.add_argument("--profile", action="store_true", help="where the time of a training step goes")
    what.add_argument("--quick", action="store_true", help="a little of everything, in under two minutes")
    what.add_argument(
        "--report", action="store_true", help="measure nothing; write docs/speed.md from results/benchmark_*.csv"
    )
    parser.add_argument("--models", nargs="+", default=["resnet50"], help="BatchNorm models")
    parser.add_argument(
        "--settings", nargs="*", choices=SETTINGS, help="norms beside BatchNorm: ubn in models, all of them in layers"
    )
    parser.add_argument(
        "--modes", nargs="+", choices=(*benchmark.MODES, *benchmark.LAYER_MODES), help="train and eval, or layer"
    )
    parser.add_argument("--batch-size", type=int, nargs="+", default=[8], help="one or several")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=10, help="counted steps of each model or layer")
    parser.add_argument("--amp", choices=("bfloat16", "float16"), help="models under autocast")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="layers' features"
    )
    parser.add_argument("--compile", action="store_true", help="beside each entry, the same compiled by torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--contiguous", action="store_true", help="contiguous memory instead of channels_last")
    parser.add_argument(
        "--csv", type=Path, help="CSV file to write; --quick adds files with the suffixes _growth and _profile"
    )
    parser.add_argument("--plot", type=Path, help="PNG file to draw; --quick adds a file with the suffix _growth")
    args = parser.parse_args()
    args.modes = args.modes or (["layer"] if args.layer else ["train", "eval"])
    if args.quick:
        args.batch_size, args.img_size, args.steps, args.modes = [4], 128, 3, list(benchmark.MODES)
    return args


def time_models_and_layers(args: argparse.Namespace) -> list[benchmark.Timing]:
    """Measure, print and return step times."""
    layers = args.layer or args.quick
    common = {
        "steps": args.steps,
        "device": args.device,
        "channels_last": not args.contiguous,
        "compiled": args.compile,
    }
    settings = ["ubn"] if args.settings is None else args.settings
    kinds = ["bn", *(SETTINGS if args.settings is None else args.settings)]
    runs = []
    for batch_size in args.batch_size:
        if not args.layer:
            about = {"modes": args.modes, "batch_size": batch_size, "img_size": args.img_size, "amp": args.amp}
            runs += [benchmark.compare(model, settings, **about, **common) for model in args.models]
        if layers:
            shapes = QUICK_SHAPES if args.quick else benchmark.LAYER_SHAPES
            modes = benchmark.LAYER_MODES if args.quick else args.modes
            about = {"modes": modes, "batch_size": batch_size, "dtype": getattr(torch, args.dtype)}
            runs.append(benchmark.compare_layers(shapes, kinds=kinds, **about, **common))
    print(
        f"{'model':40s} {'mode':10s} {'batch':>5s} {'median ms':>10s} {'quartiles':>17s} {'ratio':>6s} {'floor':>8s} "
        f"{'MB':>8s}"
    )
    timings = []
    for run in runs:
        for timing in run:
            floor = "" if timing.floor is None else f"{timing.floor:.2f}"
            print(
                f"{timing.model:40s} {timing.mode:10s} {timing.batch_size:5d} {timing.median:10.2f} "
                f"{timing.lower:8.2f} {timing.upper:8.2f} {timing.ratio:6.2f} {floor:>8s} {timing.memory:8.1f}",
                flush=True,
            )
            timings.append(timing)
    return timings


def time_growth(args: argparse.Namespace) -> list[benchmark.GrowthPoint]:
    """Measure how times grow, print the fits and return the points."""
    layout = {"steps": args.steps, "channels_last": not args.contiguous}
    axes = QUICK_AXES if args.quick else benchmark.AXES
    points = list(benchmark.grow(axes, device=args.device, dtype=getattr(torch, args.dtype), **layout))
    if args.device == "cpu":
        points += benchmark.grow_ranks((1, 2) if args.quick else benchmark.RANKS, **layout)
    print(f"{'varied':10s} {'layer':18s} {'fixed ms':>9s} {'slope':>9s} {'':14s} {'R2':>6s} {'exponent':>8s}")
    for fit in benchmark.fit(points):
        unit = "ms per rank" if fit.axis == "ranks" else "ns per element"
        print(
            f"{fit.axis:10s} {fit.layer:18s} {fit.fixed:9.3f} {fit.slope:9.3f} {unit:14s} "
            f"{fit.r_squared:6.3f} {fit.exponent:8.2f}"
        )
    return points


def profile(args: argparse.Namespace) -> list[benchmark.Share]:
    """Measure, print and return a profile."""
    shares = [
        share
        for model in args.models
        for share in benchmark.profile_step(
            model,
            batch_size=args.batch_size[0],
            img_size=args.img_size,
            steps=min(args.steps, 3),
            device=args.device,
            channels_last=not args.contiguous,
            amp=args.amp,
        )
    ]
    for share in shares:
        print(f"{share.model:24s} {benchmark.GROUPS[share.group]:40s} {share.time:9.2f} ms {100 * share.share:5.1f} %")
    return shares


def main() -> None:
    """Run the requested measurements, print them, and write tables and plots."""
    args = parse()
    if args.report:
        print(*benchmark.report(REPOSITORY / "results", REPOSITORY / "docs"), sep="\n")
        return
    # torch's profiler, which also counts memory, otherwise logs to stderr on every start and stop.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    about = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "-m", "research.benchmark", *sys.argv[1:]]),
        "environment": f"{benchmark.environment(torch.device(args.device))}, ubn-zoo {ubn_zoo.__version__}",
    }
    if (args.layer or args.growth) and benchmark.keep_memory():
        about["environment"] += ", freed memory kept"
    print(about["environment"])
    tables: dict[str, list[dict[str, object]]] = {}
    pictures: dict[str, tuple[Any, Any]] = {}
    if args.quick or not (args.growth or args.profile):
        timings = time_models_and_layers(args)
        tables[""], pictures[""] = benchmark.table(timings, **about), (benchmark.draw_ratios, timings)
    if args.quick or args.growth:
        points = time_growth(args)
        suffix = "_growth" if args.quick else ""
        tables[suffix], pictures[suffix] = benchmark.rows_of(points, **about), (benchmark.draw_growth, points)
    if args.quick or args.profile:
        tables["_profile" if args.quick else ""] = benchmark.rows_of(profile(args), **about)
    if args.csv:
        for suffix, rows in tables.items():
            benchmark.write_table(rows, args.csv.with_stem(args.csv.stem + suffix))
    if args.plot:
        for suffix, (draw, measured) in pictures.items():
            draw(measured, args.plot.with_stem(args.plot.stem + suffix), about["environment"])


if __name__ == "__main__":
    main()
