"""Mutated weights and manifests: each is refused with the right error, or means exactly what the original does.

`python -m pytest -m exhaustive tests/hub/test_fuzz.py` tries for 30 seconds per test instead of 0.75.
"""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from tests.hub_server import HubServer, sha256
from ubn_zoo import UnifiedBatchNorm2d
from ubn_zoo.hub import fetch as client
from ubn_zoo.hub import manifest
from ubn_zoo.models import CheckpointError
from ubn_zoo.models.weights import check_state_dict, read_checkpoint

FEWEST = 10
REPO = "someone/small"


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), UnifiedBatchNorm2d(4), nn.Conv2d(4, 2, 1))


def mutate(content: bytes, chance: random.Random, prefix: int | None = None) -> bytes:
    """Change a few bytes, cut, insert, repeat or remove; anywhere, or within the first `prefix` bytes."""
    data = bytearray(content)
    limit = len(data) if prefix is None else prefix
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        at = chance.randrange(min(limit, len(data)) or 1)
        match chance.randrange(6):
            case 0:
                data[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                data[at : at + 1] = bytes([(data[at] if data else 0) ^ 1 << chance.randrange(8)])
            case 2:
                del data[chance.randrange(len(data)) :]
            case 3:
                data[at:at] = chance.randbytes(chance.randrange(1, 9))
            case 4:
                data[at:at] = data[at : at + chance.randrange(1, 33)]
            case 5:
                del data[at : at + chance.randrange(1, 33)]
        if not data:
            break
    return bytes(data)


@pytest.fixture(params=[0.75, pytest.param(30.0, marks=pytest.mark.exhaustive)], ids=["short", "long"])
def repeat(request: pytest.FixtureRequest) -> Callable[[Callable[[], None]], None]:
    """Repeat an attempt for so many seconds. The mutations are always the same; how many fit depends on the machine."""

    def run(attempt: Callable[[], None]) -> None:
        end, done = time.monotonic() + request.param, 0
        while time.monotonic() < end or done < FEWEST:
            attempt()
            done += 1

    return run


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return set(found) == set(expected) and all(torch.equal(found[key], expected[key]) for key in expected)


def test_mutated_files_are_refused_by_their_hash(
    hub: HubServer, tmp_path: Path, repeat: Callable[[Callable[[], None]], None]
) -> None:
    """Every byte counts: nothing but the recorded file is returned, whatever the network delivers."""
    weights, chance = model().state_dict(), random.Random(1)
    content = safetensors.torch.save(weights)
    number = 0

    def attempt() -> None:
        nonlocal number
        number += 1
        spoiled = mutate(content, chance)
        revision = hub.create(REPO, {"model.safetensors": spoiled})
        try:
            path = client.fetch(
                REPO, "model.safetensors", revision=revision, sha256=sha256(content), cache_dir=tmp_path / str(number)
            )
        except client.ChecksumError:
            assert spoiled != content
        else:
            assert same(read_checkpoint(path), weights)

    repeat(attempt)


@pytest.mark.parametrize("part", ["header", "anywhere"])
def test_mutated_safetensors_are_refused_or_hold_weights_that_fit(
    tmp_path: Path, part: str, repeat: Callable[[Callable[[], None]], None]
) -> None:
    """Without a hash: one kind of error for all damage, and never tensors that do not fit the model.

    Only the hash reveals changed numbers inside a tensor; the test above covers that.
    """
    original = model()
    content, chance = safetensors.torch.save(original.state_dict()), random.Random(2)
    header = 8 + int.from_bytes(content[:8], "little")
    expected = original.state_dict()
    path = tmp_path / "model.safetensors"
    refused = 0

    def attempt() -> None:
        nonlocal refused
        spoiled = mutate(content, chance, header if part == "header" else None)
        path.write_bytes(spoiled)
        try:
            state = read_checkpoint(path)
            check_state_dict(state, original, "the file", "the model")
        except CheckpointError:
            refused += 1
            assert spoiled != content
            return
        shapes = {key: (tensor.shape, tensor.dtype) for key, tensor in state.items()}
        assert shapes == {key: (tensor.shape, tensor.dtype) for key, tensor in expected.items()}
        assert all(torch.isfinite(tensor).all() for tensor in state.values())

    repeat(attempt)
    assert refused > 0


RECORD: dict[str, Any] = {
    "id": "resnet18_ubn.some",
    "architecture": "resnet18_ubn",
    "tag": "some",
    "source": "hub",
    "repo_id": REPO,
    "revision": "0123456789abcdef" * 2 + "01234567",
    "file": "model.safetensors",
    "sha256": "a" * 64,
    "bytes": 5000,
    "params": 1000,
    "input": {
        "size": [3, 32, 32],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.2, 0.2, 0.2],
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
    },
    "num_classes": 10,
    "label_names": [*"abcdefghij"],
    "license": "apache-2.0",
    "origin": {"data": "CIFAR-10", "trained": "by a command"},
    "recipe": {"name": "recipe.yaml", "sha256": "b" * 64},
    "metrics": [
        {
            "name": "top1",
            "value": 90.5,
            "dataset": "CIFAR-10",
            "split": "test",
            "measured": {"command": "a command", "seeds": [0, 1], "commit": "1" * 40},
        }
    ],
    "description": "For tests.",
}
NASTY: list[Any] = [
    *(None, True, -1, 0, 1e400, float("nan"), 2**70),
    *("", " ", "x" * 3000, "\x00", "a\nb", "..", "main", "A" * 40, "g" * 64),
    *("../../etc/passwd", "/etc/passwd", "C:\\x.safetensors", "a//b", "model.safetensors/.."),
    *("file:///etc/passwd", "http://x/y.safetensors", "model.pth", "owner/name/more", "-x/y", "x/.git"),
    *([], {}, [[]], [1e9] * 5, {"a": 1}, ["x"] * 2000),
]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a JSON value with every key or index in it."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in [(value, key), *places(value[key])]]


