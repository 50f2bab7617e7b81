"""Read and write the manifest of checkpoints, ``weights_manifest.json``, as frozen, validated records.

The file is one JSON object, ``{"schema_version": 1, "records": [...]}``. Every record has exactly the fields of
[`Record`][ubn_zoo.hub.manifest.Record]; a field that does not apply is ``null``. Nothing is guessed or repaired:
invalid content raises [`ManifestError`][ubn_zoo.hub.manifest.ManifestError], so an untrusted manifest is safe to read.

Records are validated when they are created, from JSON or in Python, so every `Record` object is valid.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import fnmatch
import functools
import json
import math
import os
import re
import types
import typing
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ubn_zoo.errors import ManifestError
from ubn_zoo.utils.files import locked, write_file

__all__ = [
    "BUNDLED_WEIGHTS",
    "PACKAGED_MANIFEST",
    "SCHEMA_VERSION",
    "InputSpec",
    "Manifest",
    "ManifestError",
    "Measurement",
    "Metric",
    "Origin",
    "RecipeReference",
    "Record",
    "add_record",
    "bundled_path",
    "dump_manifest",
    "load_manifest",
    "parse_manifest",
    "record_from_dict",
    "record_to_dict",
]

SCHEMA_VERSION = 1

# Limits far above anything in the zoo: a larger value is a mistake or an attack.
MAX_MANIFEST_BYTES = 4 * 2**20
MAX_RECORDS = 10_000
MAX_TEXT = 2_000
MAX_ITEMS = 1_000
MAX_FILE_BYTES = 16 * 2**30
MAX_PARAMS = 16 * 2**30
MAX_CLASSES = 1_000_000
MAX_IMAGE_SIDE = 16_384

SOURCES = ("bundled", "hub")
INTERPOLATIONS = ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest")
CROP_MODES = ("border", "center", "squash")

_PACKAGE = Path(__file__).resolve().parents[1]
PACKAGED_MANIFEST = _PACKAGE / "weights_manifest.json"
"""The manifest that is installed with the package."""

BUNDLED_WEIGHTS = _PACKAGE / "weights"
"""Folder of the checkpoints that are installed with the package."""

# Patterns with their descriptions in error messages.
_Pattern = tuple[re.Pattern[str], str]
_LOWER = "lower-case letters, digits and '_'"
_SHA256 = re.compile(r"[0-9a-f]{64}"), "64 lower-case hexadecimal digits"
_COMMIT = re.compile(r"[0-9a-f]{40}"), "a commit, 40 lower-case hexadecimal digits"
_ARCHITECTURE = re.compile(r"[a-z0-9][a-z0-9_]{0,99}"), _LOWER
_TAG = re.compile(r"[a-z0-9][a-z0-9_-]{0,99}"), f"{_LOWER} and '-'"
_METRIC = re.compile(r"[a-z0-9][a-z0-9_@-]{0,49}"), "a short lower-case name such as top1"
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}"), "a license identifier such as apache-2.0"
_REPO_ID = (
    re.compile(r"(?!.*(\.\.|--))(?=.{3,96}\Z)[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*(?<!\.git)(?<![.-])"),
    "owner/name of a Hub repository: letters, digits, '.', '_', '-', no '..' or '--', at most 96 characters",
)
_PATH_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def _fail(field: str, received: object, valid: str) -> typing.NoReturn:
    shown = repr(received)
    if len(shown) > 100:
        shown = f"{shown[:97]}..."
    raise ManifestError(f"{field}: received {shown}; valid: {valid}")


def _check_text(field: str, value: object, pattern: _Pattern | None = None) -> None:
    """Check for a non-empty string of printable characters that matches `pattern`, if given."""
    regex, valid = pattern or (None, f"a printable, non-empty string of at most {MAX_TEXT} characters")
    if not isinstance(value, str) or not value.strip() or len(value) > MAX_TEXT or not value.isprintable():
        _fail(field, value, valid)
    if regex is not None and not regex.fullmatch(value):
        _fail(field, value, valid)


def _check_choice(field: str, value: object, choices: Collection[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        _fail(field, value, "one of " + ", ".join(choices))


def _check_integer(field: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        _fail(field, value, f"an integer from {low} to {high}")


def _check_number(field: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        _fail(field, value, "a finite number")
    if not low <= value <= high:
        _fail(field, value, f"a number from {low:g} to {high:g}")


def _check_tuple(field: str, value: object, *, length: int | None = None) -> None:
    if not isinstance(value, tuple) or len(value) > MAX_ITEMS or length not in (None, len(value)):
        _fail(field, value, f"a list of {f'at most {MAX_ITEMS}' if length is None else length} items")


def _check_instance(field: str, value: object, cls: type) -> None:
    if not isinstance(value, cls):
        _fail(field, value, f"an object with the fields {', '.join(_field_names(cls))}")


def _check_file(field: str, value: object, *, folders: bool) -> None:
    """Check for a relative path of plain names: no ``..``, backslash, drive letter or scheme."""
    where = "a relative path" if folders else "a file name"
    valid = f"{where} of letters, digits, '.', '_' and '-' ending in .safetensors, without '..' or a leading '/'"
    parts = value.split("/") if isinstance(value, str) and value.endswith(".safetensors") else []
    plain = all(_PATH_PART.fullmatch(part) and not part.endswith(".") for part in parts)
    if not plain or not 1 <= len(parts) <= (200 if folders else 1) or len(str(value)) > 200:
        _fail(field, value, valid)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec:
    """The preprocessing of images that the model expects, in timm's terms.

    Attributes:
        size: Channels, height and width in pixels.
        mean: Per-channel mean of pixel values scaled to [0, 1].
        std: Per-channel standard deviation of pixel values scaled to [0, 1].
        interpolation: Resampling filter of the resize, one of `INTERPOLATIONS`.
        crop_pct: Size of the center crop divided by the size of the resized image.
        crop_mode: How the image is cropped, one of `CROP_MODES`.
    """

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str

    def __post_init__(self) -> None:
        _check_tuple("size", self.size, length=3)
        for side in self.size:
            _check_integer("size", side, 1, MAX_IMAGE_SIDE)
        for name, values, low in (("mean", self.mean, -10.0), ("std", self.std, 1e-6)):
            _check_tuple(name, values, length=self.size[0])
            for value in values:
                _check_number(name, value, low, 10.0)
        _check_choice("interpolation", self.interpolation, INTERPOLATIONS)
        _check_number("crop_pct", self.crop_pct, 0.01, 2.0)
        _check_choice("crop_mode", self.crop_mode, CROP_MODES)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where the weights come from.

    Attributes:
        data: The training data.
        trained: Who or what trained them: a command, a repository, or a paper.
    """

    data: str
    trained: str

    def __post_init__(self) -> None:
        _check_text("data", self.data)
        _check_text("trained", self.trained)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RecipeReference:
    """Which recipe the weights were trained with: its name and its hash.

    Attributes:
        name: Name of the recipe, or its path in this repository.
        sha256: SHA-256 of the recipe file, 64 lower-case hexadecimal digits.
    """

    name: str
    sha256: str

    def __post_init__(self) -> None:
        _check_text("name", self.name)
        _check_text("sha256", self.sha256, _SHA256)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """How a metric was measured.

    Attributes:
        command: The command that repeats the measurement.
        seeds: Random seeds of the runs whose mean the value is; empty if the measurement is deterministic.
        commit: Commit of this project that was used, 40 hexadecimal digits; None if unknown.
    """

    command: str
    seeds: tuple[int, ...]
    commit: str | None

    def __post_init__(self) -> None:
        _check_text("command", self.command)
        _check_tuple("seeds", self.seeds)
        for seed in self.seeds:
            _check_integer("seeds", seed, 0, 2**63 - 1)
        if self.commit is not None:
            _check_text("commit", self.commit, _COMMIT)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One measured result.

    Attributes:
        name: Name of the metric, for example ``top1``.
        value: The result; accuracies are in percent.
        dataset: Dataset that it was measured on.
        split: Split of that dataset.
        measured: How it was measured.
    """

    name: str
    value: float
    dataset: str
    split: str
    measured: Measurement

    def __post_init__(self) -> None:
        _check_text("name", self.name, _METRIC)
        _check_number("value", self.value, -1e12, 1e12)
        _check_text("dataset", self.dataset)
        _check_text("split", self.split)
        _check_instance("measured", self.measured, Measurement)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One checkpoint.

    Attributes:
        id: ``architecture.tag``, the model name for ``timm.create_model``.
        architecture: Name of the architecture.
        tag: Tag of the weights; an architecture can have several.
        source: ``bundled`` (a file in this package) or ``hub`` (a file in a Hub repository).
        repo_id: Hub repository, ``owner/name``; None if bundled.
        revision: Commit of that repository, 40 hexadecimal digits; None if bundled.
        file: Path inside the repository, or file name inside the package's ``weights`` folder.
        sha256: SHA-256 of the file, 64 lower-case hexadecimal digits.
        bytes: Size of the file in bytes.
        params: Number of parameters of the model.
        input: The preprocessing of images that the model expects.
        num_classes: Number of outputs of the classifier; 0 if the model has no classifier.
        label_names: Names of the classes in the order of the outputs; None if unknown, or more than 1,000.
        license: SPDX identifier of the weights' license.
        origin: Where the weights come from.
        recipe: The training recipe; None for weights that this project did not train.
        metrics: Measured results, the most important one first.
        description: One sentence about the weights.

    Raises:
        ManifestError: A field is not valid, or two fields contradict each other.
    """

    id: str
    architecture: str
    tag: str
    source: str
    repo_id: str | None
    revision: str | None
    file: str
    sha256: str
    bytes: int
    params: int
    input: InputSpec
    num_classes: int
    label_names: tuple[str, ...] | None
    license: str
    origin: Origin
    recipe: RecipeReference | None
    metrics: tuple[Metric, ...]
    description: str

    def __post_init__(self) -> None:
        _check_text("architecture", self.architecture, _ARCHITECTURE)
        _check_text("tag", self.tag, _TAG)
        if self.id != f"{self.architecture}.{self.tag}":
            _fail("id", self.id, f"architecture.tag, here '{self.architecture}.{self.tag}'")
        _check_choice("source", self.source, SOURCES)
        for name, value, pattern in (("repo_id", self.repo_id, _REPO_ID), ("revision", self.revision, _COMMIT)):
            if self.source == "hub":
                _check_text(name, value, pattern)
            elif value is not None:
                _fail(name, value, "null if the source is bundled")
        _check_file("file", self.file, folders=self.source == "hub")
        _check_text("sha256", self.sha256, _SHA256)
        _check_integer("params", self.params, 1, MAX_PARAMS)
        _check_integer("bytes", self.bytes, 1, MAX_FILE_BYTES)
        if self.bytes < self.params:
            _fail("bytes", self.bytes, f"at least one byte for each of the {self.params} parameters")
        _check_instance("input", self.input, InputSpec)
        _check_integer("num_classes", self.num_classes, 0, MAX_CLASSES)
        if self.label_names is not None:
            _check_tuple("label_names", self.label_names, length=self.num_classes)
            for index, label in enumerate(self.label_names):
                _check_text(f"label_names[{index}]", label)
            if len(set(self.label_names)) < self.num_classes:
                _fail("label_names", self.label_names, "a different name for each class")
        _check_text("license", self.license, _LICENSE)
        _check_instance("origin", self.origin, Origin)
        if self.recipe is not None:
            _check_instance("recipe", self.recipe, RecipeReference)
        _check_tuple("metrics", self.metrics)
        for metric in self.metrics:
            _check_instance("metrics", metric, Metric)
        _check_text("description", self.description)


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
    """All records of a manifest, in the order of the file.

    Raises:
        ManifestError: Two records have the same id.
    """

    records: tuple[Record, ...]

    def __post_init__(self) -> None:
        for name, count in collections.Counter(record.id for record in self.records).items():
            if count > 1:
                raise ManifestError(f"record '{name}': more than one record has this id; ids must be unique")

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def get(self, name: str) -> Record:
        """Return the record with an id.

        Args:
            name: ``architecture.tag``.

        Raises:
            ManifestError: There is no such record; the message lists similar ids.
        """
        known = {record.id: record for record in self.records}
        if name in known:
            return known[name]
        similar = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
        hint = f"similar: {', '.join(similar)}" if similar else f"there are {len(known)} records"
        raise ManifestError(f"no record '{name}' in the manifest; {hint}")

    def find(
        self, pattern: str = "*", *, architecture: str | None = None, tag: str | None = None, source: str | None = None
    ) -> tuple[Record, ...]:
        """Return all records that match, in the order of the file.

        Args:
            pattern: Shell-style wildcard for the id.
            architecture: Only records of this architecture.
            tag: Only records of this tag.
            source: Only records of this source, ``bundled`` or ``hub``.
        """
        wanted = {"architecture": architecture, "tag": tag, "source": source}
        return tuple(
            record
            for record in self.records
            if fnmatch.fnmatchcase(record.id, pattern)
            and all(value is None or getattr(record, name) == value for name, value in wanted.items())
        )


