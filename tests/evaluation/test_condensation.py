"""Feature similarity equals a direct comparison of all pairs, and measuring does not change the model."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F

from ubn_zoo import UnifiedBatchNorm2d, cli, convert_sync_ubn, freeze_ubn
from ubn_zoo.evaluation.condensation import (
    compare_layers,
    format_table,
    measure_similarity,
    norm_layers,
    summarize_similarity,
)
from ubn_zoo.evaluation.metrics import LayerSimilarity, read_similarity, write_similarity

MODELS = ["resnet10t", "resnet10t_ubn", "mobilenetv3_small_050", "mobilenetv3_small_050_ubn", "regnetx_002_ubn"]
# float32 sums of tens of thousands of products against float64 ones; in half precision they would be off by 1e-3.
TOLERANCE = 1e-5


def images(count: int, size: int = 32, seed: int = 0) -> Tensor:
    """Normalized images that are partly similar, as photographs are."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(1, 3, size, size, generator=generator)
    return common + torch.randn(count, 3, size, size, generator=generator)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5)
    # Set running statistics from a forward pass in training mode, so that features have a normal scale in evaluation.
    model.train()(images(4, seed=1))
    return model


def mean_cosine(features: Tensor) -> float:
    """The definition, applied to every pair separately in float64."""
    vectors = features.detach().double().flatten(1)
    pairs = [F.cosine_similarity(vectors[i], vectors[j], dim=0, eps=0) for i, j in combinations(range(len(vectors)), 2)]
    return float(torch.stack(pairs).mean())


def inputs_of(model: nn.Module, layers: Sequence[str], batch: Tensor) -> dict[str, Tensor]:
    """Inputs of some layers in a forward pass in evaluation mode, in call order."""
    model, found = copy.deepcopy(model).eval(), {}
    for name in layers:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: found.setdefault(name, args[0].clone())
        )
    with torch.no_grad():
        model(batch)
    return found


def batchnorm_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, (nn.BatchNorm2d, UnifiedBatchNorm2d))]


def state_of(model: nn.Module) -> list[Any]:
    """State that measuring must not change: tensors by value and by identity."""
    found: list[Any] = []
    for name, module in model.named_modules():
        found.append((name, module.training))
        found.extend(
            (name, key, len(value))
            for key, value in vars(module).items()
            if "hooks" in key and hasattr(value, "__len__")
        )
    found.extend((name, id(tensor), tensor.tolist()) for name, tensor in model.named_buffers())
    found.extend(
        (name, id(tensor), tensor.requires_grad, tensor.grad is None) for name, tensor in model.named_parameters()
    )
    return found


