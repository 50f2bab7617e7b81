"""Predict the classes of images.

Takes image files and folders (searched recursively). Works with any timm or zoo model, a run, or a checkpoint.

Examples:
    ubn-zoo predict regnetx_002_ubn.cifar10 photos --output predictions.csv --picture sheet.png
    ubn-zoo predict runs/photos a.jpg b.png --top-k 3
    ubn-zoo predict resnet18_ubn --checkpoint model.safetensors photos --features embeddings.safetensors

Prints one line per image, or writes a table with --output. Class names come from the run or the model, or from ImageNet
for a model with 1000 unnamed classes; otherwise classes are numbered. Images are preprocessed according to the model's
configuration and rotated by their EXIF orientation. Only the first frame of an animation is used. Unreadable images are
skipped and reported on standard error.

Exit codes: 0 every image was read; 1 nothing was predicted; 3 some images were skipped.
"""

from __future__ import annotations

import argparse

SKIPPED = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="MODEL_OR_RUN", help="timm name and tag, hf-hub: name, run or checkpoint")
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER", help="images, and folders of images")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights for the architecture MODEL_OR_RUN")
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="classes per image (default: 5)")
    parser.add_argument("--output", metavar="FILE", help="table to write: .csv, .json or .parquet")
    parser.add_argument("--picture", metavar="FILE", help="contact sheet to write, with the first 100 images: .png")
    parser.add_argument("--features", metavar="FILE", help="embeddings to write: .safetensors")
    parser.add_argument("--batch-size", type=int, default=64, help="images per batch (default: 64)")
    parser.add_argument("--device", default="auto", help="auto (default), or a torch device name")


def run(options: argparse.Namespace) -> int:
    """Predict, and print or write the predictions."""
    import sys

    from ubn_zoo.evaluation.predict import class_names, predict_stream
    from ubn_zoo.evaluation.prediction_files import SHEET_IMAGES, open_prediction_files
    from ubn_zoo.evaluation.subjects import load_subject
    from ubn_zoo.utils.progress import Progress

    lines = options.output is None
    subject = load_subject(options.model, checkpoint=options.checkpoint)
    # On a terminal, the printed lines already show the progress.
    progress = None if lines and sys.stdout.isatty() else Progress(subject.name)
    count = skipped = 0

    def skip(path: str, reason: str) -> None:
        nonlocal skipped
        skipped += 1
        if progress is not None:
            progress.close()
        print(f"ubn-zoo: skipped {_printable(reason)}", file=sys.stderr)

    print(f"class names: {class_names(subject).source}", file=sys.stderr)
    with open_prediction_files(output=options.output, picture=options.picture, features=options.features) as write:
        for found in predict_stream(
            subject,
            options.images,
            top_k=options.top_k,
            features=options.features is not None,
            thumbnails=0 if options.picture is None else SHEET_IMAGES,
            batch_size=options.batch_size,
            device=options.device,
            on_batch=progress,
            on_skip=skip,
        ):
            write(found)
            count += 1
            if lines:
                classes = ", ".join(f"{one.name} {100 * one.probability:.1f} %" for one in found.top)
                print(f"{_printable(found.file)}: {classes}")
    if progress is not None:
        progress.close()
    if not lines:
        print(f"{subject.name}: {count} images, {skipped} skipped; {options.output}")
    return SKIPPED if skipped else 0


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
