"""Training and held-out images for every kind of data: labels, order, random numbers, ranks, invalid data."""

from __future__ import annotations

import dataclasses
import http.server
import importlib.util
import io
import itertools
import json
import logging
import shutil
import tarfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import pytest
import timm.data
import torch
from PIL import Image
from torch import Tensor

from tests.images import RECIPE, write_image
from ubn_zoo.data.loaders import class_names, describe, open_eval, open_train
from ubn_zoo.errors import DataError
from ubn_zoo.recipes.schema import Recipe
from ubn_zoo.utils.distributed import Ranks

if TYPE_CHECKING:
    from ubn_zoo.data.loaders import EvalBatches, TrainBatches

# timm's order puts 2 before 10, unlike plain string order.
CLASSES = ("a1", "a2", "a10")
TRAIN, TEST = 22, 11
SIDE = 12
RANDOM_ACCESS = ("folder", "tar", "tars", "memory", "hfds")
STREAMS = ("wds", "braces", "hfids")
KINDS = (*RANDOM_ACCESS, *STREAMS)

PLAIN = dataclasses.replace(
    RECIPE, dataset="folder", crop="rrc", img_size=SIDE, num_classes=3, batch_size=8, hflip=0.5, crop_padding=0
)
AUGMENTED = dataclasses.replace(
    PLAIN, auto_augment="rand-m5-n2-mstd0.5", color_jitter=0.3, train_interpolation="random"
)


def pixels(number: int) -> numpy.ndarray:
    """A single-color image that encodes its number; crops and flips do not change it."""
    return numpy.full((SIDE, SIDE, 3), (7 * number, 255 - 7 * number, 9), dtype=numpy.uint8)


def numbers(images: Tensor) -> list[int]:
    """Numbers of the images in a normalized batch."""
    values = (images * 0.25 + 0.5).mean((2, 3)) * 255
    assert torch.allclose(values[:, 0] + values[:, 1], torch.tensor(255.0), atol=0.1)
    found = [round(float(value)) for value in values[:, 0] / 7]
    assert torch.allclose(values[:, 0], 7.0 * torch.tensor(found), atol=0.1)
    return found


def noise(number: int) -> numpy.ndarray:
    random = numpy.random.default_rng(number)
    return random.integers(0, 256, (SIDE + 4, SIDE + 4, 3), dtype=numpy.uint8)


