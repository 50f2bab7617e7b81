"""Add a trained run's weights to the package, with a record of their accuracy and how it was measured.

`python -m ubn_zoo.release.bundle --help` is for maintainers of this package; everybody else publishes on the Hub with
`ubn-zoo publish`.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import timm
import torch

from ubn_zoo.data.loaders import open_eval
from ubn_zoo.errors import BundleError
from ubn_zoo.evaluation.accuracy import measure
from ubn_zoo.evaluation.metrics import EpochMetrics, read_metrics
from ubn_zoo.hub.manifest import BUNDLED_WEIGHTS, Record, add_record, load_manifest, record_from_dict
from ubn_zoo.models.registry import SUFFIX
from ubn_zoo.recipes.schema import load_recipe, recipe_path, recipe_sha256
from ubn_zoo.release.run_record import train_command
from ubn_zoo.training.checkpoint import tensor_bytes
from ubn_zoo.training.run import is_finished
from ubn_zoo.utils.distributed import Ranks
from ubn_zoo.utils.files import write_file

__all__ = ["bundle", "main", "refresh"]

MAX_BYTES = 12 * 10**6
MAX_BYTES_IN_ALL = 30 * 10**6


def _last_row(run: Path) -> EpochMetrics:
    if not is_finished(run):
        raise BundleError(f"{run} is not the folder of a finished run: model.safetensors or some epochs are missing")
    row = read_metrics(run / "metrics.csv")[-1]
    if row.commit is None or row.commit.endswith("+"):
        raise BundleError(f"{run}: its commit is {row.commit}; valid: one that contains all the code that was run")
    return row


def bundle(
    run: str | Path,
    *,
    tag: str,
    recipe_name: str,
    data_dir: str | Path,
    dataset: str,
    origin: str,
    twin: str | Path | None = None,
    half: bool = False,
    description: str,
    manifest: str | Path | None = None,
    weights: str | Path | None = None,
) -> Record:
    """Bundle a finished run's weights.

    Args:
        run: Folder of the run.
        tag: Tag of the weights, as in ``architecture.tag``.
        recipe_name: The packaged recipe that the run is based on.
        data_dir: Folder of the run's data; the stored file is evaluated on its held-out images.
        dataset: Name of the dataset.
        origin: A sentence on the training data.
        twin: Folder of the same run with BatchNorm, whose accuracy is recorded for comparison.
        half: Whether to store parameters in float16, at half the size. Loading widens them to float32, and the recorded
            accuracy is that of the widened parameters.
        description: A one-sentence description.
        manifest: The manifest file; by default the one in this package.
        weights: Folder of the bundled files; by default the package's.

    Returns:
        The manifest record.

    Raises:
        BundleError: The run is not finished, its code was not committed, or the file is too large.
        ManifestError: The record is not valid.
    """
    folder = Path(run)
    row = _last_row(folder)
    recipe = load_recipe(folder / "recipe.yaml")
    if recipe.norm != "ubn" or recipe.img_size is None or recipe.mean is None or recipe.std is None:
        raise BundleError(f"{folder} was trained with norm {recipe.norm}; valid: a finished run with norm ubn")
    state = safetensors.torch.load_file(folder / "model.safetensors")
    architecture = recipe.model + SUFFIX
    model = timm.create_model(architecture, num_classes=recipe.num_classes)
    if half:
        names = {name for name, _ in model.named_parameters()}
        state = {name: tensor.half() if name in names else tensor for name, tensor in state.items()}
    model.load_state_dict(state)
    content = tensor_bytes(state)
    target = BUNDLED_WEIGHTS if weights is None else Path(weights)
    file = f"{architecture}.{tag}.safetensors"
    total = sum(path.stat().st_size for path in target.glob("*.safetensors") if path.name != file) + len(content)
    if len(content) > MAX_BYTES or total > MAX_BYTES_IN_ALL:
        raise BundleError(
            f"{file} has {len(content):,} bytes, all files together {total:,}; valid: at most {MAX_BYTES:,} and "
            f"{MAX_BYTES_IN_ALL:,}; `half=True` stores float16"
        )
    ranks = Ranks()
    test = open_eval(recipe, data_dir, ranks)
    found = measure(model.to(memory_format=torch.channels_last), test, ranks)
    name = f"{architecture}.{tag}"
    validate = f"ubn-zoo validate --model {name} --data-dir DIR"
    classes = recipe.num_classes
    trained = train_command(recipe, name=recipe_name, classes=classes)

    def metric(key: str, value: float, command: str, seed: int, commit: str | None) -> dict[str, object]:
        measured = {"command": command, "seeds": [seed], "commit": commit}
        return {"name": key, "value": round(value, 2), "dataset": dataset, "split": "test", "measured": measured}

    metrics = [metric("top1", found.top1, validate, recipe.seed, row.commit)]
    if twin is not None:
        other, theirs = _last_row(Path(twin)), load_recipe(Path(twin) / "recipe.yaml")
        # The settings of UBN layers have no effect there.
        layers = {key: getattr(recipe, key) for key in ("norm", "threshold", "kernel_size", "kernel_init")}
        if dataclasses.replace(theirs, **layers) != recipe:
            raise BundleError(f"{twin} differs from {run} in more than its norm; valid: its BatchNorm twin")
        command = train_command(theirs, name=recipe_name, classes=classes)
        metrics.append(metric("top1_batchnorm_twin", other.top1, command, theirs.seed, other.commit))
    side = recipe.test_img_size or recipe.img_size
    record = record_from_dict(
        {
            "id": name,
            "architecture": architecture,
            "tag": tag,
            "source": "bundled",
            "repo_id": None,
            "revision": None,
            "file": file,
            "sha256": hashlib.sha256(content).hexdigest(),
            "bytes": len(content),
            "params": sum(parameter.numel() for parameter in model.parameters()),
            "input": {
                "size": [3, side, side],
                "mean": list(recipe.mean),
                "std": list(recipe.std),
                "interpolation": recipe.interpolation,
                "crop_pct": recipe.crop_pct,
                "crop_mode": "center",
            },
            "num_classes": recipe.num_classes,
            "label_names": list(test.classes) if len(test.classes) == recipe.num_classes else None,
            "license": "apache-2.0",
            "origin": {"data": origin, "trained": f"by this project from scratch: {trained}"},
            "recipe": {
                "name": f"ubn_zoo/recipes/{recipe_path(recipe_name).name}",
                "sha256": recipe_sha256(recipe_name),
            },
            "metrics": metrics,
            "description": description,
        }
    )
    write_file(target / file, content)
    add_record(record, manifest, replace=True)
    return record


def refresh(manifest: str | Path | None = None) -> list[str]:
    """Update the recipe hashes of bundled records after the text of a packaged recipe has changed.

    Args:
        manifest: The manifest file; by default the one in this package.

    Returns:
        The ids of the records that changed.

    Raises:
        ManifestError: The manifest is not valid.
        RecipeError: A recorded recipe is not in the package anymore.
    """
    changed = []
    for record in load_manifest(manifest):
        if record.source == "bundled" and record.recipe is not None:
            sha256 = recipe_sha256(Path(record.recipe.name).stem)
            if sha256 != record.recipe.sha256:
                recipe = dataclasses.replace(record.recipe, sha256=sha256)
                add_record(dataclasses.replace(record, recipe=recipe), manifest, replace=True)
                changed.append(record.id)
    return changed


def main(arguments: Sequence[str] | None = None) -> int:
    """Bundle from the command line."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words == ["--refresh"]:
        sys.stdout.write("".join(f"{name}: recipe hash updated\n" for name in refresh()) or "nothing to update\n")
        return 0
    parser = argparse.ArgumentParser(
        prog="python -m ubn_zoo.release.bundle",
        description=__doc__,
        epilog="--refresh alone updates the recipe hashes of bundled records after a packaged recipe has changed",
    )
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--tag", required=True)
    parser.add_argument("--recipe", required=True, help="packaged recipe that the run is based on")
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the run's data")
    parser.add_argument("--dataset", required=True, help="name of the dataset")
    parser.add_argument("--origin", required=True, help="what the weights were trained on")
    parser.add_argument("--twin", type=Path, help="the same run with BatchNorm")
    parser.add_argument("--half", action="store_true", help="store parameters in float16")
    parser.add_argument("--description", required=True)
    options = parser.parse_args(words)
    record = bundle(
        options.run,
        tag=options.tag,
        recipe_name=options.recipe,
        data_dir=options.data_dir,
        dataset=options.dataset,
        origin=options.origin,
        twin=options.twin,
        half=options.half,
        description=options.description,
    )
    figures = ", ".join(f"{metric.name} {metric.value:.2f}" for metric in record.metrics)
    sys.stdout.write(f"{record.id}: {record.bytes:,} bytes, {figures}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
