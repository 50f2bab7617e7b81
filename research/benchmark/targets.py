"""Targets for the cost of UBN relative to BatchNorm, and the measurements to compare them with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .turns import Timing

__all__ = ["TARGETS", "Comparison", "Target", "find", "limit_of"]


_IMG_SIZE = 224


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The maximum cost of UBN, as a ratio to BatchNorm.

    Attributes:
        what: Description for readers.
        device: "cpu" or "cuda".
        mode: As in :class:`Timing`.
        model: The BatchNorm model, at 224 pixels; None for layers, whose worst shape counts.
        batch_size: Images per step; None for the largest that was measured.
        ratio: The target.
        dtype: As in :class:`Timing`.
        channels_last: Memory format.
        memory: Whether the target is for memory instead of time.
        fused_base: In the mode "fused", whether the BatchNorm model is fused as well.
    """

    what: str
    device: str
    mode: str
    model: str | None
    batch_size: int | None
    ratio: float
    dtype: str = "float32"
    channels_last: bool = True
    memory: bool = False
    fused_base: bool = True

    def covers(self, timing: Timing) -> bool:
        """Whether the target applies to a timing, of BatchNorm or UBN."""
        setting = timing.device, timing.mode, timing.dtype, timing.channels_last
        return (
            setting == (self.device, self.mode, self.dtype, self.channels_last)
            and self.batch_size in (None, timing.batch_size)
            and (self.model is None or timing.model.partition(" ")[0] in (self.model, f"{self.model}_ubn"))
            and (self.model is None or timing.img_size == _IMG_SIZE)
            and (self.mode != "fused" or ("(fused" in timing.model) == (timing.kind != "bn" or self.fused_base))
            # Targets for CPUs are for eager mode.
            and (self.device == "cuda" or "compiled" not in timing.model)
        )


def _gpu(what: str, mode: str, ratio: float, *, memory: bool = False) -> Target:
    return Target(
        what=what,
        device="cuda",
        mode=mode,
        model="resnet50",
        batch_size=None,
        ratio=ratio,
        dtype="amp bfloat16",
        memory=memory,
    )


def _cpu(what: str, mode: str, model: str, batch_size: int, ratio: float) -> Target:
    return Target(what=what, device="cpu", mode=mode, model=model, batch_size=batch_size, ratio=ratio, fused_base=False)


TARGETS = (
    *(
        _cpu(f"{model}, training step, batch {batch}", "train", model, batch, ratio)
        for model, ratio in (("resnet50", 1.35), ("mobilenetv3_large_100", 1.6), ("regnety_032", 1.6))
        for batch in (8, 32)
    ),
    *(
        _cpu(f"{model}, inference, UBN fused, batch {batch}", "fused", model, batch, ratio)
        for model, ratio in (("resnet50", 1.5), ("mobilenetv3_large_100", 1.7), ("regnety_032", 1.7))
        for batch in (1, 32)
    ),
    *(
        Target(
            what=f"layer, training, bfloat16, batch 128, {layout}, worst of ResNet-50's shapes",
            device="cuda",
            mode="layer",
            model=None,
            batch_size=128,
            ratio=1.25,
            dtype="bfloat16",
            channels_last=layout == "channels_last",
        )
        for layout in ("channels_last", "contiguous")
    ),
    _gpu("resnet50, training step, bfloat16 autocast, best of eager and compiled", "train", 1.12),
    _gpu("resnet50, inference, bfloat16 autocast, both fused, best of eager and compiled", "fused", 1.10),
    _gpu("resnet50, peak memory of a training step, bfloat16 autocast", "train", 1.05, memory=True),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """The measurement for a target.

    Attributes:
        base: BatchNorm's timing.
        ubn: UBN's timing; for layers, that of the worst shape.
        ratio: UBN over BatchNorm; the median over turns where the two alternated.
        spread: Quartiles of the ratio; None where there are none.
    """

    base: Timing
    ubn: Timing
    ratio: float
    spread: tuple[float | None, float | None] | None


def find(target: Target, timings: Sequence[Timing]) -> Comparison | None:
    """Find the measurement for a target; None if there is none.

    Args:
        target: The target.
        timings: Timings of one table, because times of different runs cannot be compared.
    """
    fitting = [timing for timing in timings if target.covers(timing)]
    largest = max((timing.batch_size for timing in fitting), default=0)
    fitting = [timing for timing in fitting if timing.batch_size == largest]
    if target.model is None:
        shapes: dict[str, list[Timing]] = {}
        for timing in fitting:
            shapes.setdefault(timing.model.replace(" (compiled)", "").rpartition(" ")[2], []).append(timing)
        outcomes = [outcome for found in shapes.values() if (outcome := _best(target, found)) is not None]
        return max(outcomes, key=lambda outcome: outcome.ratio, default=None)
    return _best(target, fitting)


def _best(target: Target, timings: Sequence[Timing]) -> Comparison | None:
    def cost(timing: Timing) -> float:
        return (timing.memory or float("inf")) if target.memory else timing.median

    bases = [timing for timing in timings if timing.kind == "bn"]
    twins = [timing for timing in timings if timing.kind == "ubn"]
    if not bases or not twins:
        return None
    base, ubn = min(bases, key=cost), min(twins, key=cost)
    if target.memory:
        return Comparison(base, ubn, cost(ubn) / cost(base), None) if ubn.memory and base.memory else None
    # Only ratios to the first entry, which is BatchNorm, uncompiled and fused if others are, compare times of the same
    # turns.
    if "compiled" in base.model or (target.mode == "fused" and not target.fused_base):
        return Comparison(base, ubn, ubn.median / base.median, None)
    quartiles = ubn.ratio_lower, ubn.ratio_upper
    return Comparison(base, ubn, ubn.ratio, quartiles if None not in quartiles else None)


def limit_of(timing: Timing) -> float | None:
    """The time target that applies to a timing of UBN; None if there is none."""
    if timing.kind != "ubn":
        return None
    # Ratios of fused models are to BatchNorm's fused one.
    found = (target for target in TARGETS if not target.memory and target.covers(timing))
    return next((target.ratio for target in found if timing.mode != "fused" or target.fused_base), None)