def encoded(array: numpy.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


def split_numbers(split: str) -> range:
    return range(TRAIN) if split == "train" else range(TEST)


def write_folder(root: Path, draw: Callable[[int], numpy.ndarray]) -> Path:
    for split in ("train", "test"):
        for number in split_numbers(split):
            write_image(root / split / CLASSES[number % 3] / f"{number}.png", draw(number))
    return root


def write_tar(root: Path, draw: Callable[[int], numpy.ndarray]) -> Path:
    source = write_folder(root / "source", draw)
    for split in ("train", "test"):
        with tarfile.open(root / f"{split}.tar", "w") as archive:
            archive.add(source / split, ".")
    shutil.rmtree(source)
    return root


def write_tars(root: Path, draw: Callable[[int], numpy.ndarray]) -> Path:
    """One tar per class, created inside the class folder, so that names begin with ``./``."""
    write_folder(root, draw)
    for split in ("train", "test"):
        for name in CLASSES:
            with tarfile.open(root / split / f"{name}.tar", "w") as archive:
                archive.add(root / split / name, ".")
            shutil.rmtree(root / split / name)
    return root


def write_shards(root: Path, draw: Callable[[int], numpy.ndarray]) -> Path:
    wds = pytest.importorskip("webdataset")
    root.mkdir(parents=True)
    splits: dict[str, Any] = {}
    for split in ("train", "test"):
        chosen = list(split_numbers(split))
        names, lengths = [], []
        for shard in range(2):
            part = chosen[shard::2]
            names.append(f"{split}-{shard:04d}.tar")
            lengths.append(len(part))
            with wds.TarWriter(str(root / names[-1])) as writer:
                for number in part:
                    writer.write({"__key__": f"{number:03d}", "png": encoded(draw(number)), "cls": str(number % 3)})
        splits[split] = {
            "name": split,
            "filenames": names,
            "shard_lengths": lengths,
            "num_samples": len(chosen),
        }
    (root / "_info.json").write_text(json.dumps({"splits": splits}), encoding="utf-8")
    return root


def write_parquet(root: Path, draw: Callable[[int], numpy.ndarray]) -> Path:
    datasets = pytest.importorskip("datasets")
    # It sleeps for five seconds whenever reader threads of a stream end, in case the interpreter is exiting.
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.05
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    for split in ("train", "test"):
        chosen = list(split_numbers(split))
        for shard in range(2):
            part = chosen[shard::2]
            rows = {
                "image": [{"bytes": encoded(draw(number)), "path": None} for number in part],
                "label": [number % 3 for number in part],
            }
            path = root / "set" / "data" / f"{split}-{shard:05d}-of-00002.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return root


WRITERS: dict[str, Callable[[Path, Callable[[int], numpy.ndarray]], Path]] = {
    "folder": write_folder,
    "memory": write_folder,
    "tar": write_tar,
    "tars": write_tars,
    "hfds": write_parquet,
    "hfids": write_parquet,
    "wds": write_shards,
    "braces": write_shards,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "folder": {},
    "tar": {},
    "tars": {},
    "memory": {"dataset": "memory", "crop": "pad", "auto_augment": None, "color_jitter": 0.0},
    "hfds": {"dataset": "hfds/set"},
    "hfids": {"dataset": "hfids/set", "train_samples": TRAIN},
    "wds": {"dataset": "wds", "test_split": "test"},
    "braces": {
        "dataset": "wds",
        "train_split": "train-{0000..0001}.tar",
        "test_split": "test-{0000..0001}.tar",
        "train_samples": TRAIN,
    },
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[int], numpy.ndarray]], Path]:
    """Datasets by kind, written on first use."""
    made: dict[tuple[Any, Any], Path] = {}

    def get(kind: str, draw: Callable[[int], numpy.ndarray]) -> Path:
        key = (WRITERS[kind], draw)
        if key not in made:
            made[key] = WRITERS[kind](tmp_path_factory.mktemp(kind) / "data", draw)
        return made[key]

    return get


Written = Callable[[str, Callable[[int], numpy.ndarray]], Path]


def recipe_of(kind: str, base: Recipe = PLAIN, **changes: Any) -> Recipe:
    settings = dict(SETTINGS[kind])
    if base is AUGMENTED and kind == "memory":
        settings["train_interpolation"] = None
    return dataclasses.replace(base, **{**settings, **changes})


def epoch_of(train: TrainBatches, epoch: int = 0, first_step: int = 0) -> list[tuple[Tensor, Tensor]]:
    return list(train.epoch(epoch, first_step))


def assert_same(found: list[tuple[Tensor, Tensor]], expected: list[tuple[Tensor, Tensor]]) -> None:
    assert len(found) == len(expected) > 0
    for (images, labels), (other, other_labels) in zip(found, expected, strict=True):
        assert torch.equal(images, other)
        assert torch.equal(labels, other_labels)


def differ(found: list[tuple[Tensor, Tensor]], expected: list[tuple[Tensor, Tensor]]) -> bool:
    return any(not torch.equal(a, b) for (a, _), (b, _) in zip(found, expected, strict=True))


