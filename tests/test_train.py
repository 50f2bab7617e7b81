"""The training loop, its data and its evaluation, on small made-up images."""

from __future__ import annotations

import dataclasses
import io
import math
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import timm
import timm.data
import torch
from PIL import Image
from torch import nn

from ubn_zoo.data import ImageSet, Normalizer, find_test_split, load_image_folder, random_crop_flip, resize
from ubn_zoo.evaluate import evaluate, predict, predict_as_configured
from ubn_zoo.layers import UnifiedBatchNorm2d
from ubn_zoo.progress import Progress
from ubn_zoo.recipe import Recipe
from ubn_zoo.train import (
    build_model,
    build_optimizer,
    fit,
    gate_state,
    learning_rate,
    read_metrics,
    run,
    write_metrics,
)

RECIPE = Recipe(
    source="tests",
    command="pytest",
    hardware="any",
    time="seconds",
    expected="none",
    model="resnet10t",
    num_classes=2,
    img_size=32,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    crop_padding=1,
    epochs=2,
    batch_size=8,
    optimizer="adamw",
    lr=0.003,
    weight_decay=0.01,
    warmup_epochs=0.5,
    label_smoothing=0.1,
    seed=3,
)


def striped_images(count: int, seed: int) -> ImageSet:
    """Horizontal stripes against vertical ones, with noise: easy to tell apart."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    stripes = 80.0 * (torch.arange(16) % 4 < 2)
    horizontal = stripes[:, None].expand(16, 16)
    clean = torch.where(labels[:, None, None] == 0, horizontal, horizontal.t())
    noisy = clean[:, None] + 120 * torch.rand((count, 3, 16, 16), generator=generator)
    return ImageSet(noisy.to(torch.uint8), labels, ("horizontal", "vertical"))


@pytest.fixture(scope="module")
def train() -> ImageSet:
    return striped_images(64, seed=1)


@pytest.fixture(scope="module")
def test() -> ImageSet:
    return striped_images(32, seed=2)


def same_numbers(first: object, second: object) -> bool:
    """Rows agree in all but what the clock says."""
    timeless = {"seconds": 0.0, "step_ms": 0.0}
    return dataclasses.replace(first, **timeless) == dataclasses.replace(second, **timeless)  # type: ignore[type-var]


# The loop


def test_it_learns(train: ImageSet, test: ImageSet) -> None:
    recipe = dataclasses.replace(RECIPE, epochs=5)
    outcome = fit(recipe, build_model(recipe), train, test)
    assert outcome.metrics[-1].top1 >= 90.0
    assert outcome.metrics[-1].train_loss < outcome.metrics[0].train_loss


def test_a_run_leaves_a_folder_that_is_complete_and_not_run_again(
    train: ImageSet, test: ImageSet, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    steps: list[tuple[int, int]] = []
    rows = run(RECIPE, train, test, folder, on_step=lambda done, total: steps.append((done, total)))
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.csv", "model.safetensors", "recipe.yaml"]
    assert steps[-1] == (64, 64)
    assert [row.epoch for row in rows] == [1, 2]
    assert all(row.gates == 14 and row.similarity_min <= row.similarity_mean <= row.similarity_max for row in rows)
    assert all(row.commit is None or len(row.commit) == 40 for row in rows)

    again = run(RECIPE, train, test, folder, on_step=lambda done, total: pytest.fail("trained again"))
    assert [round(row.top1, 3) for row in again] == [round(row.top1, 3) for row in rows]
    described = dataclasses.replace(RECIPE, hardware="another computer")
    assert run(described, train, test, folder, on_step=lambda done, total: pytest.fail("trained again")) == again
    with pytest.raises(FileExistsError, match="holds a run of another recipe"):
        run(dataclasses.replace(RECIPE, seed=4), train, test, folder)

    model = build_model(RECIPE)
    model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    normalize = Normalizer(RECIPE.mean, RECIPE.std, torch.device("cpu"))
    assert evaluate(model, test, normalize, img_size=32).top1 == rows[-1].top1


@pytest.mark.parametrize("norm", ["ubn", "bn"])
def test_the_same_seed_gives_the_same_numbers(norm: str, train: ImageSet, test: ImageSet) -> None:
    recipe = dataclasses.replace(RECIPE, norm=norm)
    first, second = (fit(recipe, build_model(recipe), train, test) for _ in range(2))
    assert all(same_numbers(*pair) for pair in zip(first.metrics, second.metrics, strict=True))
    for one, other in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    other_seed = dataclasses.replace(recipe, seed=4)
    third = fit(other_seed, build_model(other_seed), train, test)
    assert not same_numbers(dataclasses.replace(third.metrics[-1], seed=3), first.metrics[-1])


def test_twins_start_from_the_same_function() -> None:
    images = torch.rand(4, 3, 32, 32)
    logits = [
        build_model(dataclasses.replace(RECIPE, norm=norm)).eval()(images) for norm in ("bn", "ubn", "rbn", "bnet")
    ]
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("norm", "gated", "centred", "kernel"),
    [("ubn", True, True, 3), ("rbn", False, True, 1), ("bnet", False, False, 3)],
)
def test_norms_are_settings_of_one_layer(norm: str, gated: bool, centred: bool, kernel: int) -> None:
    model = build_model(dataclasses.replace(RECIPE, norm=norm))
    layers = [module for module in model.modules() if isinstance(module, UnifiedBatchNorm2d)]
    assert layers
    for layer in layers:
        assert (layer.threshold is not None) == gated
        assert (layer.center_weight is not None) == (layer.scale_weight is not None) == centred
        assert layer.weight.shape[-1] == kernel
    assert (gate_state(model) is not None) == gated


def test_gate_state_counts_layers_above_their_threshold() -> None:
    model = nn.Sequential(
        *(UnifiedBatchNorm2d(2, threshold=0.5) for _ in range(3)), UnifiedBatchNorm2d(2, threshold=None)
    )
    for layer, similarity in zip(model, (0.25, 0.75, 1.0, 1.0), strict=True):
        layer.feature_similarity.fill_(similarity)
    state = gate_state(model)
    assert state is not None
    assert (state.low, state.mean, state.high, state.open, state.layers) == (0.25, pytest.approx(2 / 3), 1.0, 2, 3)
    assert gate_state(nn.BatchNorm2d(2)) is None


def test_norm_parameters_and_biases_do_not_decay() -> None:
    recipe = dataclasses.replace(RECIPE, weight_decay=0.25)
    model = build_model(recipe)
    decay = {
        id(parameter): group["weight_decay"]
        for group in build_optimizer(recipe, model).param_groups
        for parameter in group["params"]
    }
    norms = {id(p) for module in model.modules() if isinstance(module, UnifiedBatchNorm2d) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        expected = 0.0 if id(parameter) in norms or name.endswith("bias") else 0.25
        assert decay[id(parameter)] == expected, name


def test_sgd_has_nesterov_momentum() -> None:
    recipe = dataclasses.replace(RECIPE, optimizer="sgd", momentum=0.8)
    optimizer = build_optimizer(recipe, nn.Linear(2, 2))
    assert isinstance(optimizer, torch.optim.SGD)
    assert all(group["nesterov"] and group["momentum"] == 0.8 for group in optimizer.param_groups)


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    recipe = dataclasses.replace(RECIPE, lr=2.0, epochs=5, warmup_epochs=1.0)
    expected = {0.0: 0.0, 0.25: 0.5, 1.0: 2.0, 2.0: 1.0 + math.cos(math.pi / 4), 3.0: 1.0, 5.0: 0.0}
    for epoch, rate in expected.items():
        assert learning_rate(recipe, epoch) == pytest.approx(rate, abs=1e-12)


def test_the_moving_average_is_what_is_evaluated_and_kept(train: ImageSet, test: ImageSet) -> None:
    frozen = dataclasses.replace(RECIPE, ema_decay=0.0)
    plain = fit(RECIPE, build_model(RECIPE), train, test)
    # Without memory the average is the model itself.
    assert same_numbers(fit(frozen, build_model(frozen), train, test).metrics[-1], plain.metrics[-1])
    slow = dataclasses.replace(RECIPE, ema_decay=0.9)
    model = build_model(slow)
    averaged = fit(slow, model, train, test)
    assert averaged.model is not model
    assert averaged.metrics[-1].train_loss == plain.metrics[-1].train_loss
    assert averaged.metrics[-1].test_loss != plain.metrics[-1].test_loss


def test_what_does_not_fit_is_refused(train: ImageSet, test: ImageSet) -> None:
    model = build_model(RECIPE)
    with pytest.raises(ValueError, match="received 64 training images; valid: at least one batch of 65"):
        fit(dataclasses.replace(RECIPE, batch_size=65), model, train, test)
    with pytest.raises(ValueError, match="received images of 2 classes; the recipe has 3"):
        fit(dataclasses.replace(RECIPE, num_classes=3), model, train, test)
    with pytest.raises(RuntimeError, match="the loss of epoch 1 is nan; lower lr"):
        spoilt = build_model(RECIPE)
        nn.init.constant_(next(spoilt.parameters()), math.nan)
        fit(RECIPE, spoilt, train, test)


def test_metrics_survive_their_file(train: ImageSet, test: ImageSet, tmp_path: Path) -> None:
    rows = [*fit(RECIPE, build_model(RECIPE), train, test).metrics]
    bn = dataclasses.replace(RECIPE, norm="bn")
    rows += fit(bn, build_model(bn), train, test).metrics
    write_metrics(tmp_path / "metrics.csv", rows)
    found = read_metrics(tmp_path / "metrics.csv")
    for row, back in zip(rows, found, strict=True):
        for field in dataclasses.fields(row):
            value, read = getattr(row, field.name), getattr(back, field.name)
            assert type(read) is type(value), field.name
            assert read == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), field.name
    (tmp_path / "other.csv").write_text("epoch,loss\n1,2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="received the columns epoch, loss; valid: model, norm"):
        read_metrics(tmp_path / "other.csv")


# Data


def write_image(path: Path, pixels: numpy.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_image_folders_are_read_in_the_order_of_names(tmp_path: Path) -> None:
    random = numpy.random.default_rng(0)
    written = {}
    for name in ("b/2.png", "b/10.png", "a/1.png"):
        written[name] = random.integers(0, 256, (5, 7, 3), dtype=numpy.uint8)
        write_image(tmp_path / name, written[name])
    write_image(tmp_path / "a/2.png", written["a/1.png"][..., 0])  # grey
    (tmp_path / "a/notes.txt").write_text("no image", encoding="utf-8")
    reported: list[tuple[int, int]] = []
    data = load_image_folder(tmp_path, report=lambda done, total: reported.append((done, total)))
    assert data.classes == ("a", "b")
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert reported == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for index, name in ((0, "a/1.png"), (2, "b/10.png"), (3, "b/2.png")):
        assert numpy.array_equal(data.images[index].permute(1, 2, 0).numpy(), written[name])
    assert torch.equal(data.images[1], data.images[1, :1].expand(3, -1, -1))


def test_image_folders_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load_image_folder(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="has no images"):
        load_image_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="none of the folders test, val, validation"):
        find_test_split(tmp_path)
    (tmp_path / "val").mkdir()
    assert find_test_split(tmp_path) == "val"
    write_image(tmp_path / "a/1.png", numpy.zeros((4, 4, 3), numpy.uint8))
    write_image(tmp_path / "a/2.png", numpy.zeros((4, 5, 3), numpy.uint8))
    with pytest.raises(ValueError, match=r"2\.png is 5x4 pixels and .*1\.png is 4x4"):
        load_image_folder(tmp_path)
    (tmp_path / "a/2.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"2\.png: not a readable image"):
        load_image_folder(tmp_path)


def test_image_sets_check_themselves() -> None:
    images, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])
    assert len(ImageSet(images, labels, ("a", "b"))) == 2
    with pytest.raises(ValueError, match="images: received"):
        ImageSet(images.float(), labels, ("a", "b"))
    with pytest.raises(ValueError, match="labels: received"):
        ImageSet(images, labels[:1], ("a", "b"))
    with pytest.raises(ValueError, match="labels: received 0 to 1; valid: 0 to 0"):
        ImageSet(images, labels, ("a",))


def test_random_crop_and_flip_move_whole_images() -> None:
    images = torch.arange(1, 101).reshape(1, 1, 10, 10).expand(200, 3, 10, 10).to(torch.uint8)
    moved = random_crop_flip(images, 2, 0.5, torch.Generator().manual_seed(0))
    padded = nn.functional.pad(images[0, 0], (2, 2, 2, 2))
    possible = {}
    for top in range(5):
        for left in range(5):
            crop = padded[top : top + 10, left : left + 10]
            possible[crop.numpy().tobytes()] = (top, left, False)
            possible[crop.flip(1).numpy().tobytes()] = (top, left, True)
    seen = {possible[image.numpy().tobytes()] for image in moved[:, 0].contiguous()}
    assert torch.equal(moved[:, 0], moved[:, 2])
    assert len(seen) > 40
    again = random_crop_flip(images, 2, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(moved, again)
    assert torch.equal(random_crop_flip(images, 0, 0.0, torch.Generator()), images)
    assert torch.equal(random_crop_flip(images, 0, 1.0, torch.Generator()), images.flip(3))


@pytest.mark.parametrize("size", [20, 48, 64])
def test_preprocessing_is_that_of_timms_transforms(size: int) -> None:
    images = striped_images(4, seed=5).images
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    transform = timm.data.create_transform(
        input_size=(3, size, size), interpolation="bilinear", mean=mean, std=std, crop_pct=1.0
    )
    expected = torch.stack([transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    found = Normalizer(mean, std, torch.device("cpu"))(resize(images, size))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)


# Evaluation


class Reference(nn.Module):
    """Logits that can be worked out by hand: the mean of each channel."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return images.mean((2, 3))


