"""The model card: metadata for the Hub and its leaderboards, and a page for readers.

Every fact comes from the manifest record, the run's own files, or the caller of `publish`. Missing facts are marked as
not recorded, never guessed. All text is escaped and cannot become markup.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from ubn_zoo.hub.manifest import Metric, Record
from ubn_zoo.recipes.schema import Recipe
from ubn_zoo.release.run_record import Base, RunFacts
from ubn_zoo.release.source import Source
from ubn_zoo.utils.sanitize import code, escape

__all__ = ["card_text", "class_names", "dataset_id", "shown_pictures", "validate_command"]

_TOP1 = "Top-1 accuracy (%)"
_NOT_RECORDED = "not recorded"
_SHOWN_CLASSES = 100
_PICTURE = re.compile(r"!\[[^\]]*\]\(([A-Za-z0-9_][A-Za-z0-9._-]*\.png)\)")
_HUB_DATASETS = {"cifar-10": "cifar10", "cifar-100": "cifar100", "imagenet-1k": "imagenet-1k"}

_CITATION = """\
@misc{unified_batch_normalization,
  title = {Unified Batch Normalization: Identifying and Alleviating the Feature Condensation
           in Batch Normalization and a Unified Framework},
  eprint = {2311.15993},
  archivePrefix = {arXiv},
  year = {2023}
}"""


def card_text(record: Record, source: Source, measured: str | None = None) -> str:
    """Write the model card of a checkpoint.

    Args:
        record: Its manifest record.
        source: Everything known about it.
        measured: A sentence about a second measurement; None if it was measured once.

    Returns:
        The content of ``README.md``.
    """
    sections = [
        f"---\n{_metadata(record, source).to_yaml()}\n---",
        f"# {record.id}",
        escape(record.description),
        _list(_facts(record, source)),
        "## Use",
        "With `pip install ubn-zoo`:",
        "```python\nimport ubn_zoo\nimport timm\n\n"
        f'model = timm.create_model("hf-hub:{record.repo_id}", pretrained=True).eval()\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n```",
        "## Results",
        _results(record),
        *_measurement(record, source, measured),
        *_training(record, source),
        "## Intended use and limits",
        _limits(record, source),
        "## Citation",
        f"```bibtex\n{_CITATION}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def shown_pictures(card: str) -> set[str]:
    """Return the file names of the pictures on a model card.

    Args:
        card: Content of a ``README.md``.
    """
    return set(_PICTURE.findall(card))


def dataset_id(name: str) -> str:
    """Return a dataset's id for the Hub's metadata.

    Args:
        name: The dataset's name, for example ``CIFAR-10``.
    """
    plain = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-.")
    return _HUB_DATASETS.get(plain, plain or "unknown")


def _metadata(record: Record, source: Source) -> ModelCardData:
    facts = source.facts
    more = {
        "images": None if facts is None else facts.images,
        "weights": _weights(source),
    }
    results = [
        EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type=dataset_id(metric.dataset),
            dataset_name=metric.dataset,
            dataset_split=metric.split,
            metric_type="accuracy" if metric.name == "top1" else metric.name,
            metric_name=_TOP1 if metric.name == "top1" else metric.name,
            metric_value=metric.value,
            metric_args={
                "command": metric.measured.command,
                "seeds": list(metric.measured.seeds),
                "commit": metric.measured.commit,
                **{name: value for name, value in more.items() if value is not None},
            },
        )
        for metric in record.metrics
    ]
    repository = None if source.base is None else source.base.repository
    return ModelCardData(
        library_name="timm",
        license=record.license.lower(),
        pipeline_tag="image-classification",
        tags=["timm", "image-classification", "ubn", "pytorch"],
        datasets=sorted({dataset_id(metric.dataset) for metric in record.metrics}),
        metrics=["accuracy"],
        base_model=repository,
        base_model_relation="finetune" if repository and source.rows else None,
        model_name=record.id,
        eval_results=results,
    )


def _facts(record: Record, source: Source) -> dict[str, str]:
    classes = class_names(source)
    more = [f"and {len(classes) - _SHOWN_CLASSES} more"] if len(classes) > _SHOWN_CLASSES else []
    names = f" ({', '.join([*map(escape, classes[:_SHOWN_CLASSES]), *more])})" if _named(classes) else ""
    recipe = source.parsed_recipe
    facts = {
        "Architecture": f"{code(record.architecture)}, Unified Batch Normalization "
        "([arXiv 2311.15993](https://arxiv.org/abs/2311.15993))",
        "Parameters": f"{record.params:,}",
        "Classes": f"{record.num_classes}{names}",
        "Input": f"{'x'.join(map(str, record.input.size))}, {record.input.interpolation}, "
        f"crop {record.input.crop_pct:g}",
        "Base model": _base(source.base, trained=bool(source.rows)),
        "Training data": escape(record.origin.data),
        "License of the weights": escape(record.license),
    }
    weights = _weights(source)
    if weights is not None:
        facts["Weights"] = weights
    if recipe is not None and recipe.data_license is not None:
        facts["License of the data"] = escape(recipe.data_license)
    return facts | {"SHA-256 of the weights": code(record.sha256)}


def _weights(source: Source) -> str | None:
    """Which of a run's weights were measured and are published; None if the source is not a run."""
    recipe = source.parsed_recipe
    if not source.rows or recipe is None:
        return None
    if source.averaged:
        return f"moving average of the trained weights, decay {recipe.ema_decay:g}"
    return "as trained, after the last epoch"