def read(batches: EvalBatches) -> list[tuple[int, int]]:
    """Number and label of every held-out image of a rank."""
    return [pair for images, labels in batches for pair in zip(numbers(images), labels.tolist(), strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_training_images_appear_once_with_their_labels(kind: str, written: Written) -> None:
    train = open_train(recipe_of(kind), written(kind, pixels), Ranks())
    assert train.steps == TRAIN // 8
    assert train.classes == (() if kind in ("wds", "braces") else CLASSES)
    orders = []
    for epoch in range(2):
        batches = epoch_of(train, epoch)
        assert [len(labels) for _, labels in batches] == [8, 8]
        assert all(images.dtype == torch.float32 and images.shape[1:] == (3, SIDE, SIDE) for images, _ in batches)
        order = [number for images, _ in batches for number in numbers(images)]
        assert len(set(order)) == 16
        assert set(order) <= set(range(TRAIN))
        assert [number % 3 for number in order] == [int(label) for _, labels in batches for label in labels]
        orders.append(order)
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_held_out_images_are_read_once_over_all_ranks(kind: str, count: int, written: Written) -> None:
    recipe, root = recipe_of(kind), written(kind, pixels)
    ranks = [open_eval(recipe, root, Ranks(rank, count), CLASSES, batch_size=2) for rank in range(count)]
    pairs = [read(test) for test in ranks]
    assert sorted(itertools.chain(*pairs)) == [(number, number % 3) for number in range(TEST)]
    assert max(map(len, pairs)) - min(map(len, pairs)) <= 2
    # For streams, the number is in the description or unknown.
    assert {test.images for test in ranks} <= {TEST, None}
    assert ranks[0].images == TEST or kind in ("braces", "hfids")
    # A second pass returns the same images.
    assert read(ranks[0]) == pairs[0]
    # Equal on all ranks, because one rank measures for all.
    probes = [numbers(test.probe(4)) for test in ranks]
    assert len(set(probes[0])) == len(probes[0]) == 4
    assert all(probe == probes[0] for probe in probes)
    assert sorted(numbers(ranks[0].probe(100))) == list(range(TEST))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("wds", "braces")])
def test_held_out_labels_match_training_labels(kind: str, written: Written) -> None:
    order = ("zebra", "a10", "a2", "a1")
    settings = recipe_of(kind, num_classes=4, test_split="test")
    test = open_eval(settings, written(kind, pixels), Ranks(), order)
    assert sorted(read(test)) == [(number, order.index(CLASSES[number % 3])) for number in range(TEST)]
    assert test.classes == order
    with pytest.raises(DataError, match=r"unknown classes: a2, a10; valid: a1, b$"):
        open_eval(settings, written(kind, pixels), Ranks(), ("a1", "b"))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["wds", "hfids"])
def test_workers_split_a_stream(kind: str, workers: int, written: Written) -> None:
    # Each worker reads a whole number of batches per epoch; here, this covers each image exactly once.
    recipe = recipe_of(kind, workers=workers, batch_size=11, test_split="test")
    train = open_train(recipe, written(kind, pixels), Ranks())
    order = [number for images, _ in epoch_of(train) for number in numbers(images)]
    assert sorted(order) == list(range(TRAIN))
    test = open_eval(recipe, written(kind, pixels), Ranks(), CLASSES, batch_size=2)
    assert sorted(read(test)) == [(number, number % 3) for number in range(TEST)]
    assert len(test.probe(3)) == 3


@pytest.mark.parametrize("kind", ["folder", "tar", "tars", "hfds"])
def test_batches_do_not_depend_on_workers(kind: str, written: Written) -> None:
    root = written(kind, noise)
    expected: list[list[tuple[Tensor, Tensor]]] = []
    for workers in (0, 1, 2):
        recipe = recipe_of(kind, AUGMENTED, workers=workers)
        train, test = open_train(recipe, root, Ranks()), open_eval(recipe, root, Ranks(), CLASSES, batch_size=4)
        # Probe first: workers that start later must not inherit its open files.
        probe = (test.probe(5), torch.zeros(5, dtype=torch.int64))
        found = [epoch_of(train, 0), epoch_of(train, 1), list(test), [probe]]
        for batches, others in zip(found, expected, strict=False):
            assert_same(batches, others)
        expected = expected or found


@pytest.mark.parametrize("kind", KINDS)
def test_random_numbers_depend_on_seed_and_epoch(kind: str, written: Written) -> None:
    root = written(kind, noise)
    train = open_train(recipe_of(kind, AUGMENTED), root, Ranks())
    first, second = epoch_of(train, 0), epoch_of(train, 1)
    assert differ(first, second)
    other = open_train(recipe_of(kind, AUGMENTED, seed=4), root, Ranks())
    assert differ(first, epoch_of(other, 0))
    again = open_train(recipe_of(kind, AUGMENTED), root, Ranks())
    assert_same(epoch_of(again, 1), second)
    assert_same(epoch_of(again, 0), first)
    assert again.fingerprint == train.fingerprint


