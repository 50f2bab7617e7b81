"""Measure feature condensation at every norm layer.

Features are condensed if different images have similar feature vectors.

Examples:
    ubn-zoo analyze --model regnetx_002_ubn.cifar10 --data-dir data/cifar10
    ubn-zoo analyze --runs runs/bn runs/ubn --output runs/analysis
    ubn-zoo analyze --redraw runs/bn runs/ubn

With --model, measures any timm model on held-out images and writes similarity.csv; with --runs, compares measurements
recorded during training. Both print a table and write similarity.png. --redraw redraws the plots in the folders of
runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from timm.utils import ParseKwargs

if TYPE_CHECKING:
    from ubn_zoo.evaluation.metrics import LayerSimilarity


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="timm name, with or without a tag; also local-dir:FOLDER and hf-hub:NAME")
    source.add_argument("--runs", type=Path, nargs="+", metavar="RUN", help="folders of training runs to compare")
    source.add_argument("--redraw", type=Path, nargs="+", metavar="RUN", help="folders of runs whose plots to redraw")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights (default: the pretrained ones)")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="image folder with validation/, val/ or test/")
    parser.add_argument("--images", type=int, default=256, metavar="N", help="number of images (default: 256)")
    parser.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="images compared with each other (default: 64)"
    )
    parser.add_argument("--img-size", type=int, metavar="PIXELS", help="image side (default: the model's)")
    parser.add_argument("--device", default="cpu", help="torch device name (default: cpu)")
    parser.add_argument("--output", type=Path, default=Path("runs/analysis"), metavar="DIR", help="results folder")


def run(options: argparse.Namespace) -> int:
    """Measure or read similarity, draw it and print a table."""
    import dataclasses

    from ubn_zoo.evaluation import analysis, plots
    from ubn_zoo.evaluation.condensation import compare_layers, format_table, measure_similarity, summarize_similarity
    from ubn_zoo.evaluation.metrics import write_similarity

    if options.model and not options.data_dir:
        options._error("--model needs --data-dir, an image folder with validation/, val/ or test/")
    for folder in options.redraw or ():
        for picture in plots.draw_run(folder):
            print(f"written: {picture}")
    if options.redraw:
        return 0
    options.output.mkdir(parents=True, exist_ok=True)
    if options.model:
        model = analysis.load_model(options.model, checkpoint=options.checkpoint, settings=options.model_kwargs)
        model.to(options.device)
        images = analysis.held_out_images(
            model, options.data_dir, images=options.images, batch_size=options.batch_size, img_size=options.img_size
        )
        rows = measure_similarity(model, images)
        write_similarity(options.output / "similarity.csv", rows)
        sources: dict[str, Sequence[LayerSimilarity]] = {options.model: rows}
    else:
        sources = analysis.read_runs(options.runs)
    print(format_table(compare_layers(sources)))
    print(f"\n{format_table([dataclasses.asdict(summary) for summary in summarize_similarity(sources)])}")
    plots.draw_similarity_comparison(sources, options.output / "similarity.png", title="Feature condensation")
    print(f"\nwritten: {options.output}")
    return 0
