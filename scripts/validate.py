#!/usr/bin/env python3
"""Measure the accuracy of a zoo model, any model of timm, a checkpoint or a run on held-out images.

    python scripts/validate.py --model regnetx_002_ubn.cifar10 --data-dir DIR [--csv FILE]
    python scripts/validate.py --model resnet18_ubn --checkpoint FILE.safetensors --data-dir DIR
    torchrun --nproc-per-node 8 scripts/validate.py --run RUN [--ema] --data-dir DIR

DIR has test/CLASS/IMAGE (or val/, validation/, or tar files in their place), unless --dataset names another kind.
Images are fed as the model's configuration says, at its test size where it has one, and each is counted once whatever
the number of processes. Exit codes: 0 done; 1 failed, with one message.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from ubn_zoo.data.readers import DataError
from ubn_zoo.evaluation.accuracy import (
    EvaluationError,
    append_result,
    feed_of,
    load_subject,
    measure,
    open_images,
    result_row,
)
from ubn_zoo.utils.distributed import Ranks, RanksError, joined
from ubn_zoo.utils.progress import Progress
from ubn_zoo.utils.provenance import device_name, source_commit


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="timm's name, with its tag; of the architecture with --checkpoint")
    parser.add_argument("--checkpoint", help="weights in the place of the pretrained ones")
    parser.add_argument("--num-classes", type=int, help="outputs of the checkpoint's classifier")
    parser.add_argument("--run", help="folder of a finished run, in the place of a model")
    parser.add_argument("--ema", action="store_true", help="the moving average of the run's weights")
    parser.add_argument("--data-dir", required=True, help="folder of the data")
    parser.add_argument("--dataset", default="folder", help="folder, memory, wds, hfds/NAME or hfids/NAME")
    parser.add_argument("--split", dest="test_split", help="default: the first of validation, val, test")
    parser.add_argument("--samples", dest="test_samples", type=int, help="at most that many images")
    parser.add_argument("--input-key", help="column or file ending of the image")
    parser.add_argument("--target-key", help="column of the class")
    parser.add_argument("--img-size", type=int, help="side in pixels; the model's test size")
    parser.add_argument("--crop-pct", type=float, help="share of the center crop; the model's")
    parser.add_argument("--batch-size", type=int, default=256, help="images at a time, in each process")
    parser.add_argument("--workers", type=int, default=4, help="processes that load images, for each process")
    parser.add_argument("--device", default="auto", help="auto, or torch's name of it")
    parser.add_argument("--amp", choices=("bfloat16", "float16"), help="autocast; the model's own precision")
    parser.add_argument("--threads", type=int, help="torch's threads on the CPU")
    parser.add_argument("--csv", help="results file that gets a row")
    return parser.parse_args(arguments)


def validate(options: argparse.Namespace, ranks: Ranks) -> None:
    """Load, measure, tell."""
    subject = load_subject(
        options.model,
        checkpoint=options.checkpoint,
        run=options.run,
        ema=options.ema,
        num_classes=options.num_classes,
    )
    keys = ("img_size", "crop_pct", "dataset", "test_split", "test_samples", "input_key", "target_key", "workers")
    feed = feed_of(subject, **{key: getattr(options, key) for key in keys})
    images = open_images(subject, feed, options.data_dir, ranks, batch_size=options.batch_size)
    model = subject.model.to(ranks.device).to(memory_format=torch.channels_last)
    progress, total = Progress(subject.name), images.images
    amp = getattr(torch, options.amp) if options.amp else None

    def show(done: int) -> None:
        if ranks.first and total is not None:
            progress(min(done * ranks.count, total), total)

    found = measure(model, images, ranks, amp=amp, on_batch=show)
    progress.close()
    if not ranks.first:
        return
    more = {"data": images.fingerprint, "amp": options.amp, "commit": source_commit()}
    more |= {"device": device_name(ranks.device), "torch": torch.__version__}
    if options.csv:
        append_result(options.csv, result_row(subject, feed, found, **more))
    five = "" if found.top5 is None else f"top-5 {found.top5:.2f} %, "
    print(
        f"{subject.name}: top-1 {found.top1:.2f} %, {five}loss {found.loss:.4f}, "
        f"calibration error {found.calibration_error:.2f} %, {found.images} images"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Join the other processes, if any, and validate."""
    options = parse(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        with joined(options.device) as ranks:
            validate(options, ranks)
    except (DataError, EvaluationError, RanksError) as error:
        print(f"validate: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