@pytest.mark.parametrize(("kind", "workers"), [(kind, 0) for kind in KINDS] + [("folder", 2), ("wds", 2), ("hfids", 2)])
def test_an_epoch_can_resume_at_any_update(kind: str, workers: int, written: Written) -> None:
    recipe = recipe_of(kind, AUGMENTED, workers=workers, batch_size=6, accumulation=2)
    train = open_train(recipe, written(kind, noise), Ranks())
    whole = epoch_of(train, 1)
    assert len(whole) == 6
    # After an early stop, batches that workers have prefetched must not appear later.
    begun = train.epoch(1)
    next(begun)
    begun.close()
    assert_same(epoch_of(train, 1, first_step=1), whole[2:])
    later = open_train(recipe, written(kind, noise), Ranks())
    assert_same(epoch_of(later, 1, first_step=2), whole[4:])
    assert epoch_of(later, 1, first_step=3) == []


@pytest.mark.parametrize("kind", RANDOM_ACCESS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_parts_of_ranks_form_the_batch_of_one_process(kind: str, accumulation: int, written: Written) -> None:
    root = written(kind, noise)
    whole = epoch_of(open_train(recipe_of(kind, AUGMENTED), root, Ranks()))
    recipe = recipe_of(kind, AUGMENTED, accumulation=accumulation)
    shares = [epoch_of(open_train(recipe, root, Ranks(rank, 2))) for rank in range(2)]
    assert {len(labels) for share in shares for _, labels in share} == {4 // accumulation}
    joined = []
    for step in range(len(whole)):
        parts = [part for share in shares for part in share[step * accumulation : (step + 1) * accumulation]]
        joined.append((torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])))
    assert_same(joined, whole)


@pytest.mark.parametrize("kind", STREAMS)
def test_ranks_split_a_stream(kind: str, written: Written) -> None:
    recipe = recipe_of(kind, batch_size=4, accumulation=2)
    shares = [epoch_of(open_train(recipe, written(kind, pixels), Ranks(rank, 2))) for rank in range(2)]
    assert all(len(share) == 10 and all(len(labels) == 1 for _, labels in share) for share in shares)
    seen = [number for share in shares for images, _ in share for number in numbers(images)]
    assert len(set(seen)) == len(seen) == 20


@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_repeated_copies_differ_and_go_to_different_ranks(kind: str, written: Written) -> None:
    plain = recipe_of(kind, repeats=2)
    for step in range(2):
        shares = [epoch_of(open_train(plain, written(kind, pixels), Ranks(rank, 2)))[step] for rank in range(2)]
        shown = [numbers(images) for images, _ in shares]
        assert shown[0] == shown[1]
        assert len(set(shown[0])) == 4
    augmented = recipe_of(kind, AUGMENTED, repeats=2, crop_padding=2)
    root = written(kind, noise)
    (images, labels), *_ = epoch_of(open_train(augmented, root, Ranks()))
    assert torch.equal(labels[::2], labels[1::2])
    equal = sum(torch.equal(one, other) for one, other in zip(images[::2], images[1::2], strict=True))
    assert equal <= 1  # two copies may be equal by chance
    shares = [epoch_of(open_train(augmented, root, Ranks(rank, 2)))[0] for rank in range(2)]
    assert torch.equal(torch.stack([part for part, _ in shares], 1).flatten(0, 1), images)


