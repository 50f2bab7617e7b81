"""Feature condensation, the measurement of Unified Batch Normalization (arXiv 2311.15993), for any model and images.

Features are condensed where those of different images point the same way. What is measured is the mean cosine
similarity over pairs of images, at the input of every norm layer, with the model in evaluation.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ubn_zoo.errors import EvaluationError
from ubn_zoo.evaluation.metrics import LayerSimilarity
from ubn_zoo.layers import UnifiedBatchNorm2d
from ubn_zoo.layers.functional import feature_similarity

__all__ = [
    "DEFAULT_THRESHOLD",
    "SimilaritySummary",
    "compare_layers",
    "format_table",
    "measure_similarity",
    "norm_layers",
    "summarize_similarity",
]

DEFAULT_THRESHOLD = 0.15  # the layer's own default

# timm's BatchNormAct2d and SyncBatchNormAct derive from these.
_NORMS = (UnifiedBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SimilaritySummary:
    """Feature condensation over all norm layers of one source, at one epoch.

    Attributes:
        label: The source.
        epoch: Epochs done.
        layers: Norm layers measured.
        mean: Mean similarity over the layers, each counted once.
        min: Smallest similarity.
        max: Largest similarity.
        above: Share of the layers whose similarity is above the threshold, from 0 to 1.
        gates_open: Share of the gates that are open, from 0 to 1; None if no layer has a gate.
    """

    label: str
    epoch: int
    layers: int
    mean: float
    min: float
    max: float
    above: float
    gates_open: float | None


def norm_layers(model: nn.Module, images: Tensor | None = None) -> dict[str, nn.Module]:
    """The norm layers that are measured: UBN, and BatchNorm over images, timm's and the synchronized kinds included.

    Args:
        model: Any model; one wrapped for data parallelism or compilation is looked into.
        images: (N, 3, H, W), N >= 1, what the model takes. With them the model runs once, in evaluation and without
            trace, for the order in which it calls its layers.

    Returns:
        Modules by their name in the model. With `images` in the order of their first call, without those that are not
        called; otherwise all of them in the order of registration, which for most models is the same.
    """
    inner = _unwrap(model)
    layers: dict[str, nn.Module] = {
        name: module for name, module in inner.named_modules() if isinstance(module, _NORMS)
    }
    if images is None:
        return layers
    called: dict[str, nn.Module] = {}

    def on_input(name: str, features: Tensor) -> None:
        called.setdefault(name, layers[name])

    with _observed(inner, layers, on_input):
        inner(images.to(_device(inner)))
    return called


def measure_similarity(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    *,
    epoch: int = 0,
    batch_size: int = 64,
    samples: int | None = None,
) -> tuple[LayerSimilarity, ...]:
    """Feature similarity at the input of every norm layer, on given images.

    Images of one batch are compared in pairs, every pair counts the same, and a layer that is called several times
    gets the mean over its calls. The model runs in evaluation and without gradients; its training modes, hooks and
    buffers are afterwards what they were, also after an error. Statistics are computed in float32 for features in
    half precision, as the layer itself does.

    Args:
        model: Any model with norm layers, on any device. Wrapped by `torch.compile` or DistributedDataParallel it is
            measured uncompiled and by this rank alone.
        images: Normalized images, (N, 3, H, W), floating point; or batches of them, which are taken as they are. A
            batch of one image has no pairs and is passed over. They are moved to the model's device; their dtype has
            to be what the model takes.
        epoch: Epochs done, for the rows.
        batch_size: Most images at a time, at least 2, where `images` is one tensor; it is split evenly.
        samples: How many leading images of each batch are compared; None for all of them.

    Returns:
        One row per norm layer that was called, in the order of their first call. A UBN layer with a gate fills
        `running`, `threshold` and `gate`; one that is frozen has a closed gate, as it never takes batch statistics.

    Raises:
        ValueError: No batch has two images, images are of another kind, `batch_size` or `samples` is below 2, or the
            model calls no norm layer.
    """
    for name, value in (("batch_size", batch_size), ("samples", samples)):
        if value is not None and value < 2:
            raise EvaluationError(f"{name}: received {value}; valid: at least 2, images are compared in pairs")
    inner = _unwrap(model)
    device = _device(inner)
    layers = norm_layers(inner)
    found: defaultdict[str, list[tuple[Tensor, int]]] = defaultdict(list)

    def on_input(name: str, features: Tensor) -> None:
        compared = len(features) if samples is None else min(len(features), samples)
        if compared > 1:
            found[name].append((feature_similarity(features, compared), compared * (compared - 1) // 2))

    largest = 0
    with _observed(inner, layers, on_input):
        for batch in _batches(images, batch_size):
            _check_images(batch)
            largest = max(largest, len(batch))
            if len(batch) > 1:
                inner(batch.to(device, non_blocking=True))
    if largest < 2:
        received = "no images" if largest == 0 else "one image per batch"
        raise EvaluationError(f"images: received {received}; valid: at least 2 in a batch, they are compared in pairs")
    if not found:
        kinds = "UnifiedBatchNorm2d, BatchNorm2d or SyncBatchNorm"
        raise EvaluationError(f"{type(inner).__name__} called no norm layer; a model with {kinds} can be measured")
    return tuple(
        _row(epoch, name, depth, layers[name], _weighted_mean(values))
        for depth, (name, values) in enumerate(found.items())
    )


def _row(epoch: int, name: str, depth: int, layer: nn.Module, similarity: float) -> LayerSimilarity:
    running = threshold = gate = None
    if isinstance(layer, UnifiedBatchNorm2d) and layer.threshold is not None and layer.feature_similarity is not None:
        running, threshold = float(layer.feature_similarity), layer.threshold
        # Compared as a tensor: in float32, like the layer does.
        opened = not layer.frozen and bool(layer.feature_similarity > layer.threshold)
        gate = "open" if opened else "closed"
    return LayerSimilarity(
        epoch=epoch, layer=name, depth=depth, similarity=similarity, running=running, threshold=threshold, gate=gate
    )


def _weighted_mean(values: Sequence[tuple[Tensor, int]]) -> float:
    # The one place that waits for the device.
    similarities = torch.stack([similarity for similarity, _ in values]).tolist()
    pairs = [count for _, count in values]
    return sum(s * n for s, n in zip(similarities, pairs, strict=True)) / sum(pairs)


def _batches(images: Tensor | Iterable[Tensor], batch_size: int) -> Iterable[Tensor]:
    if not isinstance(images, Tensor):
        return images
    _check_images(images)
    return images.tensor_split(max(1, -(-len(images) // batch_size)))


def _check_images(images: Tensor) -> None:
    if not isinstance(images, Tensor):
        raise EvaluationError(
            f"images: received {type(images).__name__} as a batch; valid: tensors (N, 3, H, W), without labels"
        )
    if images.ndim != 4 or not images.is_floating_point():
        shown = f"{tuple(images.shape)} {images.dtype}"
        raise EvaluationError(
            f"images: received {shown}; valid: (N, 3, H, W), floating point, normalized for the model"
        )


def _unwrap(model: nn.Module) -> nn.Module:
    """The model itself: names without prefixes, no collective operations of DDP, no compiled code without hooks."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


