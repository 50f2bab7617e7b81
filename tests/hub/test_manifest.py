"""The manifest: what is valid, how invalid content is refused, and how the file is written."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from ubn_zoo.hub import manifest
from ubn_zoo.hub.manifest import Manifest, ManifestError, Record, parse_manifest, record_from_dict, record_to_dict

REPOSITORY = Path(__file__).parents[2]


def bundled() -> dict[str, Any]:
    return {
        "id": "resnet_small_ubn.cifar10",
        "architecture": "resnet_small_ubn",
        "tag": "cifar10",
        "source": "bundled",
        "repo_id": None,
        "revision": None,
        "file": "resnet_small_ubn.cifar10.safetensors",
        "sha256": "0123456789abcdef" * 4,
        "bytes": 4_000_000,
        "params": 900_000,
        "input": {
            "size": [3, 32, 32],
            "mean": [0.49, 0.48, 0.45],
            "std": [0.25, 0.24, 0.26],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
        },
        "num_classes": 10,
        "label_names": [*"abcdefghij"],
        "license": "apache-2.0",
        "origin": {"data": "CIFAR-10", "trained": "ubn-zoo train"},
        "recipe": {"name": "cifar10_small", "sha256": "f" * 64},
        "metrics": [
            {
                "name": "top1",
                "value": 90,
                "dataset": "CIFAR-10",
                "split": "test",
                "measured": {"command": "ubn-zoo validate", "seeds": [0, 1], "commit": "a" * 40},
            }
        ],
        "description": "A small ResNet.",
    }


def hosted() -> dict[str, Any]:
    address = {"source": "hub", "repo_id": "someone/model.x", "revision": "b" * 40, "file": "weights/model.safetensors"}
    return {**bundled(), **address, "id": "resnet_small_ubn.hosted", "tag": "hosted"}


def as_text(*records: dict[str, Any], version: object = 1) -> str:
    return json.dumps({"schema_version": version, "records": list(records)})


def at(path: tuple[Any, ...], value: object, base: dict[str, Any] | None = None) -> dict[str, Any]:
    """A record with one value replaced, or removed if the value is `...`."""
    record = copy.deepcopy(base or bundled())
    target: Any = record
    for step in path[:-1]:
        target = target[step]
    if value is ...:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    return record


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all fields of a record; for a list, those of its first item."""
    found = []
    for key, entry in value.items():
        found.append((*prefix, key))
        if isinstance(entry, dict):
            found += paths(entry, (*prefix, key))
        elif isinstance(entry, list) and isinstance(entry[0], dict):
            found += paths(entry[0], (*prefix, key, 0))
    return found


FIELDS = paths(bundled())
NULLABLE = [("repo_id",), ("revision",), ("label_names",), ("recipe",), ("metrics", 0, "measured", "commit")]


def test_packaged_manifest_is_the_one_at_the_root() -> None:
    assert manifest.PACKAGED_MANIFEST.read_bytes() == (REPOSITORY / "weights_manifest.json").read_bytes()
    assert manifest.load_manifest() == manifest.load_manifest(REPOSITORY / "weights_manifest.json")
    assert manifest.load_manifest() is manifest.load_manifest()