@pytest.mark.parametrize("kind", RANDOM_ACCESS)
def test_a_subset_of_images_covers_all_classes(kind: str, written: Written) -> None:
    recipe = recipe_of(kind, batch_size=3, train_samples=9, test_samples=6)
    train = open_train(recipe, written(kind, pixels), Ranks())
    seen = [number for epoch in range(2) for images, _ in epoch_of(train, epoch) for number in numbers(images)]
    assert train.steps == 3
    assert sorted(seen[:9]) == sorted(seen[9:])
    tests = [open_eval(recipe, written(kind, pixels), Ranks(rank, 2), CLASSES) for rank in range(2)]
    found = read(tests[0]) + read(tests[1])
    assert tests[0].images == len(set(found)) == 6
    if kind != "hfds":  # its images are in file order
        assert {number % 3 for number in seen} == {label for _, label in found} == {0, 1, 2}
    whole = open_train(recipe_of(kind), written(kind, pixels), Ranks())
    assert whole.fingerprint != train.fingerprint


@pytest.mark.parametrize("kind", ["wds", "hfids"])
def test_a_subset_of_a_stream_is_its_beginning(kind: str, written: Written) -> None:
    recipe = recipe_of(kind, batch_size=4, train_samples=9, test_samples=5, test_split="test")
    assert open_train(recipe, written(kind, pixels), Ranks()).steps == 2
    for count in (1, 2):
        tests = [open_eval(recipe, written(kind, pixels), Ranks(rank, count), batch_size=2) for rank in range(count)]
        found = sorted(itertools.chain(*map(read, tests)))
        assert len(set(found)) == len(found) == tests[0].images == 5


def test_samples_limit_the_images_of_a_stream(written: Written) -> None:
    for kind in ("wds", "hfids"):
        recipe = recipe_of(kind, test_samples=TEST + 5, test_split="test")
        assert len(read(open_eval(recipe, written(kind, pixels), Ranks()))) == TEST
    train = open_train(recipe_of("wds", train_samples=TRAIN + 50), written("wds", pixels), Ranks())
    assert train.steps == TRAIN // 8


def test_a_damaged_image_in_a_shard_is_skipped_in_training_and_an_error_in_evaluation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def draw(number: int) -> numpy.ndarray:
        return pixels(number)

    root = write_shards(tmp_path / "data", draw)
    for split in ("train", "test"):
        content = (root / f"{split}-0000.tar").read_bytes()
        start = content.index(b"\x89PNG")
        (root / f"{split}-0000.tar").write_bytes(content[: start + 8] + b"damage" + content[start + 14 :])
    recipe = recipe_of("wds")
    with caplog.at_level(logging.WARNING):
        seen = [n for images, _ in epoch_of(open_train(recipe, root, Ranks())) for n in numbers(images)]
    assert 0 not in seen
    assert "Ignoring" in caplog.text
    with pytest.raises(DataError, match=r"test has 10 readable images, but its description says 11"):
        list(open_eval(recipe, root, Ranks()))


