"""Put a trained run's weights into the package, with a record that says what they reach and how it was measured.

`python -m ubn_zoo.release.bundle --help` is for those who maintain the package; everybody else publishes
(`ubn_zoo.release.upload`).
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
from ubn_zoo.hub import manifest
from ubn_zoo.hub.manifest import Record, add_record, record_from_dict
from ubn_zoo.models.registry import SUFFIX
from ubn_zoo.recipes.schema import load_recipe, recipe_path, recipe_sha256
from ubn_zoo.release.run_record import train_command
from ubn_zoo.training.checkpoint import tensor_bytes
from ubn_zoo.utils.distributed import Ranks
from ubn_zoo.utils.files import write_file

__all__ = ["bundle", "main"]

MAX_BYTES = 12 * 10**6
MAX_BYTES_IN_ALL = 30 * 10**6


def _last_row(run: Path) -> EpochMetrics:
    if not (run / "model.safetensors").is_file():
        raise BundleError(f"{run} is not the folder of a finished run: it has no model.safetensors")
    row = read_metrics(run / "metrics.csv")[-1]
    if row.commit is None or row.commit.endswith("+"):
        raise BundleError(f"{run}: its commit is {row.commit}; valid: one that holds all of the code that was run")
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
    book: str | Path | None = None,
    weights: str | Path | None = None,
) -> Record:
    """Bundle a finished run's weights.

    Args:
        run: Folder of the run.
        tag: Name of the weights, in ``architecture.tag``.
        recipe_name: The packaged recipe that the run was made from.
        data_dir: Data of the run; its held-out images are measured with the stored file.
        dataset: Their name.
        origin: What the weights were trained on, a sentence.
        twin: Folder of the same run with BatchNorm, whose accuracy goes beside.
        half: Whether parameters are stored in float16, half the size; they are widened on load, and measured so.
        description: One sentence for people.
        book: The manifest's file; by default the one that this package carries.
        weights: Folder of the bundled files; by default the package's.

    Returns:
        The record, as it is in the manifest now.

    Raises:
        BundleError: The run is not finished, its code had no commit, or the file is too large.
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
    target = manifest.BUNDLED_WEIGHTS if weights is None else Path(weights)
    file = f"{architecture}.{tag}.safetensors"
    total = sum(path.stat().st_size for path in target.glob("*.safetensors") if path.name != file) + len(content)
    if len(content) > MAX_BYTES or total > MAX_BYTES_IN_ALL:
        raise BundleError(
            f"{file} has {len(content):,} bytes, all files together {total:,}; valid: at most {MAX_BYTES:,} and "
            f"{MAX_BYTES_IN_ALL:,}; half=True stores float16"
        )
    ranks = Ranks()
    found = measure(model.to(memory_format=torch.channels_last), open_eval(recipe, data_dir, ranks), ranks)
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
        # Settings of the UBN layers mean nothing there.
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
    add_record(record, book, replace=True)
    return record


def main(arguments: Sequence[str] | None = None) -> int:
    """Bundle from the command line."""
    parser = argparse.ArgumentParser(prog="python -m ubn_zoo.release.bundle", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--tag", required=True)
    parser.add_argument("--recipe", required=True, help="packaged recipe that the run was made from")
    parser.add_argument("--data-dir", type=Path, required=True, help="data of the run")
    parser.add_argument("--dataset", required=True, help="its name")
    parser.add_argument("--origin", required=True, help="what the weights were trained on")
    parser.add_argument("--twin", type=Path, help="the same run with BatchNorm")
    parser.add_argument("--half", action="store_true", help="store parameters in float16")
    parser.add_argument("--description", required=True)
    options = parser.parse_args(arguments)
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
