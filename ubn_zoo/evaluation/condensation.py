"""Feature condensation, the measurement of Unified Batch Normalization (arXiv 2311.15993), for any model and images.

Features are condensed if different images have similar feature vectors. The measure is the mean cosine similarity over
pairs of images at the input of every norm layer, with the model in evaluation mode.
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
    """Feature condensation over all norm layers of one model or run, at one epoch.

    Attributes:
        label: Label of the model or run.
        epoch: Epochs done.
        layers: Number of norm layers measured.
        mean: Mean similarity over the layers, with equal weights.
        min: Smallest similarity.
        max: Largest similarity.
        above: Fraction of layers whose similarity is above the threshold, from 0 to 1.
        gates_open: Fraction of gates that are open, from 0 to 1; None if no layer has a gate.
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
    """Find the norm layers to measure: UBN and 2D BatchNorm, including timm's and synchronized variants.

    Args:
        model: Any model; wrappers for data parallelism or compilation are removed.
        images: Model input, (N, 3, H, W), N >= 1. If given, the model runs once in evaluation mode, without side
            effects, to find the order in which it calls its layers.

    Returns:
        Modules by name. With `images`, only modules that were called, in the order of their first call; otherwise all
        modules in registration order, which is the same for most models.
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
    """Measure feature similarity at the input of every norm layer on given images.

    All pairs of images within a batch are compared, with equal weights, and a layer that is called several times gets
    the mean over its calls. The model runs in evaluation mode without gradients; its training modes, hooks and buffers
    are restored, even after an error. For half-precision features, statistics are computed in float32, as in the layer.

    Args:
        model: Any model with norm layers, on any device. A model wrapped by `torch.compile` or DistributedDataParallel
            is measured uncompiled and on this rank only.
        images: Normalized images, (N, 3, H, W), floating point; or batches of them, which are used unchanged. A batch
            of one image has no pairs and is skipped. Images are moved to the model's device, but must have the dtype
            that the model expects.
        epoch: Completed epochs, recorded in the rows.
        batch_size: Maximum batch size, at least 2, if `images` is one tensor; the tensor is split evenly.
        samples: Number of images to compare from the start of each batch; None for all.

    Returns:
        One row per norm layer that was called, in the order of their first call. UBN layers with a gate set `running`,
        `threshold` and `gate`; the gate of a frozen layer is closed, because it never uses batch statistics.

    Raises:
        ValueError: No batch has two images, the images have the wrong shape or dtype, `batch_size` or `samples` is
            below 2, or the model calls no norm layer.
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
        # Compare as a float32 tensor, as the layer does.
        opened = not layer.frozen and bool(layer.feature_similarity > layer.threshold)
        gate = "open" if opened else "closed"
    return LayerSimilarity(
        epoch=epoch, layer=name, depth=depth, similarity=similarity, running=running, threshold=threshold, gate=gate
    )


def _weighted_mean(values: Sequence[tuple[Tensor, int]]) -> float:
    # The only synchronization with the device.
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
    """Remove wrappers, which add name prefixes, DDP's collective operations, or compiled code without hooks."""
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
    # Compiled code ignores hooks that are registered later.
    parts = model.modules()
    if any(part._compiled_call_impl is not None or "_orig_mod" in part._modules for part in parts):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


@contextmanager
def _observed(
    model: nn.Module, layers: Mapping[str, nn.Module], on_input: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call `on_input` for the input of every layer with the model in evaluation mode, and restore the model's state."""
    # Set the flags directly, because a model may override `train` with more or fewer effects.
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
        # Not inference_mode: tensors that a module keeps from this forward must remain usable in training.
        with torch.no_grad(), _uncompiled(model):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                # UBN and BatchNorm change no buffers in evaluation mode; other modules may, in place or by assignment.
                module._buffers[name] = buffer
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def _rows_at(label: str, rows: Sequence[LayerSimilarity], epoch: int | None) -> list[LayerSimilarity]:
    """Select the rows of one epoch, by default the last, sorted by depth."""
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
    """Compare feature similarity per layer across models or runs.

    Args:
        sources: Rows by label, such as ``{"BatchNorm": ..., "UBN": ...}``; rows of several seeds under one label are
            averaged.
        epoch: Epoch to compare; by default the last of each source.

    Returns:
        One row per layer, in execution order: ``depth``, ``layer``, and the similarity for each label, or None if a
        source lacks the layer. Layers are matched by name.

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
    """Summarize feature similarity over all layers of models or runs.

    Args:
        sources: As for `compare_layers`.
        epoch: As for `compare_layers`.
        threshold: Similarity above which features count as condensed.

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
    """Format rows of `compare_layers`, or summaries converted by `dataclasses.asdict`, as a Markdown table.

    Args:
        rows: Rows with equal keys, which become the header. Numbers are rounded to 3 decimals; None becomes a dash.
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