def test_shards_are_read_from_a_url(written: Written) -> None:
    if shutil.which("curl") is None:
        pytest.skip("webdataset reads URLs with curl, which is not installed")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

    root = written("wds", pixels)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            address = f"http://127.0.0.1:{server.server_port}"
            recipe = recipe_of("wds", test_split=None)
            assert_same(epoch_of(open_train(recipe, address, Ranks())), epoch_of(open_train(recipe, root, Ranks())))
            assert sorted(read(open_eval(recipe, address, Ranks()))) == [(n, n % 3) for n in range(TEST)]
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("size", "crop_pct", "interpolation", "crop_mode"),
    [(24, 0.875, "bicubic", None), (20, 1.0, "bilinear", "center"), (24, 0.9, "bicubic", "squash")],
)
def test_preprocessing_of_held_out_images_matches_timm(
    tmp_path: Path, size: int, crop_pct: float, interpolation: str, crop_mode: str | None
) -> None:
    random = numpy.random.default_rng(0)
    files = [tmp_path / "val" / "a" / "1.jpg", tmp_path / "val" / "a" / "2.png", tmp_path / "val" / "b" / "1.webp"]
    for path, shape in zip(files, ((40, 57, 3), (50, 31), (30, 30, 3)), strict=True):
        write_image(path, random.integers(0, 256, shape, dtype=numpy.uint8))
    recipe = dataclasses.replace(
        PLAIN, img_size=32, test_img_size=size, crop_pct=crop_pct, interpolation=interpolation, mean=(0.485, 0.456, 0.4)
    )
    (images, labels), *rest = open_eval(recipe, tmp_path, Ranks(), crop_mode=crop_mode)
    assert (labels.tolist(), rest) == ([0, 0, 1], [])
    transform = timm.data.create_transform(
        (3, size, size),
        interpolation=interpolation,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        mean=recipe.mean,
        std=recipe.std,
    )
    expected = []
    for path in files:
        with Image.open(path) as image:
            expected.append(transform(image.convert("RGB")))
    torch.testing.assert_close(images, torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_small_images_from_memory_match_those_from_a_folder(written: Written) -> None:
    recipe = recipe_of("folder", img_size=16)
    root = written("folder", noise)
    for (images, labels), (other, other_labels) in zip(
        open_eval(recipe, root, Ranks()), open_eval(recipe_of("memory", img_size=16), root, Ranks()), strict=True
    ):
        assert torch.equal(labels, other_labels)
        torch.testing.assert_close(images, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "workers"),
    [*((kind, 0) for kind in ("folder", "tar", "tars", "memory", "hfds", "hfids")), ("folder", 2), ("hfids", 2)],
)
def test_an_unreadable_image_is_named(kind: str, workers: int, tmp_path: Path) -> None:
    if kind == "hfids":
        damaged = write_parquet(tmp_path, lambda number: noise(number))
        # Damage the bytes of one image within the file without changing its length.
        for path in damaged.rglob("test-*.parquet"):
            path.unlink()
        import datasets

        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
        rows = {"image": [{"bytes": b"no picture", "path": None}], "label": [0]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(damaged / "set/data/test-00000.parquet"))
        match = r"set, test, image 0 of worker 0: "
    elif kind == "hfds":
        damaged = tmp_path
        for split in ("train", "test"):
            write_image(tmp_path / "set" / split / "a1" / "1.png", noise(1))
        (tmp_path / "set" / "test" / "a1" / "1.png").write_bytes(encoded(noise(1))[:200])
        match = r"set/test/a1/1\.png: not a readable image \(.*\); repair or remove it"
    else:
        write_folder(tmp_path, noise)
        (tmp_path / "test" / "a2" / "4.png").write_bytes(encoded(noise(4))[:200])
        if kind != "folder":
            WRITERS_OF_TEST[kind](tmp_path)
        damaged = tmp_path
        name = {"folder": r"test/a2/4\.png", "memory": r"test/a2/4\.png", "tar": r"test\.tar:a2/4\.png"}
        match = name.get(kind, r"test:a2\.tar:4\.png") + r": not a readable image \(.*\); repair or remove it"
    with pytest.raises(DataError, match=match) as raised:
        list(open_eval(recipe_of(kind, workers=workers, test_split="test"), damaged, Ranks()))
    assert "\n" not in str(raised.value)


def tar_test_split(root: Path) -> None:
    with tarfile.open(root / "test.tar", "w") as archive:
        for path in sorted((root / "test").rglob("*.png")):
            archive.add(path, str(path.relative_to(root / "test")))
    shutil.rmtree(root / "test")


def tar_test_classes(root: Path) -> None:
    for name in CLASSES:
        with tarfile.open(root / "test" / f"{name}.tar", "w") as archive:
            for path in sorted((root / "test" / name).iterdir()):
                archive.add(path, path.name)
        shutil.rmtree(root / "test" / name)


WRITERS_OF_TEST: dict[str, Callable[[Path], None]] = {
    "tar": tar_test_split,
    "tars": tar_test_classes,
    "memory": lambda root: None,
}


def test_an_unreadable_training_image_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, noise)
    (tmp_path / "train" / "a1" / "0.png").write_bytes(b"")
    for workers in (0, 2):
        train = open_train(recipe_of("folder", workers=workers, batch_size=22), tmp_path, Ranks())
        with pytest.raises(
            DataError, match=r"train/a1/0\.png: not a readable image \(.*\); repair or remove it"
        ) as raised:
            epoch_of(train)
        assert str(raised.value).startswith(str(tmp_path))
        assert "\n" not in str(raised.value)