def test_accuracy_counts_every_image_once() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (37, 3, 4, 4), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 3, (37,), generator=generator)
    normalize = Normalizer((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), torch.device("cpu"))
    model = Reference().train()
    found = evaluate(model, ImageSet(images, labels, ("a", "b", "c")), normalize, img_size=4, batch_size=5)
    means = images.double().numpy().mean((2, 3)) / 255
    probabilities = numpy.exp(means) / numpy.exp(means).sum(1, keepdims=True)
    assert found.images == 37
    assert found.top1 == pytest.approx(100 * (means.argmax(1) == labels.numpy()).mean())
    assert found.loss == pytest.approx(-numpy.log(probabilities[numpy.arange(37), labels.numpy()]).mean(), rel=1e-5)
    assert model.training
    with pytest.raises(ValueError, match="received 0 images"):
        predict(model, images[:0], normalize, img_size=4)


def test_models_are_fed_as_their_configuration_says() -> None:
    cfg = {"input_size": (3, 64, 64), "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "crop_pct": 1.0}
    images = striped_images(4, seed=6).images
    model = timm.create_model(
        "resnet10t_ubn", num_classes=2, pretrained_cfg_overlay={**cfg, "interpolation": "bilinear"}
    )
    normalize = Normalizer(cfg["mean"], cfg["std"], torch.device("cpu"))
    expected = predict(model, images, normalize, img_size=64)
    torch.testing.assert_close(predict_as_configured(model, images), expected)
    with pytest.raises(ValueError, match="images: received"):
        predict_as_configured(model, images[:, :, :8])
    other = timm.create_model("resnet10t_ubn", num_classes=2)
    with pytest.raises(ValueError, match=r"the model's input: received .*crop_pct 0\.875"):
        predict_as_configured(other, images)


# Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_on_a_terminal_and_quiet_elsewhere() -> None:
    terminal, log = Terminal(), io.StringIO()
    for stream in (terminal, log):
        progress = Progress("train", stream=stream)
        progress(1, 4)
        progress(4, 4)
        progress.close()
    assert "train: 4/4" in terminal.getvalue()
    assert "#" * 24 in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[K")
    assert log.getvalue() == ""
    lines = Progress("train", stream=log, interval=0.0)
    lines(0, 4)
    lines(2, 4)
    assert log.getvalue().splitlines()[0] == "train: 0/4, 0 images/s, starting"
    assert "train: 2/4" in log.getvalue().splitlines()[1]
    assert "left" in log.getvalue().splitlines()[1]