def _base(base: Base | None, *, trained: bool) -> str:
    if base is None:
        return "none, trained from scratch" if trained else _NOT_RECORDED
    where = f"{code(base.repository)}" if base.repository else code(base.name)
    name = f", {code(base.name)}" if base.repository and base.repository != base.name else ""
    if base.repository:
        where += f" at revision {code(base.revision)}" if base.revision else f" (revision {_NOT_RECORDED})"
    return where + name + (f", SHA-256 {code(base.sha256)}" if base.sha256 else "")


def class_names(source: Source) -> tuple[str, ...]:
    """Return the class names from the run's record or config.json; empty if there are none."""
    if source.facts is not None and source.facts.classes:
        return source.facts.classes
    return tuple(map(str, source.labels.get("label_names") or ()))


def _named(classes: tuple[str, ...]) -> bool:
    return bool(classes) and classes != tuple(map(str, range(len(classes))))


def _results(record: Record) -> str:
    rows = [
        f"| {metric.name} | {metric.value:g} | {escape(metric.dataset)}, {escape(metric.split)} | {_measured(metric)} |"
        for metric in record.metrics
    ]
    return "\n".join(["| Metric | Value | Data | Command |", "|---|---|---|---|", *rows])


def _measured(metric: Metric) -> str:
    seeds = ", ".join(map(str, metric.measured.seeds)) or "none"
    command = code(metric.measured.command, cell=True)
    return f"{command}, seeds {seeds}, commit {metric.measured.commit or _NOT_RECORDED}"


def _measurement(record: Record, source: Source, measured: str | None) -> list[str]:
    """What the figures were measured on, and how to measure them again."""
    if not source.rows:
        return [measured] if measured else []
    last, images = source.rows[-1], None if source.facts is None else source.facts.images
    loss = last.ema_test_loss if source.averaged else last.test_loss
    calibration = last.ema_calibration_error if source.averaged else last.calibration_error
    counted = f"{images:,}" if images else f"an unknown number of ({_NOT_RECORDED})"
    sentences = [f"Measured on {counted} held-out images with the weights published here: {_weights(source)}."]
    if images and record.metrics:
        share = record.metrics[0].value / 100
        error = 196 * math.sqrt(max(share * (1 - share), 0.25 / images) / images)
        sentences.append(f"95 % confidence interval of the accuracy with this many images: about ±{error:.1f} points.")
    if loss is not None and calibration is not None:
        sentences.append(f"Test loss {loss:.4f} nats, expected calibration error {calibration:.2f} %.")
    check = code(validate_command(str(record.repo_id), source.parsed_recipe, source.split))
    return [
        " ".join(sentences),
        *([measured] if measured else []),
        f"To evaluate it on your copy of the data: {check}",
    ]