def test_unusable_folders_raise_clear_errors(tmp_path: Path) -> None:
    for kind in ("folder", "memory"):
        with pytest.raises(DataError, match=r"train"):
            open_train(recipe_of(kind), tmp_path / "absent", Ranks())
    with pytest.raises(DataError, match=r"absent has none of validation, val, test; it needs one of them"):
        open_eval(PLAIN, tmp_path / "absent", Ranks())
    for kind in ("folder", "memory"):
        root = tmp_path / kind
        (root / "train").mkdir(parents=True)
        with pytest.raises(DataError, match=r"train.* has no images"):
            open_train(recipe_of(kind), root, Ranks())
        write_image(root / "train" / "1.png", pixels(1))
        with pytest.raises(DataError, match=r"train/1\.png is not in a class folder; valid: .*/CLASS/1"):
            open_train(recipe_of(kind), root, Ranks())
        (root / "train" / "1.png").unlink()
        write_image(root / "train" / "a" / "b" / "1.png", pixels(1))
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        archive.add(tmp_path / "folder", "folder", filter=lambda entry: entry if entry.isdir() else None)
    with pytest.raises(DataError, match=r"train\.tar: no usable images"):
        open_train(PLAIN, tmp_path, Ranks())
    (tmp_path / "train.tar").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"train\.tar: no usable images"):
        open_train(PLAIN, tmp_path, Ranks())
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        archive.add(tmp_path / "folder" / "train" / "a" / "b" / "1.png", "1.png")
    with pytest.raises(DataError, match=r"1\.png is not in a class folder; valid: CLASS/1\.png"):
        open_train(PLAIN, tmp_path, Ranks())


@pytest.mark.parametrize("kind", ["folder", "memory", "tar"])
def test_hidden_and_other_files_are_skipped(kind: str, tmp_path: Path) -> None:
    write_folder(tmp_path, pixels)
    for name in (
        ".DS_Store",
        "a1/._0.png",
        ".ipynb_checkpoints/0.png",
        "a1/.thumbs/0.png",
        "a1/notes.txt",
        "Readme.md",
    ):
        path = tmp_path / "test" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no picture")
    if kind == "tar":
        with tarfile.open(tmp_path / "test.tar", "w") as archive:
            archive.add(tmp_path / "test", ".")
        shutil.rmtree(tmp_path / "test")
    test = open_eval(recipe_of(kind), tmp_path, Ranks())
    assert (test.images, test.classes) == (TEST, CLASSES)
    assert sorted(read(test)) == [(number, number % 3) for number in range(TEST)]


def test_names_that_tie_in_timms_order_are_sorted(tmp_path: Path) -> None:
    for name in ("1", "01", "B", "b", "c"):
        write_image(tmp_path / "test" / name / "1.png", pixels(1))
        write_image(tmp_path / "test" / name / "01.png", pixels(2))
    folder, memory = open_eval(PLAIN, tmp_path, Ranks()), open_eval(recipe_of("memory"), tmp_path, Ranks())
    assert folder.classes == memory.classes == ("01", "1", "B", "b", "c")
    settings = dataclasses.replace(PLAIN, num_classes=5)
    assert read(open_eval(settings, tmp_path, Ranks())) == read(memory) == [(n, c) for c in range(5) for n in (2, 1)]


