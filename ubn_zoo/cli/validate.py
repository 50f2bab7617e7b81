"""Measure accuracy on held-out images.

Of a pretrained model, an architecture with a checkpoint, or a run.

Examples:
    ubn-zoo validate --model regnetx_002_ubn.cifar10 --data-dir data/cifar10
    ubn-zoo validate --model resnet18_ubn --checkpoint model.safetensors --data-dir photos --csv results.csv
    torchrun --nproc-per-node 8 -m ubn_zoo validate --run runs/rsb_a2 --ema --data-dir imagenet

The data is an image folder with validation/CLASS/IMAGE (or val/, test/, or tar files in their place), unless --dataset
names another kind. Images are prepared as the model's configuration says, at its test size if it has one. Every image
counts once, whatever the number of processes.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--model", help="timm's name and tag; the architecture with --checkpoint")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights to use instead of the pretrained ones")
    parser.add_argument("--num-classes", type=int, metavar="N", help="outputs of the checkpoint's classifier")
    parser.add_argument("--run", metavar="RUN", help="folder of a run, finished or not, instead of a model")
    parser.add_argument("--ema", action="store_true", help="use the moving average of the run's weights")
    parser.add_argument("--data-dir", required=True, metavar="DIR", help="folder of the data")
    parser.add_argument("--dataset", default="folder", help="folder (default), memory, wds, hfds/NAME or hfids/NAME")
    parser.add_argument(
        "--split", dest="test_split", help="split of the data (default: the first of validation, val, test)"
    )
    parser.add_argument("--samples", dest="test_samples", type=int, metavar="N", help="use at most N images")
    parser.add_argument("--input-key", help="column or file extension of the image")
    parser.add_argument("--target-key", help="column of the class")
    parser.add_argument(
        "--allow-class-mismatch",
        action="store_true",
        help="where class names differ or the model has none, take the data's, in order, as the model's outputs",
    )
    parser.add_argument("--img-size", type=int, metavar="PIXELS", help="image side (default: the model's test size)")
    parser.add_argument("--crop-pct", type=float, help="center crop over image side (default: the model's)")
    parser.add_argument("--batch-size", type=int, default=256, help="images per batch and process (default: 256)")
    parser.add_argument("--workers", type=int, default=4, help="loader processes per process (default: 4)")
    parser.add_argument("--device", default="auto", help="auto (default), or torch's name of the device")
    parser.add_argument("--amp", choices=("bfloat16", "float16"), help="autocast to this dtype (default: off)")
    parser.add_argument("--threads", type=int, metavar="N", help="torch's CPU threads (default: torch's choice)")
    parser.add_argument("--csv", metavar="FILE", help="results file to append a row to")


def run(options: argparse.Namespace) -> int:
    """Measure, and print one line on the first rank."""
    import torch

    from ubn_zoo.evaluation.evaluate import evaluate
    from ubn_zoo.evaluation.subjects import load_subject
    from ubn_zoo.utils.distributed import joined
    from ubn_zoo.utils.progress import Progress

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    data = "dataset test_split test_samples input_key target_key img_size crop_pct batch_size workers csv"
    with joined(options.device) as ranks:
        subject = load_subject(
            options.model,
            checkpoint=options.checkpoint,
            run=options.run,
            ema=options.ema,
            num_classes=options.num_classes,
        )
        progress = Progress(subject.name) if ranks.first else None
        found = evaluate(
            subject,
            options.data_dir,
            ranks=ranks,
            amp=getattr(torch, options.amp) if options.amp else None,
            allow_class_mismatch=options.allow_class_mismatch,
            on_batch=progress,
            **{key: getattr(options, key) for key in data.split()},
        )
        if progress is not None:
            progress.close()
            five = "" if found.top5 is None else f"top-5 {found.top5:.2f} %, "
            print(
                f"{subject.name}: top-1 {found.top1:.2f} %, {five}loss {found.loss:.4f}, "
                f"calibration error {found.calibration_error:.2f} %, {found.images} images"
            )
    return 0