def harmless(record: manifest.Record) -> bool:
    """Check, independently of the manifest's code, that a record leads to weights and not out of the cache."""
    texts = [record.id, record.architecture, record.tag, record.file, str(record.repo_id), record.description]
    return (
        record.file.endswith(".safetensors")
        and not record.file.startswith("/")
        and not {"", ".", ".."} & set(record.file.split("/"))
        and all(text.isprintable() and "\\" not in text and "://" not in text for text in texts[:5])
        and len(record.sha256) == 64
        and set(record.sha256) <= set("0123456789abcdef")
        and str(record.repo_id).count("/") == 1
        and ".." not in str(record.repo_id)
        and len(str(record.revision)) == 40
        and set(str(record.revision)) <= set("0123456789abcdef")
        and 0 < record.params <= record.bytes <= 2**34
    )


def test_mutated_manifests_are_refused_or_harmless(repeat: Callable[[Callable[[], None]], None]) -> None:
    """Fields changed, removed, added or repeated, bytes changed: the result is a valid record or a ManifestError."""
    chance = random.Random(3)
    text = json.dumps({"schema_version": 1, "records": [RECORD]})
    (original,) = manifest.parse_manifest(text)
    refused = 0

    def attempt() -> None:
        nonlocal refused
        data = json.loads(text)
        if chance.random() < 0.3:
            content = mutate(text.encode(), chance)
        else:
            container, key = chance.choice(places(data))
            match chance.randrange(5):
                case 0 | 1 | 2:
                    container[key] = copy.deepcopy(chance.choice(NASTY))
                case 3:
                    del container[key]
                case 4 if isinstance(container, dict):
                    container[chance.choice(["url", "__class__", "revison", ""])] = "x"
                case _:
                    container.append(copy.deepcopy(container[key]))
            content = json.dumps(data).encode()
        try:
            records = list(manifest.parse_manifest(content))
        except manifest.ManifestError as error:
            refused += 1
            assert len(str(error)) < 2000
            return
        for record in records:
            assert harmless(record)
            assert record == original or manifest.record_to_dict(record) != RECORD

    repeat(attempt)
    assert refused > 0
