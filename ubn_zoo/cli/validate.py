"""Evaluate the accuracy of one or many models on held-out images.

Examples:
    ubn-zoo validate --model regnetx_002_ubn.cifar10 --data-dir data/cifar10
    ubn-zoo validate --model 'regnetx_*_ubn' models.txt runs/photos --data-dir photos --results results.csv --resume
    ubn-zoo validate --model resnet18_ubn --checkpoint model.safetensors --data-dir photos
    ubn-zoo validate --model resnet50_ubn --data-dir imagenet --test-set imagenet-real --details details
    ubn-zoo validate --compare details/a.predictions.csv details/b.predictions.csv
    torchrun --nproc-per-node 8 -m ubn_zoo validate --run runs/rsb_a2 --ema --data-dir imagenet

A model is a timm or hf-hub: name, a wildcard for pretrained names, a file of names (.txt), the folder of a run, or a
checkpoint with its config.json. The data is an image folder with validation/CLASS/IMAGE (or val/, test/, or tar files
instead), or CLASS/IMAGE, unless --dataset names another kind. Images are preprocessed according to the model's
configuration, at its test size if it has one; the settings are printed on standard error. If the images cover only some
of the model's classes, predictions are restricted to those. Every image counts once, for any number of processes.

Known test sets, whose classes are checked: imagenet, imagenet-real, imagenetv2-matched-frequency, imagenet-a,
imagenet-a-clean, imagenet-r, imagenet-r-clean, sketch.

Exit codes: 0 all models were evaluated; 1 none was evaluated; 3 some failed, and their rows contain the error.
"""

from __future__ import annotations

import argparse

PARTLY = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    models = parser.add_argument_group("models")
    models.add_argument("--model", nargs="+", default=[], metavar="MODEL", help="models; architecture of --checkpoint")
    models.add_argument("--run", nargs="+", default=[], metavar="RUN", help="folders of runs, finished or not")
    models.add_argument("--ema", action="store_true", help="use the moving average of the runs' weights")
    models.add_argument("--checkpoint", metavar="FILE", help="weights to use instead of the pretrained ones")
    models.add_argument("--num-classes", type=int, metavar="N", help="outputs of the checkpoint's classifier")
    data = parser.add_argument_group("images")
    data.add_argument("--data-dir", metavar="DIR", help="folder of the data (required, except with --compare)")
    data.add_argument("--dataset", default="folder", help="folder (default), memory, wds, hfds/NAME or hfids/NAME")
    data.add_argument(
        "--split", dest="test_split", help="split of the data (default: the first of validation, val, test)"
    )
    data.add_argument("--samples", dest="test_samples", type=int, metavar="N", help="use at most N images")
    data.add_argument("--input-key", help="column or file extension of the image")
    data.add_argument("--target-key", help="column of the class")
    data.add_argument("--test-set", metavar="NAME", help="name of the test set (default: the folder name)")
    data.add_argument("--real-labels", metavar="FILE", help="real.json of imagenet-real (default: timm's copy)")
    data.add_argument("--valid-labels", metavar="FILE", help="classes to use, one name or index per line")
    data.add_argument("--class-map", metavar="FILE", help="folder name of each output, one per line")
    data.add_argument(
        "--allow-class-mismatch",
        action="store_true",
        help="if class names differ or the model has none, map the data's classes to outputs in order",
    )
    data.add_argument("--all-outputs", action="store_true", help="predict over all outputs of the model")
    input_ = parser.add_argument_group("preprocessing (default: the model's)")
    input_.add_argument("--img-size", type=int, metavar="PIXELS", help="image side")
    input_.add_argument("--crop-pct", type=float, help="side of the crop relative to the resized image")
    input_.add_argument("--crop-mode", help="center, squash or border")
    input_.add_argument("--interpolation", help="resize filter, such as bicubic")
    input_.add_argument("--mean", type=float, nargs=3, metavar="X", help="mean per channel, of values from 0 to 1")
    input_.add_argument("--std", type=float, nargs=3, metavar="X", help="standard deviation per channel")
    input_.add_argument("--test-pool", action="store_true", help="test-time pooling for larger images, as in timm")
    machine = parser.add_argument_group("computation")
    machine.add_argument(
        "--batch-size", type=int, default=256, help="images per batch and process, halved if memory runs out (256)"
    )
    machine.add_argument("--workers", type=int, default=4, help="loader processes per process (default: 4)")
    machine.add_argument("--device", default="auto", help="auto (default), or a torch device name")
    machine.add_argument("--amp", choices=("bfloat16", "float16"), help="autocast to this dtype (default: off)")
    machine.add_argument("--fuse", action="store_true", help="fold norms into convolutions first")
    machine.add_argument("--compile", action="store_true", help="compile the model first")
    machine.add_argument("--threads", type=int, metavar="N", help="torch's CPU threads (default: torch's choice)")
    output = parser.add_argument_group("output")
    output.add_argument("--results", metavar="FILE", help="results file to add rows to: .csv or .json")
    output.add_argument("--resume", action="store_true", help="skip models that the results file already has")
    output.add_argument("--sort", metavar="COLUMN", help="sort the results file, for example by top1")
    output.add_argument("--details", metavar="DIR", help="folder for predictions, classes and confusion matrix")
    output.add_argument("--compare", nargs=2, metavar="FILE", help="only compare two files of predictions")