def test_packaged_manifest_is_written_as_the_code_writes_it(tmp_path: Path) -> None:
    manifest.dump_manifest(manifest.load_manifest(), tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (REPOSITORY / "weights_manifest.json").read_bytes()


def test_bundled_files_are_what_their_records_claim() -> None:
    for record in manifest.load_manifest().find(source="bundled"):
        path = manifest.bundled_path(record)
        assert path.stat().st_size == record.bytes
        assert hashlib.sha256(path.read_bytes()).hexdigest() == record.sha256
    folder = manifest.BUNDLED_WEIGHTS
    recorded = {record.file for record in manifest.load_manifest().find(source="bundled")}
    assert {path.name for path in folder.glob("*.safetensors")} == recorded
    assert sum(path.stat().st_size for path in folder.glob("*")) <= 30 * 10**6


def test_records_are_frozen_slotted_and_round_trip() -> None:
    for data in (bundled(), hosted()):
        record = record_from_dict(data)
        assert record_to_dict(record) == data
        assert record_from_dict(json.loads(json.dumps(record_to_dict(record)))) == record
        for part in (record, record.input, record.origin, record.recipe, record.metrics[0], record.metrics[0].measured):
            assert not hasattr(part, "__dict__")
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(part, dataclasses.fields(part)[0].name, "x")
    assert isinstance(record.input.size, tuple) and isinstance(record.metrics, tuple)


def dotted(path: tuple[Any, ...]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


@pytest.mark.parametrize("path", FIELDS, ids=dotted)
def test_missing_field_is_refused_and_named(path: tuple[Any, ...]) -> None:
    with pytest.raises(ManifestError) as caught:
        record_from_dict(at(path, ...))
    assert f"{dotted(path)}: missing" in str(caught.value)
    if path != ("id",):
        assert "record 'resnet_small_ubn.cifar10'" in str(caught.value)


@pytest.mark.parametrize("path", [(), ("input",), ("origin",), ("metrics", 0), ("metrics", 0, "measured")], ids=dotted)
def test_unknown_field_is_refused_and_named(path: tuple[Any, ...]) -> None:
    with pytest.raises(ManifestError, match="'surprise': unknown field; valid: ") as caught:
        record_from_dict(at((*path, "surprise"), 1))
    assert dotted(path) in str(caught.value)


@pytest.mark.parametrize("path", FIELDS, ids=dotted)
@pytest.mark.parametrize("value", [True, None, "", " ", 1.5, [], {}, ["x"], {"x": 1}, "a\nb", "\x1b[2J"], ids=repr)
def test_wrong_types_are_refused_and_named(path: tuple[Any, ...], value: object) -> None:
    numbers = ("value", "crop_pct")
    allowed = (value is None and path in NULLABLE) or (value == 1.5 and path[-1] in numbers and value is not True)
    empty = value == [] and path[-1] in ("metrics", "seeds")
    if allowed or empty:
        assert record_from_dict(at(path, value)).architecture == "resnet_small_ubn"
        return
    with pytest.raises(ManifestError) as caught:
        record_from_dict(at(path, value))
    assert dotted(path) in str(caught.value)


BAD_VALUES: list[tuple[tuple[Any, ...], object]] = [
    (("id",), "resnet_small_ubn.other"),
    (("id",), "resnet_small_ubn"),
    (("architecture",), "ResNet"),
    (("architecture",), "a" * 101),
    (("architecture",), "a.b"),
    (("tag",), "Cifar10"),
    (("tag",), "-x"),
    (("source",), "http"),
    (("repo_id",), "someone/model"),
    (("revision",), "b" * 40),
    (("sha256",), "0" * 63),
    (("sha256",), "0" * 65),
    (("sha256",), "A" * 64),
    (("sha256",), "g" * 64),
    (("sha256",), "0" * 64 + "\n"),
    (("sha256",), "\u0660" * 64),
    (("bytes",), 0),
    (("bytes",), -1),
    (("bytes",), True),
    (("bytes",), 1e6),
    (("bytes",), 899_999),
    (("bytes",), 2**40),
    (("bytes",), 10**400),
    (("params",), 0),
    (("params",), 10**12),
    (("input", "size"), [3, 32]),
    (("input", "size"), [3, 32, 0]),
    (("input", "size"), [3, 32, 10**6]),
    (("input", "size"), [3, 32, 32.0]),
    (("input", "size"), [3, 32, True]),
    (("input", "mean"), [0.5]),
    (("input", "mean"), [0.5, 0.5, "0.5"]),
    (("input", "std"), [0.2, 0.2, 0]),
    (("input", "std"), [0.2, 0.2, float("nan")]),
    (("input", "interpolation"), "cubic"),
    (("input", "crop_mode"), "left"),
    (("input", "crop_pct"), 0),
    (("input", "crop_pct"), float("inf")),
    (("num_classes",), -1),
    (("num_classes",), 10**9),
    (("label_names",), [*"abc"]),
    (("label_names",), [*"abcdefghii"]),
    (("label_names",), [*"abcdefghi", "x\n"]),
    (("label_names",), [*"abcdefghi", 9]),
    (("license",), "see the file"),
    (("recipe", "sha256"), "f" * 40),
    (("metrics",), [{}] * 1001),
    (("metrics", 0, "value"), float("nan")),
    (("metrics", 0, "value"), float("-inf")),
    (("metrics", 0, "value"), "90"),
    (("metrics", 0, "name"), "Top 1"),
    (("metrics", 0, "measured", "seeds"), [-1]),
    (("metrics", 0, "measured", "seeds"), [True]),
    (("metrics", 0, "measured", "commit"), "main"),
    (("description",), "x" * 2001),
    (("description",), "right\u202eto left"),
    (("description",), "\ud800"),
]


@pytest.mark.parametrize(("path", "value"), BAD_VALUES, ids=lambda part: repr(part)[:40])
def test_bad_values_are_refused_with_field_received_and_valid(path: tuple[Any, ...], value: object) -> None:
    with pytest.raises(ManifestError) as caught:
        record_from_dict(at(path, value))
    message = str(caught.value)
    assert dotted(path) in message
    assert "received" in message and "valid" in message
    assert len(message) < 700
    assert message.isprintable()


BAD_FILES = [
    "../model.safetensors",
    "a/../../model.safetensors",
    "/model.safetensors",
    "//host/model.safetensors",
    "a\\model.safetensors",
    "..\\model.safetensors",
    "C:\\model.safetensors",
    "C:model.safetensors",
    "C:/model.safetensors",
    "file:///model.safetensors",
    "https://host/model.safetensors",
    "~/model.safetensors",
    "a//model.safetensors",
    "./model.safetensors",
    "a./model.safetensors",
    "-model.safetensors",
    ".hidden.safetensors",
    "model.safetensors/",
    "model.safetensors\0",
    "model.bin",
    "model.pth",
    "model.safetensors.pkl",
    "model",
    ".safetensors",
    "%2e%2e/model.safetensors",
    "a" * 300 + ".safetensors",
]


@pytest.mark.parametrize("base", [bundled(), hosted()], ids=["bundled", "hub"])
@pytest.mark.parametrize("file", BAD_FILES, ids=lambda file: repr(file)[:40])
def test_paths_that_could_lead_elsewhere_are_refused(base: dict[str, Any], file: str) -> None:
    with pytest.raises(ManifestError, match="file: received"):
        record_from_dict(at(("file",), file, base))


def test_only_hub_files_may_be_in_folders() -> None:
    assert record_from_dict(hosted()).file == "weights/model.safetensors"
    with pytest.raises(ManifestError, match="file: received"):
        record_from_dict(at(("file",), "weights/model.safetensors"))


@pytest.mark.parametrize(
    "repo_id",
    [
        "model",
        "a/b/c",
        "/model",
        "a/",
        "../model",
        "a/..",
        "a/b--c",
        "a b/c",
        "https://x/y",
        "a/b.git",
        "a/" + "b" * 100,
    ],
)
def test_bad_repository_ids_are_refused(repo_id: str) -> None:
    with pytest.raises(ManifestError, match="repo_id: received"):
        record_from_dict(at(("repo_id",), repo_id, hosted()))


@pytest.mark.parametrize("revision", ["main", "v1.0", "b" * 39, "b" * 41, "B" * 40])
def test_revisions_that_are_not_full_commits_are_refused(revision: str) -> None:
    with pytest.raises(ManifestError, match="revision: received"):
        record_from_dict(at(("revision",), revision, hosted()))


@pytest.mark.parametrize("field", ["repo_id", "revision"])
def test_hub_records_need_their_address(field: str) -> None:
    with pytest.raises(ManifestError, match=f"{field}: received None"):
        record_from_dict(at((field,), None, hosted()))


BAD_CONTENT: dict[str, bytes | str] = {
    "nothing": "",
    "no JSON": "{",
    "a list": "[]",
    "no records": '{"schema_version": 1}',
    "more": '{"schema_version": 1, "records": [], "more": 1}',
    "no version": '{"records": []}',
    "newer version": as_text(version=2),
    "true version": as_text(version=True),
    "text version": as_text(version="1"),
    "records no list": '{"schema_version": 1, "records": {}}',
    "record no object": '{"schema_version": 1, "records": [1]}',
    "key twice": '{"schema_version": 1, "schema_version": 1, "records": []}',
    "key twice in a record": as_text(bundled()).replace('"tag"', '"tag": "cifar10", "tag"'),
    "id twice": as_text(bundled(), hosted(), bundled()),
    "NaN": as_text(at(("metrics", 0, "value"), float("nan"))),
    "Infinity": as_text(at(("metrics", 0, "value"), float("inf"))),
    "a number that overflows": as_text(bundled()).replace('"value": 90', '"value": 1e999'),
    "an endless integer": as_text(bundled()).replace('"bytes": 4000000', '"bytes": 4' + "0" * 10_000),
    "deep": "[" * 100_000,
    "not UTF-8": as_text(bundled()).encode().replace(b"small", b"sm\xffll"),
    "UTF-16": as_text().encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf" + as_text().encode(),
    "too many": '{"schema_version": 1, "records": [' + ",".join(["1"] * 10_001) + "]}",
    "too large": as_text() + " " * (4 * 2**20),
}


@pytest.mark.parametrize("content", BAD_CONTENT.values(), ids=BAD_CONTENT.keys())
def test_bad_files_are_refused_and_named(content: bytes | str, tmp_path: Path) -> None:
    path = tmp_path / "weights_manifest.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ManifestError) as caught:
        manifest.load_manifest(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"nowhere\.json: cannot be read: No such file"):
        manifest.load_manifest(tmp_path / "nowhere.json")


def mutated(text: bytes, rng: random.Random) -> bytes:
    """Return the text with a few bytes changed, removed, doubled, or copied from elsewhere in it."""
    content = bytearray(text)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(content))
        stop = min(len(content), start + rng.randint(1, 20))
        match rng.randrange(4):
            case 0:
                content[start] = rng.randrange(256)
            case 1:
                del content[start:stop]
            case 2:
                content[start:start] = content[start:stop]
            case _:
                other = rng.randrange(len(content))
                content[start:stop] = content[other : other + stop - start]
        if not content:
            content = bytearray(b"{")
    return bytes(content)


def test_any_mutation_is_refused_cleanly_or_valid() -> None:
    """Any bytes either raise ManifestError and nothing else, or give records that validate again."""
    rng = random.Random(0)
    text = as_text(bundled(), hosted()).encode()
    refused = 0
    for _ in range(5_000):
        content = mutated(text, rng)
        try:
            found = parse_manifest(content)
        except ManifestError:
            refused += 1
            continue
        assert Manifest(tuple(record_from_dict(record_to_dict(record)) for record in found)) == found
        for record in found:
            assert ".." not in record.file and not record.file.startswith("/")
            assert len(record.sha256) == 64
    assert 3_500 < refused < 5_000


def test_records_made_by_code_are_checked_too() -> None:
    record = record_from_dict(bundled())
    with pytest.raises(ManifestError, match="sha256: received"):
        dataclasses.replace(record, sha256="0" * 40)
    with pytest.raises(ManifestError, match="metrics: received"):
        dataclasses.replace(record, metrics=list(record.metrics))
    with pytest.raises(ManifestError, match="more than one record"):
        Manifest((record, record))


def test_lookup_and_search() -> None:
    small, other = record_from_dict(bundled()), record_from_dict(hosted())
    found = Manifest((small, other))
    assert list(found) == [small, other] and len(found) == 2
    assert found.get("resnet_small_ubn.hosted") == other
    assert found.find() == (small, other)
    assert found.find("*.cifar10") == (small,)
    assert found.find(architecture="resnet_small_ubn", source="hub") == (other,)
    assert found.find(tag="none") == ()
    with pytest.raises(ManifestError, match=r"no record 'resnet_smal_ubn.cifar10'.*similar: resnet_small_ubn.cifar10"):
        found.get("resnet_smal_ubn.cifar10")


def written(path: Path, *records: Record) -> Path:
    manifest.dump_manifest(records, path)
    return path


def test_adding_keeps_order_mode_and_link(tmp_path: Path) -> None:
    small, other = record_from_dict(bundled()), record_from_dict(hosted())
    path = written(tmp_path / "manifest.json", other)
    path.chmod(0o640)
    link = tmp_path / "link.json"
    link.symlink_to("manifest.json")
    assert manifest.add_record(small, link).records == (small, other)
    assert link.is_symlink() and path.stat().st_mode & 0o777 == 0o640
    assert path.read_bytes() == written(tmp_path / "sorted.json", other, small).read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link.json", "manifest.json", "sorted.json"]


def test_adding_twice_needs_replace(tmp_path: Path) -> None:
    small = record_from_dict(bundled())
    path = written(tmp_path / "manifest.json", small)
    before = path.read_bytes()
    changed = dataclasses.replace(small, description="Another.")
    with pytest.raises(ManifestError, match="replace=True"):
        manifest.add_record(changed, path)
    assert path.read_bytes() == before
    assert manifest.add_record(changed, path, replace=True).get(small.id) == changed


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, other = record_from_dict(bundled()), record_from_dict(hosted())
    path = written(tmp_path / "manifest.json", small)

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        manifest.add_record(other, path)
    assert manifest.load_manifest(path).records == (small,)
    assert [entry.name for entry in tmp_path.iterdir()] == ["manifest.json"]


def test_bundled_path_wants_a_bundled_file() -> None:
    with pytest.raises(ManifestError, match="source: received 'hub'"):
        manifest.bundled_path(record_from_dict(hosted()))
    with pytest.raises(FileNotFoundError, match="reinstall ubn-zoo"):
        manifest.bundled_path(record_from_dict(at(("file",), "nowhere.safetensors")))
