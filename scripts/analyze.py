#!/usr/bin/env python3
"""Measure feature condensation: how alike the features of different images are at every norm layer.

    python scripts/analyze.py --model NAME --data-dir DIR     any model of timm, on DIR's held-out images
    python scripts/analyze.py --runs RUN [RUN ...]            training runs side by side, from their similarity.csv

Writes similarity.png, and for a model similarity.csv, into the folder --output; prints a table.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import timm
import torch
from timm.data import create_dataset, create_transform, resolve_model_data_config
from timm.utils import ParseKwargs
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import ubn_zoo  # noqa: F401 - registers the models with timm
from ubn_zoo.data.splits import find_eval_split
from ubn_zoo.evaluation.condensation import compare_layers, format_table, measure_similarity, summarize_similarity
from ubn_zoo.evaluation.metrics import LayerSimilarity, read_similarity, write_similarity
from ubn_zoo.evaluation.plots import draw_similarity_comparison
from ubn_zoo.layers import convert_state_dict
from ubn_zoo.models import read_checkpoint


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="timm's name, with a tag or not; also local-dir:FOLDER and hf-hub:NAME")
    source.add_argument("--runs", type=Path, nargs="+", metavar="RUN", help="folders of training runs")
    parser.add_argument("--checkpoint", type=Path, help="weights of the model; by default its pretrained ones")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE")
    parser.add_argument("--data-dir", type=Path, help="image folder with test/, val/ or validation/")
    parser.add_argument("--images", type=int, default=256, help="how many, drawn at random but always the same")
    parser.add_argument("--batch-size", type=int, default=64, help="images compared with each other")
    parser.add_argument("--img-size", type=int, help="pixels per side; by default what the model is made for")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("runs/analysis"))
    options = parser.parse_args(arguments)
    if options.model and not options.data_dir:
        parser.error("--model needs --data-dir, an image folder with test/, val/ or validation/")
    return options


def load_model(options: argparse.Namespace) -> nn.Module:
    """Build the model; a checkpoint says how many classes it has."""
    model = timm.create_model(options.model, pretrained=options.checkpoint is None, **options.model_kwargs)
    if options.checkpoint is not None:
        state = convert_state_dict(read_checkpoint(options.checkpoint), model)
        head = state.get(f"{model.pretrained_cfg.get('classifier')}.weight")
        if head is not None and len(head) != model.num_classes:
            model.reset_classifier(len(head))
        model.load_state_dict(state)
    return model.to(options.device)


def load_images(options: argparse.Namespace, model: nn.Module) -> Iterator[Tensor]:
    """Batches of held-out images, as timm prepares them for the model."""
    size = {} if options.img_size is None else {"input_size": (3, options.img_size, options.img_size)}
    transform = create_transform(**resolve_model_data_config(model, args=size))
    folder = options.data_dir / find_eval_split(options.data_dir)
    data = create_dataset("", root=str(folder), search_split=False, transform=transform)
    # A folder is sorted by class: its first images, or a batch in its order, would be more alike than images are.
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[: options.images].tolist()
    for images, _ in DataLoader(Subset(data, chosen), batch_size=options.batch_size):
        yield images


def read_runs(folders: Sequence[Path]) -> dict[str, Sequence[LayerSimilarity]]:
    """The similarity of runs by the part of their paths in which they differ."""
    paths = [folder.resolve() for folder in folders]
    common = Path(os.path.commonpath(paths)) if len(set(paths)) > 1 else paths[0].parent
    return {str(path.relative_to(common)): read_similarity(path / "similarity.csv") for path in paths}


def analyze(options: argparse.Namespace) -> None:
    """Measure or read, draw, print."""
    options.output.mkdir(parents=True, exist_ok=True)
    sources: Mapping[str, Sequence[LayerSimilarity]]
    if options.model:
        model = load_model(options)
        sources = {options.model: measure_similarity(model, load_images(options, model))}
        write_similarity(options.output / "similarity.csv", sources[options.model])
    else:
        sources = read_runs(options.runs)
    print(format_table(compare_layers(sources)))
    print(f"\n{format_table([dataclasses.asdict(summary) for summary in summarize_similarity(sources)])}")
    draw_similarity_comparison(sources, options.output / "similarity.png", title="Feature condensation")
    print(f"\nwritten: {options.output}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, analyze, report errors in a line."""
    options = parse_arguments(arguments)
    try:
        analyze(options)
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        print(f"analyze: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