def _device(model: nn.Module) -> torch.device:
    tensors = (tensor for source in (model.parameters(), model.buffers()) for tensor in source)
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _uncompiled(model: nn.Module) -> AbstractContextManager[Any]:
    # Compiled code does not look for hooks that came later.
    parts = model.modules()
    if any(part._compiled_call_impl is not None or "_orig_mod" in part._modules for part in parts):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


@contextmanager
def _observed(
    model: nn.Module, layers: Mapping[str, nn.Module], on_input: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Tells of every layer's input while the model is in evaluation, and puts everything back."""
    # Flags are set one by one: a model may have a `train` of its own that does more, or less.
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module, _ in modes
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    handles = []
    try:
        for name, layer in layers.items():

            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                on_input(name, args[0] if args else next(iter(kwargs.values())))

            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        for module, _ in modes:
            module.training = False
        # Not inference_mode: what a module keeps from this forward has to be good for training.
        with torch.no_grad(), _uncompiled(model):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                # UBN and BatchNorm move none in evaluation; other modules may, in place or by a new tensor.
                module._buffers[name] = buffer
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def _rows_at(label: str, rows: Sequence[LayerSimilarity], epoch: int | None) -> list[LayerSimilarity]:
    """The rows of one epoch, by default the last, in the order of depth."""
    epochs = sorted({row.epoch for row in rows})
    if not epochs:
        raise EvaluationError(f"{label!r}: received no rows of feature similarity; valid: at least one")
    wanted = epochs[-1] if epoch is None else epoch
    if wanted not in epochs:
        raise EvaluationError(f"{label!r}: received epoch {wanted}; valid: {', '.join(map(str, epochs))}")
    return sorted((row for row in rows if row.epoch == wanted), key=lambda row: row.depth)


def _layer_means(rows: Iterable[LayerSimilarity]) -> dict[str, float]:
    values: defaultdict[str, list[float]] = defaultdict(list)
    for row in rows:
        values[row.layer].append(row.similarity)
    return {layer: statistics.fmean(found) for layer, found in values.items()}


def compare_layers(
    sources: Mapping[str, Sequence[LayerSimilarity]], *, epoch: int | None = None
) -> list[dict[str, str | int | float | None]]:
    """Feature similarity per layer, of several models or runs side by side.

    Args:
        sources: Rows by label, such as ``{"BatchNorm": ..., "UBN": ...}``; rows of several seeds under one label are
            averaged.
        epoch: Which one; by default the last of each source.

    Returns:
        One row per layer, in the order they run: ``depth``, ``layer``, and the similarity under each label, None where
        a source lacks the layer. Layers are matched by name.

    Raises:
        ValueError: A source has no rows, or none at that epoch.
    """
    chosen = {label: _rows_at(label, rows, epoch) for label, rows in sources.items()}
    means = {label: _layer_means(rows) for label, rows in chosen.items()}
    depths: dict[str, int] = {}
    for rows in chosen.values():
        for row in rows:
            depths.setdefault(row.layer, row.depth)
    return [
        {"depth": depth, "layer": layer, **{label: found.get(layer) for label, found in means.items()}}
        for layer, depth in sorted(depths.items(), key=lambda item: item[1])
    ]


def summarize_similarity(
    sources: Mapping[str, Sequence[LayerSimilarity]], *, epoch: int | None = None, threshold: float = DEFAULT_THRESHOLD
) -> tuple[SimilaritySummary, ...]:
    """Feature similarity over all layers, of several models or runs.

    Args:
        sources: As for `compare_layers`.
        epoch: As for `compare_layers`.
        threshold: Features count as condensed above it.

    Returns:
        One summary per source, in their order.

    Raises:
        ValueError: A source has no rows, or none at that epoch.
    """
    summaries = []
    for label, rows in sources.items():
        chosen = _rows_at(label, rows, epoch)
        means = _layer_means(chosen).values()
        gates = [row.gate == "open" for row in chosen if row.gate is not None]
        summaries.append(
            SimilaritySummary(
                label=label,
                epoch=chosen[0].epoch,
                layers=len(means),
                mean=statistics.fmean(means),
                min=min(means),
                max=max(means),
                above=sum(value > threshold for value in means) / len(means),
                gates_open=sum(gates) / len(gates) if gates else None,
            )
        )
    return tuple(summaries)


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of `compare_layers`, or summaries by `dataclasses.asdict`, as a Markdown table.

    Args:
        rows: All with the same keys, which become the header; numbers are rounded to 3 decimals, None is a dash.
    """
    if not rows:
        return ""

    def text(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    header = list(rows[0])
    cells = [[text(row[name]) for name in header] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(header)]
    numeric = [all(isinstance(row[name], (int, float, type(None))) for row in rows) for name in header]

    def line(values: Sequence[str]) -> str:
        padded = (
            value.rjust(width) if right else value.ljust(width)
            for value, width, right in zip(values, widths, numeric, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = [f"{'-' * (width - 1)}:" if right else "-" * width for width, right in zip(widths, numeric, strict=True)]
    return "\n".join([line(header), line(rule), *map(line, cells)])