def validate_command(repo_id: str, recipe: Recipe | None, split: str | None) -> str:
    """Write the command that measures a published checkpoint.

    Args:
        repo_id: Hub repository of the checkpoint.
        recipe: The recipe of its run, which says how to read the data; None for an image folder.
        split: The split; None for the first held-out one.
    """
    words = ["ubn-zoo", "validate", "--model", f"hf-hub:{repo_id}", "--data-dir", "DIR"]
    if recipe is not None:
        given = {
            "--dataset": None if recipe.dataset == "folder" else recipe.dataset,
            "--split": recipe.test_split or split,
            "--samples": recipe.test_samples,
            "--input-key": recipe.input_key,
            "--target-key": recipe.target_key,
            "--amp": recipe.amp,
        }
        for option, value in given.items():
            words += [option, str(value)] if value is not None else []
    elif split is not None:
        words += ["--split", split]
    return shlex.join(words)


def _training(record: Record, source: Source) -> list[str]:
    """How the weights were trained, and the command that repeats the run."""
    pictures = [f"![{Path(name).stem}]({name})" for name in source.pictures]
    recipe, facts = source.parsed_recipe, source.facts
    sections = ["## Training"]
    if not source.rows or recipe is None or source.command is None:
        sections.append(f"Origin: {escape(record.origin.trained)}")
        if source.recipe is not None:
            sections.append("The recipe of the run is in `recipe.yaml`.")
        return [*sections, *pictures]
    seconds = sum(row.seconds for row in source.rows)
    commit = source.rows[-1].commit
    details = {
        "Seed": f"{recipe.seed} (one run)",
        "Epochs": str(recipe.epochs) + _extensions(facts),
        "Batch size": str(recipe.batch_size),
        "Optimizer": f"{escape(recipe.optimizer)}, peak learning rate {recipe.lr:g}",
        "Hardware": escape(facts.hardware) if facts else _NOT_RECORDED,
        "Time": (f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds")
        + " of training"
        + (f", started {facts.starts} times" if facts and facts.starts > 1 else ""),
        "Software": escape(facts.software) if facts else _NOT_RECORDED,
        "Commit of ubn-zoo": code(commit) if commit else f"{_NOT_RECORDED} (an installed package)",
    }
    return [
        *sections,
        "Command to repeat the run; `DIR` is the folder of the data, `RUN` the output folder:",
        f"```\n{source.command}\n```",
        "`recipe.yaml` in this repository holds all settings of the run; `--recipe recipe.yaml` repeats it as well.",
        _list(details),
        *pictures,
    ]


def _extensions(facts: RunFacts | None) -> str:
    if facts is None or not facts.extended:
        return ""
    return (
        f"; the run was finished after {' and '.join(map(str, facts.extended))} and then extended, with the learning "
        "rates of each number of epochs, which the command does not repeat"
    )


def _limits(record: Record, source: Source) -> str:
    seeds = {seed for metric in record.metrics for seed in metric.measured.seeds}
    runs = f"one run (seed {next(iter(seeds))})" if len(seeds) == 1 else f"{len(seeds)} seeds" if seeds else "one model"
    uses = [
        f"For classifying images like those of {escape(record.origin.data)} into the {record.num_classes} classes "
        "above, and as a starting point for fine-tuning on similar images.",
        f"The figures are those of {runs} on held-out images of the same data. They do not show how well the "
        "model performs on images from other sources, or on different groups of people.",
        "The model assigns every image to one of its classes, even if it shows none of them. Evaluate it on your own "
        "images before you rely on it.",
    ]
    return "\n".join(f"- {use}" for use in uses)


def _list(facts: Mapping[str, str]) -> str:
    return "\n".join(f"- {label}: {value}" for label, value in facts.items())
