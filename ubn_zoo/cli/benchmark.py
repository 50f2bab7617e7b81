"""Compare the speed of a UBN model and its BatchNorm sibling on this machine.

Takes about a minute. Needs no data and no weights.

Examples:
    ubn-zoo benchmark resnet50_ubn
    ubn-zoo benchmark mobilenetv3_large_100 --batch-size 8 --img-size 160 --seconds 30 --output speed.csv
    ubn-zoo benchmark regnety_032_ubn --device cuda --amp bfloat16 --batch-size 256

The two models alternate, in training (forward, loss and backward, without the optimizer), in inference, and in
inference after `ubn_zoo.fuse`. TIME RATIO is the UBN model's time divided by the BatchNorm model's time in the same
turn: the median, with quartiles in parentheses. Peak memory is shown if the device reports it. Other programs running
at the same time distort the results.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ubn_zoo.cli._text import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", help="either model of the pair, such as resnet50_ubn or resnet50")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images per step (default: 8 on a CPU, else 64)")
    parser.add_argument("--img-size", type=int, metavar="PIXELS", help="image side (default: the model's)")
    parser.add_argument("--device", default="auto", help="auto (default), or a torch device name")
    parser.add_argument("--amp", choices=("bfloat16", "float16"), help="autocast to this dtype (default: off)")
    parser.add_argument(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="channels-last memory format (default: on)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="torch's CPU threads (default: torch's choice)")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="S", help="total time in seconds (default: 60)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="CSV file for the full table")


def run(options: argparse.Namespace) -> int:
    """Measure, and print the table."""
    import torch

    from ubn_zoo.evaluation.speed import compare_speed, write_speed
    from ubn_zoo.utils.distributed import joined

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
    with joined(options.device) as ranks:
        rows = compare_speed(
            options.model,
            batch_size=options.batch_size,
            img_size=options.img_size,
            device=ranks.device,
            amp=getattr(torch, options.amp) if options.amp else None,
            channels_last=options.channels_last,
            seconds=options.seconds,
        )
    first = rows[0]
    device = f"cpu, {first.threads} threads" if first.device == "cpu" else first.device
    layout = "channels last" if first.channels_last else "contiguous"
    precision = f"AMP {first.amp}" if first.amp else "float32"
    print(f"{device}; batch {first.batch_size}, {first.img_size} pixels, {precision}, {layout}; torch {first.torch}\n")
    header = ("MODE", "MODEL", "IMAGES/S", "MS/STEP", "TIME RATIO", "PEAK MIB")
    table = [
        (
            row.mode,
            row.model,
            f"{row.images_per_second:.1f}",
            f"{row.milliseconds:.2f}",
            "1" if row.model == first.model else f"{row.ratio:.2f} ({row.ratio_lower:.2f} to {row.ratio_upper:.2f})",
            "-" if row.peak_memory is None else f"{row.peak_memory:.0f}",
        )
        for row in rows
    ]
    print_table([header, *table], right=(2, 3, 5))
    if options.output is not None:
        write_speed(options.output, rows)
        print(f"\nwritten: {options.output}")
    return 0
