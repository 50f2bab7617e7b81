"""Publish a checkpoint on the Hub in one commit, and record it in the manifest.

Everything is checked and prepared before anything is sent. The manifest is written last, once the files are on the
Hub, so an interrupted publication can simply be repeated.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ubn_zoo.errors import CheckpointError, ManifestError, NotRecordedError, PublishError, RecipeError
from ubn_zoo.hub.manifest import (
    MAX_ITEMS,
    PACKAGED_MANIFEST,
    Record,
    add_record,
    bundled_path,
    load_manifest,
    record_from_dict,
    record_to_dict,
)
from ubn_zoo.models.hub_config import describe_model
from ubn_zoo.models.weights import check_state_dict
from ubn_zoo.recipes.schema import parse_recipe
from ubn_zoo.release.card import card_text, class_names, validate_command
from ubn_zoo.release.remeasure import agrees, measure_files
from ubn_zoo.release.repository import CARD, CONFIG, File, Repository
from ubn_zoo.release.source import CSV, JSON, RECIPE, UNKNOWN, WEIGHTS, Options, Source, gather
from ubn_zoo.utils.sanitize import find_secret

__all__ = ["File", "Publication", "publish"]

_NO_COMMIT = "0" * 40
_INPUT = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """What was published, or would be.

    Attributes:
        record: The manifest record; after a dry run its revision is 40 zeros.
        files: The files, the weights first.
        committed: Whether a new commit was made; False if the repository already had all files.
        recorded: Whether the manifest was changed.
    """

    record: Record
    files: tuple[File, ...]
    committed: bool
    recorded: bool

    @property
    def card(self) -> str:
        """Text of the model card."""
        return next(file for file in self.files if file.name == CARD).content.decode()


def publish(
    source: str | os.PathLike[str],
    repo_id: str,
    *,
    tag: str | None = None,
    private: bool = False,
    dry_run: bool = False,
    license: str | None = None,
    dataset: str | None = None,
    split: str | None = None,
    recipe: str | os.PathLike[str] | None = None,
    metrics: str | os.PathLike[str] | None = None,
    description: str | None = None,
    base_model: str | None = None,
    manifest: str | os.PathLike[str] | None = None,
    replace: bool = False,
    remeasure: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Publication:
    """Publish a checkpoint on the Hub in one commit, and record it in a manifest.

    A run whose recipe has `data_name` and `license` needs only a source and a repository. A repository that already has
    the same files gets no new commit, so a publication can be repeated, for example after an interruption. Uploads use
    huggingface_hub, with its token and endpoint (``HF_ENDPOINT``), with or without Xet.

    Args:
        source: Folder of a training run, as training left it; folder in timm's format (`config.json`,
            `model.safetensors`); file written by ``ubn-zoo convert``; or id of a manifest record.
        repo_id: Hub repository, ``owner/name``; created if it does not exist.
        tag: Tag of these weights, as in ``architecture.tag``; by default the checkpoint's own, or derived from the
            dataset's name.
        private: Whether the repository must be private; a new one is created private.
        dry_run: Whether to only check: nothing is sent, requested or written.
        license: SPDX identifier of the weights' license; by default the checkpoint's own.
        dataset: Name of the dataset for training and evaluation; by default the checkpoint's own.
        split: The split that the metrics were measured on; by default the one that the run recorded.
        recipe: A recipe file, for a checkpoint without one.
        metrics: A ``.csv`` file as training writes it, or a ``.json`` file with a list of metrics as in the manifest.
        description: One sentence about the weights.
        base_model: Hub id of the model that training started from, with ``@revision`` if known; by default what the
            run recorded.
        manifest: The manifest file; by default the one in this package.
        replace: Whether to replace other weights: those with the same id in the manifest, and any in the repository,
            where pickles and files that are not from a recorded publication are replaced too.
        remeasure: Folder of the run's data: the accuracy is measured again on its held-out images before the upload.
        cache_dir: Cache folder for a record's weights; by default huggingface_hub's.

    Raises:
        PublishError: The checkpoint is not fit for publication; all reasons are listed.
        PublishConflictError: The repository has other content, or changed in the meantime.
        HubError: The Hub denies the request, or is unreachable.
        NotRecordedError: The upload succeeded, but the manifest could not be written.
        ManifestError: The manifest is not valid, or has other weights with this id.
        OSError: The manifest is not writable; nothing was sent.
    """
    options = Options(
        tag=tag,
        license=license,
        dataset=dataset,
        split=split,
        recipe=recipe,
        metrics=metrics,
        description=description,
        base_model=base_model,
    )
    known = load_manifest(manifest)
    found = gather(source, known, options, cache_dir)
    record, files = _prepare(found, repo_id, remeasure)
    earlier = next((entry for entry in known if entry.id == record.id), None)
    if earlier is not None and earlier.sha256 != record.sha256 and not replace:
        raise ManifestError(
            f"record '{record.id}': the manifest has other weights with this id; choose another `tag`, or pass "
            "`replace=True`"
        )
    if dry_run:
        return Publication(record=record, files=files, committed=False, recorded=False)
    path = PACKAGED_MANIFEST if manifest is None else Path(manifest)
    _check_writable(path)
    repository = Repository(repo_id)
    here = [entry for entry in known if entry.repo_id == repo_id]
    revision, committed = repository.publish(
        files,
        record.id,
        private=private,
        recorded={str(entry.revision) for entry in here},
        others={entry.id: entry.sha256 for entry in here if entry.sha256 != record.sha256},
        replace=replace,
    )
    record = dataclasses.replace(record, revision=revision)
    # Record every new commit; otherwise the next publication would take its files for somebody else's.
    if (
        earlier is not None
        and (earlier.source == "bundled" or not committed)
        and _can_stay(earlier, record, repository)
    ):
        return Publication(record=earlier, files=files, committed=committed, recorded=False)
    try:
        add_record(record, path, replace=replace, expected=earlier)
    except (OSError, ManifestError) as error:
        raise NotRecordedError(
            f"{repo_id} holds {record.id} at commit {revision}, but it is not in the manifest {path}: {error}. Fix "
            "that, then publish again with the same arguments: no new commit is made, and the record is added"
        ) from error
    return Publication(record=record, files=files, committed=committed, recorded=True)


def _check_writable(path: Path) -> None:
    """Check before the upload that the manifest can be written after it."""
    try:
        # Manifests are replaced by a temporary file in the same folder, so the folder must be writable.
        with tempfile.TemporaryFile(dir=path.resolve().parent):
            pass
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror}, so the publication could not be recorded, and nothing was sent; name a writable "
            "manifest with `manifest=FILE`",
            str(path),
        ) from error


def _can_stay(earlier: Record, record: Record, repository: Repository) -> bool:
    """Whether an earlier record can stay: a bundled file, or an existing revision with the same content."""
    if earlier.source == "bundled":
        try:
            bundled_path(earlier)
        except FileNotFoundError:
            return False
        return earlier.sha256 == record.sha256
    same = dataclasses.replace(earlier, revision=record.revision) == record
    return same and repository.holds(str(earlier.revision), earlier.file, earlier.sha256)


def _prepare(found: Source, repo_id: str, remeasure: str | os.PathLike[str] | None) -> tuple[Record, tuple[File, ...]]:
    """Check everything; return the record, without its revision, and all files, or raise with all reasons."""
    reasons = found.problems
    _check_recipe(found)
    _check_facts(found)
    if found.model is not None and found.state is not None:
        _check_weights(found, found.model, found.state)
    if found.model is None or found.state is None:
        raise PublishError(found.label, reasons)
    config = _config(found, found.model)
    try:
        record = record_from_dict(_draft(found, found.model, config["pretrained_cfg"], repo_id))
    except ManifestError as error:
        reasons.append(str(error))
    if reasons:
        raise PublishError(found.label, reasons)
    contents = {WEIGHTS: found.weights, CONFIG: _json(config)}
    sentence = None
    if remeasure is not None:
        record, sentence = _remeasured(found, record, contents, remeasure)
    if found.recipe is not None:
        contents[RECIPE] = found.recipe
    if found.table is not None:
        contents[CSV] = found.table
    else:
        contents[JSON] = _json(record_to_dict(record)["metrics"])
    contents |= found.pictures
    contents[CARD] = card_text(record, found, sentence).encode()
    _check_secrets(found, contents)
    return record, tuple(File(name, body, hashlib.sha256(body).hexdigest()) for name, body in contents.items())


def _json(data: object) -> bytes:
    return (json.dumps(data, indent=2, allow_nan=False) + "\n").encode()


def _check_recipe(found: Source) -> None:
    if found.recipe is None:
        if found.needs_recipe and not any("recipe" in reason for reason in found.problems):
            found.problems.append(f"the recipe is missing: there is no {RECIPE}; pass its file as `recipe`")
        return
    if found.recipe_sha256 not in (None, hashlib.sha256(found.recipe).hexdigest()):
        found.problems.append(f"the recipe is not the recorded one, whose SHA-256 is {found.recipe_sha256}")
    try:
        parse_recipe(found.recipe.decode("utf-8"))
    except (RecipeError, UnicodeDecodeError) as error:
        found.problems.append(f"the recipe is not valid: {error}")


def _check_facts(found: Source) -> None:
    """Check that everything a publication needs is known."""
    reasons = found.problems
    if not found.metrics and not any(reason.startswith("metrics") for reason in reasons):
        reasons.append(f"metrics are missing: there is neither {CSV} nor {JSON}; pass a file as `metrics`")
    if not found.license:
        reasons.append("the license is missing; pass its identifier as `license`, for example apache-2.0")
    if not found.data:
        reasons.append("the dataset is missing; pass its name as `dataset`, for example CIFAR-10")
    if not found.tag:
        reasons.append("the tag is missing; pass a short name for these weights as `tag`")
    base = found.base
    if base is not None and base.repository is not None:
        valid = _HUB_ID.fullmatch(base.repository) and _REVISION.fullmatch(base.revision or "main")
        if not valid:
            received = base.repository + (f"@{base.revision}" if base.revision else "")
            reasons.append(f"`base_model`: received {received[:100]!r}; valid: a Hub repository, OWNER/NAME[@REVISION]")


def _check_weights(found: Source, model: nn.Module, state: dict[str, Any]) -> None:
    """Check keys, shapes, dtypes and values, and that a forward pass is finite."""
    try:
        check_state_dict(state, model, WEIGHTS, str(found.architecture))
    except CheckpointError as error:
        found.problems.append(str(error).replace(". Nothing was loaded", ""))
        return
    model.load_state_dict(state)
    size = (found.data_config or cast(dict[str, Any], model.pretrained_cfg))["input_size"]
    images = torch.rand(1, *size, generator=torch.Generator().manual_seed(0))
    try:
        with torch.inference_mode():
            finite = bool(torch.isfinite(model.eval()(images)).all())
    except RuntimeError as error:
        found.problems.append(f"the forward pass of an image of size {tuple(size)} fails: {error}")
        return
    if not finite:
        found.problems.append("the forward pass gives NaN or infinite outputs")


def _check_secrets(found: Source, contents: Mapping[str, bytes]) -> None:
    """Refuse to publish text with a token or password."""
    for name, body in contents.items():
        text = name.endswith((".json", ".yaml", ".csv", ".md"))
        secret = find_secret(body.decode("utf-8", errors="replace")) if text else None
        if secret is not None:
            found.problems.append(f"{name} would publish what looks like a secret, near {secret!r}; remove it")
    if found.problems:
        raise PublishError(found.label, found.problems)


def _remeasured(
    found: Source, record: Record, contents: Mapping[str, bytes], data_dir: str | os.PathLike[str]
) -> tuple[Record, str]:
    """Measure the accuracy again; return the updated record and a sentence about it, or raise if the figures differ."""
    recipe = found.parsed_recipe
    accuracy = measure_files(contents, data_dir, recipe, found.split)
    top1 = next((metric for metric in record.metrics if metric.name == "top1"), None)
    if top1 is None:
        raise PublishError(found.label, ["`remeasure`: there is no top1 metric to compare with"])
    if not agrees(top1.value, accuracy):
        again = f"{accuracy.top1:g} measured again on {accuracy.images} images of {os.fspath(data_dir)}"
        raise PublishError(found.label, [f"top1 is {top1.value:g} in its record, but {again}"])
    command = validate_command(str(record.repo_id), recipe, found.split)
    measured = dataclasses.replace(
        top1, value=accuracy.top1, measured=dataclasses.replace(top1.measured, command=command)
    )
    metrics = tuple(measured if metric is top1 else metric for metric in record.metrics)
    sentence = (
        f"Measured again before publication, with the files published here: top-1 {accuracy.top1:.2f} % on "
        f"{accuracy.images:,} images; the run recorded {top1.value:.2f} %."
    )
    return dataclasses.replace(record, metrics=metrics), sentence


def _config(found: Source, model: nn.Module) -> dict[str, Any]:
    """What timm needs to build the model from the repository."""
    described = {"tag": found.tag, "license": found.license, "description": _description(found), "origin_url": None}
    model_config = {**found.labels, "pretrained_cfg": described}
    return describe_model(model, model_config=model_config, data_config=found.data_config)


def _description(found: Source) -> str:
    return found.description or f"{found.architecture}, {'trained on ' + found.data if found.data else 'a UBN model'}"


def _draft(found: Source, model: nn.Module, cfg: Mapping[str, Any], repo_id: str) -> dict[str, Any]:
    """Draft the record for `record_from_dict`, with placeholders for values already reported as missing."""
    recipe = None
    if found.recipe is not None:
        recipe = {"name": found.recipe_name, "sha256": hashlib.sha256(found.recipe).hexdigest()}
    tag = found.tag or UNKNOWN
    names = class_names(found)
    return {
        "id": f"{found.architecture}.{tag}",
        "architecture": found.architecture,
        "tag": tag,
        "source": "hub",
        "repo_id": repo_id,
        "revision": _NO_COMMIT,
        "file": WEIGHTS,
        "sha256": hashlib.sha256(found.weights).hexdigest(),
        "bytes": len(found.weights),
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "input": {"size": cfg["input_size"], **{name: cfg[name] for name in _INPUT}},
        "num_classes": model.num_classes,
        "label_names": list(names) if 0 < len(names) <= MAX_ITEMS else None,
        "license": found.license or UNKNOWN,
        "origin": {"data": found.data or UNKNOWN, "trained": found.trained or "as its recipe says"},
        "recipe": recipe,
        "metrics": found.metrics or [],
        "description": _description(found),
    }