def run(options: argparse.Namespace) -> int:
    """Evaluate, and print one line per model on the first rank."""
    import shlex
    import sys
    from pathlib import Path

    import torch

    from ubn_zoo.cli._messages import in_options
    from ubn_zoo.errors import EvaluationError
    from ubn_zoo.evaluation.evaluate import evaluate_many
    from ubn_zoo.evaluation.subjects import Subject, expand_names, load_subject
    from ubn_zoo.utils.distributed import joined
    from ubn_zoo.utils.progress import Progress

    if options.compare:
        return _compare(*options.compare)
    if options.data_dir is None:
        options._error("the following arguments are required: --data-dir")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    names = "dataset test_split test_samples input_key target_key test_set real_labels valid_labels class_map"
    names += " allow_class_mismatch all_outputs img_size crop_pct crop_mode interpolation mean std test_pool fuse"
    names += " compile batch_size workers"
    models: list[str | Subject] = [*expand_names(options.model), *options.run]
    rows = []
    with joined(options.device) as ranks:
        if options.checkpoint is not None or options.num_classes is not None:
            if len(models) > 1:
                options._error("--checkpoint and --num-classes: valid with one --model at most")
            name = models[0] if models else None
            models = [load_subject(name, checkpoint=options.checkpoint, num_classes=options.num_classes)]
        if not models:
            raise EvaluationError("received no model; valid: one or more of --model, --run, --checkpoint")
        if options.ema and not any(isinstance(model, str) and Path(model).is_dir() for model in models):
            raise EvaluationError("`ema`: valid with a run; for a checkpoint, name the run's model_ema.safetensors")
        progress: Progress | None = None

        def say(text: str) -> None:
            if progress is not None:
                progress.close()
            if ranks.first:
                print(text, file=sys.stderr)

        def start(name: str) -> None:
            nonlocal progress
            progress = Progress(name) if ranks.first else None

        def show(done: int, total: int) -> None:
            if progress is not None:
                progress(done, total)

        for row in evaluate_many(
            models,
            options.data_dir,
            ema=options.ema,
            ranks=ranks,
            results=options.results,
            resume=options.resume,
            sort=options.sort,
            details=options.details,
            command=shlex.join(["ubn-zoo", *sys.argv[1:]]),
            amp=getattr(torch, options.amp) if options.amp else None,
            on_start=start,
            on_note=say,
            on_batch=show,
            **{key: getattr(options, key) for key in names.split()},
        ):
            rows.append(row)
            if progress is not None:
                progress.close()
            if not ranks.first:
                continue
            if row.error is not None:
                prefix = "" if len(models) == 1 or row.error.startswith(row.source) else f"{row.source}: "
                print(f"ubn-zoo: {prefix}{in_options(row.error, options)}", file=sys.stderr)
                continue
            name = row.model if len(models) == 1 or row.model == row.source else f"{row.source} ({row.model})"
            five = "" if row.top5 is None else f"top-5 {row.top5:.2f} %, "
            print(
                f"{name}: top-1 {row.top1:.2f} %, {five}loss {row.loss:.4f}, "
                f"calibration error {row.calibration_error:.2f} %, {row.images} images",
                flush=True,
            )
    failed = sum(row.error is not None for row in rows)
    return 1 if failed == len(rows) else PARTLY if failed else 0


def _compare(first: str, second: str) -> int:
    from ubn_zoo.evaluation.details import compare, read_predictions

    found = compare(read_predictions(first), read_predictions(second))
    low, high = found.interval
    for name, top1 in zip((first, second), found.top1, strict=True):
        print(f"{name}: top-1 {top1:.2f} %, {found.images} images")
    print(f"correct: both {found.both}, only the first {found.only_first}, only the second {found.only_second}")
    print(f"difference {found.difference:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}")
    print(f"McNemar's exact test: p = {found.p_value:.3g}")
    return 0