_T = TypeVar("_T")


def _field_names(cls: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(cls))


@functools.cache
def _field_types(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _build(cls: type[_T], data: object) -> _T:
    """Create an instance of a record class from a parsed JSON object that has exactly the fields of the class."""
    names = _field_names(cls)
    if not isinstance(data, dict):
        raise ManifestError(f"received {type(data).__name__}; valid: an object with the fields {', '.join(names)}")
    for name in data:
        if name not in names:
            raise ManifestError(f"{name[:100]!r}: unknown field; valid: {', '.join(names)}")
    for name in names:
        if name not in data:
            raise ManifestError(f"{name}: missing; write null where the field allows it")
    kinds = _field_types(typing.cast(Any, cls))  # which mypy does not take for hashable
    return cls(**{name: _convert(name, data[name], kinds[name]) for name in names})


def _convert(field: str, value: object, wanted: Any) -> object:
    """Convert a JSON value to a field's type; a value that does not fit is returned for the field's own check."""
    if isinstance(wanted, types.UnionType):
        if value is None:
            return None
        wanted = next(option for option in typing.get_args(wanted) if option is not types.NoneType)
    if dataclasses.is_dataclass(wanted):
        try:
            return _build(typing.cast("type[object]", wanted), value)
        except ManifestError as error:
            raise ManifestError(f"{field}.{error}") from None
    if typing.get_origin(wanted) is tuple and isinstance(value, list):
        if len(value) > MAX_ITEMS:
            _fail(field, value[:3], f"a list of at most {MAX_ITEMS} items")
        item = typing.get_args(wanted)[0]
        return tuple(_convert(f"{field}[{index}]", entry, item) for index, entry in enumerate(value))
    return value


def record_from_dict(data: object) -> Record:
    """Create a record from a parsed JSON object.

    Args:
        data: An object with exactly the fields of `Record`.

    Raises:
        ManifestError: The object is not a valid record; the message names the record and the field.
    """
    name = data.get("id") if isinstance(data, dict) else None
    shown = f"'{name}'" if isinstance(name, str) and name.isprintable() and len(name) <= 200 else "without a valid id"
    try:
        return _build(Record, data)
    except ManifestError as error:
        raise ManifestError(f"record {shown}: {error}") from None


def record_to_dict(record: Record) -> dict[str, Any]:
    """Convert a record to a JSON-serializable dict; the inverse of `record_from_dict`."""
    return typing.cast("dict[str, Any]", json.loads(json.dumps(dataclasses.asdict(record))))


def _no_duplicate_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise ManifestError(f"{key[:100]!r}: the field occurs twice in the same object")
        found[key] = value
    return found


def _no_constant(name: str) -> typing.NoReturn:
    raise ManifestError(f"received {name}; valid: finite numbers")


def parse_manifest(content: bytes | str) -> Manifest:
    """Parse the content of a manifest file.

    Args:
        content: UTF-8 bytes, or text.

    Raises:
        ManifestError: The content is too large, is not UTF-8 or JSON, or has another schema version or an
            invalid record.
    """
    if len(content) > MAX_MANIFEST_BYTES:
        raise ManifestError(f"received a manifest of {len(content)} bytes; valid: at most {MAX_MANIFEST_BYTES}")
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        data = json.loads(text, object_pairs_hook=_no_duplicate_keys, parse_constant=_no_constant)
    except ManifestError:
        raise
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"the manifest is not valid UTF-8 JSON: {str(error)[:200]}") from None
    if not isinstance(data, dict) or set(data) != {"schema_version", "records"}:
        raise ManifestError("the manifest must be one object with exactly the fields schema_version and records")
    version, records = data["schema_version"], data["records"]
    if isinstance(version, bool) or version != SCHEMA_VERSION:
        _fail("schema_version", version, f"{SCHEMA_VERSION}; upgrade ubn-zoo to read a newer one")
    if not isinstance(records, list) or len(records) > MAX_RECORDS:
        raise ManifestError(f"records: received {type(records).__name__}; valid: a list of at most {MAX_RECORDS}")
    return Manifest(tuple(record_from_dict(entry) for entry in records))