def test_impossible_batches_raise_clear_errors(written: Written) -> None:
    for kind in KINDS:
        root = written(kind, pixels)
        with pytest.raises(DataError, match=r"batch_size: received 8; valid: a multiple of 6, .* 3 ranks in 2 parts"):
            open_train(recipe_of(kind, accumulation=2), root, Ranks(0, 3))
        with pytest.raises(DataError, match=r"received 22 training images; valid: at least one batch of 24; lower"):
            open_train(recipe_of(kind, batch_size=24), root, Ranks())


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
def test_unusable_streams_raise_clear_errors(written: Written, tmp_path: Path) -> None:
    shards, parquet = written("wds", pixels), written("hfids", pixels)
    with pytest.raises(DataError, match=r"2 shards for 4 workers in total; valid: .* at most 1 workers with 2"):
        open_train(recipe_of("wds", workers=2), shards, Ranks(0, 2))
    with pytest.raises(DataError, match=r"split validation not found"):
        open_eval(recipe_of("wds", test_split="validation"), shards, Ranks())
    with pytest.raises(DataError, match=r"train_samples, test_samples"):
        open_train(recipe_of("braces", train_samples=None), shards, Ranks())
    with pytest.raises(DataError, match=r"train_samples, test_samples"):
        # New files, because `datasets` may remember the number of images in files that it has read before.
        open_train(recipe_of("hfids", train_samples=None), write_parquet(tmp_path / "new", pixels), Ranks())
    with pytest.raises(DataError, match=r"has none of validation, val, test; it needs one of them, or set test_split"):
        open_eval(recipe_of("wds", test_split=None), tmp_path, Ranks())
    train = open_train(recipe_of("hfids", workers=3, batch_size=6), parquet, Ranks())
    with pytest.raises(DataError, match=r"set, train, image 0 of worker \d: .*2 shard\(s\).*3 workers") as raised:
        epoch_of(train)
    assert "\n" not in str(raised.value)
    for kind in ("hfds", "hfids"):
        with pytest.raises(DataError, match="absent"):
            open_train(recipe_of(kind, dataset=f"{kind}/./absent"), parquet, Ranks())
    assert open_eval(recipe_of("hfds"), parquet, Ranks()).images == TEST


@pytest.mark.parametrize(("kind", "package"), [("wds", "webdataset"), ("hfds", "datasets"), ("hfids", "datasets")])
def test_a_missing_package_is_named(kind: str, package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = importlib.util.find_spec

    def find(name: str, *arguments: Any) -> Any:
        return None if name == package else found(name, *arguments)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    for opened in (open_train, open_eval):
        with pytest.raises(
            DataError, match=rf"dataset {kind} needs the package {package}: pip install 'ubn-zoo\[stream"
        ):
            opened(recipe_of(kind), tmp_path, Ranks())


@pytest.mark.parametrize("kind", ["folder", "hfds", "wds", "hfids"])
def test_a_label_out_of_range_is_named(kind: str, written: Written) -> None:
    with pytest.raises(DataError, match=r"received label 2; valid: 0 to 1; see num_classes"):
        epoch_of(open_train(recipe_of(kind, num_classes=2, batch_size=22), written(kind, pixels), Ranks()))


def test_images_in_memory_must_be_square(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_image(tmp_path / split / "a" / "1.png", numpy.zeros((4, 6, 3), numpy.uint8))
    for opened in (open_train, open_eval):
        with pytest.raises(DataError, match="received images of 6x4 pixels; valid: square ones, or dataset folder"):
            opened(recipe_of("memory"), tmp_path, Ranks())


def test_loading_does_not_change_the_global_random_state(written: Written) -> None:
    recipe = recipe_of("folder", AUGMENTED, workers=1)
    train, test = (opened(recipe, written("folder", noise), Ranks()) for opened in (open_train, open_eval))
    before = torch.get_rng_state()
    epoch_of(train)
    list(test)
    test.probe(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_runs_record_distinguishes_datasets(tmp_path: Path, written: Written) -> None:
    recipe = recipe_of("folder")
    root = written("folder", pixels)
    train, test = open_train(recipe, root, Ranks()), open_eval(recipe, root, Ranks(), CLASSES)
    record = describe(train, test)
    assert (record["test_images"], record["classes"]) == (TEST, list(CLASSES))
    assert class_names(train, 3) == CLASSES
    shutil.copytree(root, tmp_path / "copy")
    assert describe(*(opened(recipe, tmp_path / "copy", Ranks()) for opened in (open_train, open_eval))) == record
    write_image(tmp_path / "copy" / "train" / "a1" / "0.png", noise(0))
    other = open_train(recipe, tmp_path / "copy", Ranks())
    assert other.fingerprint != record["train"]
    assert class_names(open_train(recipe_of("wds"), written("wds", pixels), Ranks()), 3) == ("0", "1", "2")