class Chain(nn.Module):
    """A few layers called in an order set by the test, independent of registration."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.call = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


@pytest.mark.parametrize("name", MODELS)
def test_similarity_is_the_mean_over_all_pairs(name: str) -> None:
    model, batch = build(name), images(5)
    expected = inputs_of(model, batchnorm_names(model), batch)
    rows = measure_similarity(model, batch, epoch=3)
    assert [row.layer for row in rows] == list(expected)
    assert [row.depth for row in rows] == list(range(len(rows)))
    assert {row.epoch for row in rows} == {3}
    for row in rows:
        assert row.similarity == pytest.approx(mean_cosine(expected[row.layer]), abs=TOLERANCE), row.layer
    assert len({round(row.similarity, 3) for row in rows}) > len(rows) // 2


@pytest.mark.parametrize("sizes", [(3, 3, 2), (4, 1, 3)])
def test_pairs_of_all_batches_have_equal_weight(sizes: tuple[int, ...]) -> None:
    model, batches = build("resnet10t"), images(sum(sizes)).split(sizes)
    name = batchnorm_names(model)[4]
    pairs = [n * (n - 1) // 2 for n in sizes]
    means = [
        mean_cosine(inputs_of(model, [name], batch)[name]) if n > 1 else 0.0
        for batch, n in zip(batches, sizes, strict=True)
    ]
    expected = sum(mean * n for mean, n in zip(means, pairs, strict=True)) / sum(pairs)
    rows = {row.layer: row.similarity for row in measure_similarity(model, iter(batches))}
    assert rows[name] == pytest.approx(expected, abs=TOLERANCE)


def test_one_tensor_is_split_evenly_and_samples_are_the_first_of_a_batch() -> None:
    model, batch = build("resnet10t"), images(7)
    split = measure_similarity(model, (batch[:4], batch[4:]))
    assert measure_similarity(model, batch, batch_size=6) == split
    few = measure_similarity(model, batch, samples=3)
    for row, expected in zip(few, measure_similarity(model, batch[:3]), strict=True):
        assert row.similarity == pytest.approx(expected.similarity, abs=1e-4)
    assert measure_similarity(model, batch, samples=50) == measure_similarity(model, batch)


def test_layers_are_in_execution_order() -> None:
    model = Chain(
        lambda self, x: self.first(self.second(self.third(x))),
        first=nn.BatchNorm2d(3),
        second=UnifiedBatchNorm2d(3),
        unused=nn.BatchNorm2d(3),
        third=BatchNormAct2d(3),
        other=nn.GroupNorm(1, 3),
    )
    assert list(norm_layers(model)) == ["first", "second", "unused", "third"]
    ordered = norm_layers(model, images(1))
    assert list(ordered) == ["third", "second", "first"]
    assert ordered["second"] is model.second
    rows = measure_similarity(model, images(3))
    assert [(row.depth, row.layer) for row in rows] == [(0, "third"), (1, "second"), (2, "first")]


def test_a_model_can_be_a_single_norm_layer() -> None:
    (row,) = measure_similarity(nn.BatchNorm2d(3), images(4))
    assert row.similarity == pytest.approx(mean_cosine(images(4)), abs=TOLERANCE)
    assert row.layer == ""


def test_a_shared_layer_gets_the_mean_over_its_calls() -> None:
    model = Chain(lambda self, x: self.norm(input=F.relu(self.norm(x))), norm=nn.BatchNorm2d(3)).eval()
    batch = images(4)
    (row,) = measure_similarity(model, batch)
    with torch.no_grad():
        second = F.relu(model.norm(batch))
    assert row.similarity == pytest.approx((mean_cosine(batch) + mean_cosine(second)) / 2, abs=TOLERANCE)


def test_a_layer_that_sees_one_sample_has_no_pairs() -> None:
    model = Chain(
        lambda self, x: self.both(self.pooled(x.mean(0, keepdim=True)) + x),
        pooled=nn.BatchNorm2d(3),
        both=nn.BatchNorm2d(3),
    )
    assert [row.layer for row in measure_similarity(model, images(3))] == ["both"]


def test_gates_are_reported() -> None:
    model = Chain(
        lambda self, x: self.plain(self.gateless(self.closed(self.opened(x)))),
        opened=UnifiedBatchNorm2d(3, threshold=0.2),
        closed=UnifiedBatchNorm2d(3),
        gateless=UnifiedBatchNorm2d(3, threshold=None),
        plain=nn.BatchNorm2d(3),
    )
    model.opened.feature_similarity.fill_(0.5)
    model.closed.feature_similarity.fill_(0.15)
    rows = measure_similarity(model, images(3))
    found = [(row.running, row.threshold, row.gate) for row in rows]
    running = pytest.approx(0.15)
    assert found == [(0.5, 0.2, "open"), (running, 0.15, "closed"), (None, None, None), (None, None, None)]
    freeze_ubn(model)
    assert [row.gate for row in measure_similarity(model, images(3))] == ["closed", "closed", None, None]


def test_the_reported_gate_matches_training() -> None:
    # 0.15 in float32 is greater than in float64; compared in float64, the gate would be open.
    layer = UnifiedBatchNorm2d(3)
    assert layer.feature_similarity is not None
    layer.feature_similarity.fill_(0.15)
    assert float(layer.feature_similarity) > 0.15
    (row,) = measure_similarity(layer, images(3))
    assert row.gate == "closed"


@pytest.mark.parametrize("name", ["resnet10t", "resnet10t_ubn"])
def test_the_model_is_restored(name: str) -> None:
    model = build(name)
    model.layer2.eval()
    model.layer1[0].bn1.register_forward_pre_hook(lambda *_: None)
    before = state_of(model)
    measure_similarity(model, images(4))
    norm_layers(model, images(1))
    assert state_of(model) == before
    loss = model(images(2)).sum()
    measure_similarity(model, images(4))
    loss.backward()


def test_the_model_is_restored_after_an_error() -> None:
    model = build("resnet10t_ubn")
    model.layer3.eval()
    before = state_of(model)

    def broken(*_: Any) -> None:
        raise RuntimeError("out of order")

    handle = model.layer4.register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="out of order"):
        measure_similarity(model, images(4))
    handle.remove()
    assert state_of(model) == before

    def failing() -> Iterator[Tensor]:
        yield images(2)
        raise OSError("unreadable image")

    with pytest.raises(OSError, match="unreadable image"):
        measure_similarity(model, failing())
    assert state_of(model) == before


def test_buffers_that_change_in_evaluation_are_restored() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            self.register_buffer("in_place", torch.zeros(()))
            self.register_buffer("replaced", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.in_place += 1
            self.replaced = self.replaced + 1
            return self.norm(x)

    model = Counting()
    before = state_of(model)
    measure_similarity(model, images(4), batch_size=2)
    assert state_of(model) == before


def test_modes_are_set_without_calling_an_overridden_train() -> None:
    class Stubborn(nn.Sequential):
        def train(self, mode: bool = True) -> nn.Module:
            raise AssertionError("called")

    model = Stubborn(nn.BatchNorm2d(3))
    measure_similarity(model, images(3))
    assert model[0].num_batches_tracked == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["resnet10t", "resnet10t_ubn"])
def test_half_precision_is_summed_in_float32(name: str, dtype: torch.dtype) -> None:
    model = build(name).to(dtype)
    batch = images(4).to(dtype)
    expected = inputs_of(model, batchnorm_names(model), batch)
    for row in measure_similarity(model, batch):
        assert expected[row.layer].dtype == dtype
        assert row.similarity == pytest.approx(mean_cosine(expected[row.layer]), abs=TOLERANCE)


def test_large_features_in_float16_do_not_overflow() -> None:
    batch = (images(4) * 10000).clamp(-60000, 60000).half()
    (row,) = measure_similarity(nn.BatchNorm2d(3).half(), batch)
    assert row.similarity == pytest.approx(mean_cosine(batch), abs=TOLERANCE)


def test_autocast_of_the_caller_applies() -> None:
    model = build("resnet10t")
    with torch.autocast("cpu", torch.bfloat16):
        expected = inputs_of(model, batchnorm_names(model), images(4))
        rows = measure_similarity(model, images(4))
    assert {features.dtype for features in expected.values()} == {torch.bfloat16}
    for row in rows:
        assert row.similarity == pytest.approx(mean_cosine(expected[row.layer]), abs=TOLERANCE)


def test_channels_last_gives_the_same() -> None:
    model, batch = build("resnet10t_ubn"), images(4)
    plain = measure_similarity(model, batch)
    model = model.to(memory_format=torch.channels_last)
    for row, expected in zip(
        measure_similarity(model, batch.contiguous(memory_format=torch.channels_last)), plain, strict=True
    ):
        # Convolutions sum in a different order in this memory format.
        assert row.similarity == pytest.approx(expected.similarity, abs=1e-4)


def test_dead_features_have_no_similarity() -> None:
    batch = images(4)
    batch[1] = 0
    (row,) = measure_similarity(nn.BatchNorm2d(3), batch)
    others = mean_cosine(batch[[0, 2, 3]])
    assert row.similarity == pytest.approx(others * 3 / 6, abs=TOLERANCE)


def test_equal_images_have_similarity_one() -> None:
    rows = measure_similarity(build("resnet10t"), images(1).expand(4, -1, -1, -1))
    assert all(row.similarity == pytest.approx(1, abs=1e-5) for row in rows)


def test_synchronized_layers_are_measured() -> None:
    model = Chain(lambda self, x: self.b(self.a(x)), a=nn.SyncBatchNorm(3), b=UnifiedBatchNorm2d(3))
    convert_sync_ubn(model)
    rows = measure_similarity(model, images(3))
    assert [row.layer for row in rows] == ["a", "b"]


def test_compiled_models_are_measured_uncompiled() -> None:
    model = Chain(lambda self, x: self.norm(x), norm=nn.BatchNorm2d(3))
    expected = measure_similarity(model, images(3))

    def forbidden(*_: Any) -> Any:
        raise AssertionError("compiled")

    assert measure_similarity(torch.compile(model, backend=forbidden), images(3)) == expected
    inner = Chain(lambda self, x: self.chain(x), chain=Chain(lambda self, x: self.norm(x), norm=nn.BatchNorm2d(3)))
    inner.chain.compile(backend=forbidden)
    (row,) = measure_similarity(inner, images(3))
    assert (row.layer, row.similarity) == ("chain.norm", expected[0].similarity)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": images(1)}, "received one image per batch; valid: at least 2"),
        ({"images": images(0)}, "received no images; valid: at least 2"),
        ({"images": []}, "received no images"),
        ({"images": images(3).split(1)}, "received one image per batch"),
        ({"images": images(3)[0]}, r"received \(3, 32, 32\) torch.float32; valid: \(N, 3, H, W\)"),
        ({"images": images(3).byte()}, "torch.uint8; valid: .* floating point"),
        ({"images": [(images(3), torch.zeros(3))]}, "received tuple as a batch; valid: tensors .* without labels"),
        ({"images": images(3), "batch_size": 1}, "batch_size: received 1; valid: at least 2"),
        ({"images": images(3), "samples": 1}, "samples: received 1; valid: at least 2"),
    ],
)
def test_invalid_inputs_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_similarity(nn.BatchNorm2d(3), **arguments)


@pytest.mark.parametrize("model", [nn.Identity(), Chain(lambda _, x: x, unused=nn.BatchNorm2d(3))])
def test_a_model_without_norms_is_named(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=f"{type(model).__name__} called no norm layer; .* BatchNorm2d"):
        measure_similarity(model, images(3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees_with_the_cpu() -> None:
    model, batch = build("resnet10t_ubn").double(), images(4).double()
    expected = measure_similarity(model, batch)
    before = state_of(model.cuda())
    for row, other in zip(measure_similarity(model, batch), expected, strict=True):
        assert row.similarity == pytest.approx(other.similarity, abs=1e-9)
    assert state_of(model) == before


def rows_of(values: Sequence[float], epoch: int = 1, gate: str | None = None) -> list[LayerSimilarity]:
    return [
        LayerSimilarity(epoch=epoch, layer=f"bn{depth}", depth=depth, similarity=value, gate=gate)
        for depth, value in enumerate(values)
    ]


def test_layers_of_several_sources_are_compared() -> None:
    ubn = rows_of([0.9, 0.9], epoch=1, gate="open") + rows_of([0.18, 0.4], epoch=2, gate="closed")
    bn = rows_of([0.5, 0.6, 0.7], epoch=1) + rows_of([0.5, 0.6, 0.8], epoch=1)
    sources = {"BatchNorm": bn, "UBN": ubn}
    assert compare_layers(sources) == [
        {"depth": 0, "layer": "bn0", "BatchNorm": 0.5, "UBN": 0.18},
        {"depth": 1, "layer": "bn1", "BatchNorm": 0.6, "UBN": 0.4},
        {"depth": 2, "layer": "bn2", "BatchNorm": 0.75, "UBN": None},
    ]
    assert [row["UBN"] for row in compare_layers(sources, epoch=1)] == [0.9, 0.9, None]
    first, second = summarize_similarity(sources, threshold=0.2)
    assert dataclasses.astuple(first) == ("BatchNorm", 1, 3, pytest.approx(1.85 / 3), 0.5, 0.75, 1.0, None)
    assert dataclasses.astuple(second) == ("UBN", 2, 2, pytest.approx(0.29), 0.18, 0.4, 0.5, 0.0)
    assert summarize_similarity(sources, epoch=1)[1].gates_open == 1.0


def test_layers_are_listed_by_depth() -> None:
    rows = rows_of([0.1] * 12)
    for order in (rows, rows[::-1]):
        assert [row["layer"] for row in compare_layers({"UBN": order})] == [f"bn{depth}" for depth in range(12)]


def test_empty_sources_are_rejected() -> None:
    with pytest.raises(ValueError, match="'UBN': received no rows"):
        compare_layers({"UBN": []})
    with pytest.raises(ValueError, match="'UBN': received epoch 7; valid: 1, 2"):
        summarize_similarity({"UBN": rows_of([0.1], 1) + rows_of([0.1], 2)}, epoch=7)


def test_tables_are_markdown() -> None:
    table = format_table(compare_layers({"BatchNorm": rows_of([0.5, 0.25]), "UBN": rows_of([0.12345])}))
    assert table.splitlines() == [
        "| depth | layer | BatchNorm |   UBN |",
        "| ----: | ----- | --------: | ----: |",
        "|     0 | bn0   |     0.500 | 0.123 |",
        "|     1 | bn1   |     0.250 |     - |",
    ]
    assert format_table([]) == ""


def analyze(*arguments: str) -> int:
    pytest.importorskip("matplotlib", reason="the command draws")
    return cli.main(["analyze", *arguments])


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """An image folder with photographs of different sizes."""
    for number in range(5):
        values = torch.randint(0, 256, (9 + number, 12 - number, 3), generator=torch.Generator().manual_seed(number))
        folder = tmp_path / "photographs" / "val" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(values.byte().numpy()).resize((70 + 9 * number, 90 - 5 * number))
        picture.save(folder / f"{number}.png")
    return tmp_path / "photographs"


def test_the_command_uses_timms_preprocessing(photographs: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "output"
    name = "regnetx_002_ubn.cifar10"
    assert analyze("--model", name, "--data-dir", str(photographs), "--output", str(output)) == 0
    model = timm.create_model(name, pretrained=True)
    transform = create_transform(**resolve_model_data_config(model))
    prepared = [transform(Image.open(path).convert("RGB")) for path in sorted(photographs.rglob("*.png"))]
    rows = read_similarity(output / "similarity.csv")
    for row, expected in zip(rows, measure_similarity(model, torch.stack(prepared)), strict=True):
        assert row.similarity == pytest.approx(expected.similarity, abs=1e-5)
        assert (row.layer, row.gate, row.threshold) == (expected.layer, expected.gate, 0.15)
    assert sorted(path.name for path in output.iterdir()) == ["similarity.csv", "similarity.png"]


def test_the_command_reads_the_number_of_classes_from_a_checkpoint(photographs: Path, tmp_path: Path) -> None:
    safetensors.torch.save_file(build("resnet10t").state_dict(), tmp_path / "bn.safetensors")
    arguments = ["--checkpoint", str(tmp_path / "bn.safetensors"), "--data-dir", str(photographs), "--img-size", "32"]
    for name in ("resnet10t", "resnet10t_ubn"):
        assert analyze("--model", name, *arguments, "--output", str(tmp_path / name)) == 0
    plain, twin = (read_similarity(tmp_path / name / "similarity.csv") for name in ("resnet10t", "resnet10t_ubn"))
    # A UBN model with converted BatchNorm weights computes the same function.
    for row, other in zip(plain, twin, strict=True):
        assert (row.layer, row.gate, other.gate) == (other.layer, None, "open")
        assert row.similarity == pytest.approx(other.similarity, abs=1e-4)


def test_the_command_compares_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run, value in (("bn/0", 0.5), ("ubn/0", 0.25)):
        (tmp_path / run).mkdir(parents=True)
        write_similarity(tmp_path / run / "similarity.csv", rows_of([value, value]))
    runs = [str(tmp_path / "bn" / "0"), str(tmp_path / "ubn" / "0")]
    assert analyze("--runs", *runs, "--output", str(tmp_path / "both")) == 0
    assert "| depth | layer |  bn/0 | ubn/0 |" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "both").iterdir()] == ["similarity.png"]
    assert analyze("--runs", runs[0], "--output", str(tmp_path / "one")) == 0
    assert "| depth | layer |     0 |" in capsys.readouterr().out


def test_the_command_reports_errors_in_a_line(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", str(tmp_path / "output")]
    assert analyze("--runs", str(tmp_path / "missing"), *output) == 1
    arguments = ["--model", "regnetx_002_ubn.cifar10", "--data-dir", str(photographs), *output]
    assert analyze(*arguments, "--images", "1") == 1
    assert analyze(*arguments, "--checkpoint", str(tmp_path / "none.safetensors")) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["ubn-zoo"] * 3
    with pytest.raises(SystemExit):
        analyze("--model", "resnet10t")
    assert "--model needs --data-dir" in capsys.readouterr().err