def load_manifest(path: str | os.PathLike[str] | None = None) -> Manifest:
    """Read a manifest file.

    Args:
        path: The file; by default `PACKAGED_MANIFEST`, which is read once per process.

    Raises:
        ManifestError: The file cannot be read, or is not a valid manifest; the message names the file.
    """
    return _load(Path(path)) if path is not None else _load_packaged()


@functools.lru_cache(maxsize=1)
def _load_packaged() -> Manifest:
    return _load(PACKAGED_MANIFEST)


def _load(path: Path) -> Manifest:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_MANIFEST_BYTES + 1)
        return parse_manifest(content)
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ManifestError as error:
        raise ManifestError(f"{path}: {error}") from None


def dump_manifest(records: Iterable[Record], path: str | os.PathLike[str]) -> Manifest:
    """Write a manifest file atomically, its records sorted by id.

    Args:
        records: The records; their ids must be unique.
        path: The file; its folder must exist. If it is a symbolic link, the file it points to is written.

    Returns:
        The manifest as written.

    Raises:
        ManifestError: Two records have the same id, or the file would exceed the size limit.
        OSError: The file cannot be written.
    """
    entries = [record_to_dict(record) for record in sorted(records, key=lambda record: record.id)]
    data = {"schema_version": SCHEMA_VERSION, "records": entries}
    content = (json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
    manifest = parse_manifest(content)
    write_file(path, content)
    _load_packaged.cache_clear()
    return manifest


def add_record(
    record: Record,
    path: str | os.PathLike[str] | None = None,
    *,
    replace: bool = False,
    expected: Record | None = None,
) -> Manifest:
    """Add a record to a manifest file. Processes that add records at the same time wait for each other.

    Args:
        record: The new record.
        path: The file; by default `PACKAGED_MANIFEST`.
        replace: Whether to replace any existing record with the same id.
        expected: The existing record that the caller has seen and wants to replace; None if there was none.

    Returns:
        The manifest as written.

    Raises:
        ManifestError: The file is not valid, or it has another record with this id.
        OSError: The file cannot be written.
    """
    target = PACKAGED_MANIFEST if path is None else Path(path)
    _load(target)
    with locked(target):
        records = {known.id: known for known in _load(target)}
        if records.get(record.id) not in (None, record, expected) and not replace:
            raise ManifestError(f"record '{record.id}': already in {target}; pass `replace=True` to overwrite it")
        return dump_manifest({**records, record.id: record}.values(), target)


def bundled_path(record: Record) -> Path:
    """Return the path of a bundled checkpoint.

    Args:
        record: A record whose source is ``bundled``.

    Raises:
        ManifestError: The record's source is not ``bundled``.
        FileNotFoundError: The file is missing from the installation.
    """
    if record.source != "bundled":
        raise ManifestError(f"record '{record.id}': source: received {record.source!r}; valid: 'bundled'")
    path = BUNDLED_WEIGHTS / record.file
    if not path.is_file():
        raise FileNotFoundError(f"record '{record.id}': {path} is missing; reinstall ubn-zoo")
    return path
