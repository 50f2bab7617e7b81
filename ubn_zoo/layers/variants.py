"""The normalizations that :class:`UnifiedBatchNorm2d` covers, as named settings of the layer.

This is the one place where they are defined: recipes take their ``norm`` from :data:`VARIANTS`, and so do training and
the benchmarks. A new variant is one entry here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

__all__ = ["VARIANTS", "Variant", "variant_settings"]

# Settings that have no effect without a depthwise kernel.
_KERNEL_SETTINGS = ("kernel_size", "kernel_init")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A normalization that is a special case of the layer.

    Attributes:
        title: Its name in tables and figures.
        about: Its parts and its source, in one line.
        settings: Keyword settings of :class:`UnifiedBatchNorm2d` that the variant fixes.
        plain: Whether the variant is torch's BatchNorm, so that a model of this variant keeps its layers.
    """

    title: str
    about: str
    settings: Mapping[str, Any]
    plain: bool = False

    @property
    def depthwise(self) -> bool:
        """Whether the affine is a depthwise convolution."""
        return bool(self.settings.get("depthwise_affine", True))

    @property
    def calibrated(self) -> bool:
        """Whether the centering or the scaling calibration is present."""
        return bool(self.settings.get("center_calibration", True) or self.settings.get("scale_calibration", True))


def _variant(title: str, about: str, plain: bool = False, **settings: Any) -> Variant:
    return Variant(title, about, MappingProxyType(settings), plain)


VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        "ubn": _variant("UBN", "gate, both calibrations and depthwise affine (Wang et al., arXiv 2311.15993)"),
        "bn": _variant(
            "BatchNorm2d",
            "batch statistics and an affine per channel (Ioffe & Szegedy, arXiv 1502.03167)",
            plain=True,
            threshold=None,
            center_calibration=False,
            scale_calibration=False,
            depthwise_affine=False,
        ),
        "rbn": _variant(
            "RBN",
            "both calibrations, neither gate nor depthwise affine (Gao et al., CVPR 2021)",
            threshold=None,
            depthwise_affine=False,
        ),
        "bnet": _variant(
            "BNET",
            "depthwise affine, neither gate nor calibrations (Xu et al., arXiv 2011.14150)",
            threshold=None,
            center_calibration=False,
            scale_calibration=False,
        ),
    }
)


def variant_settings(name: str, **settings: Any) -> dict[str, Any]:
    """Settings of the layer that make it a named variant.

    Args:
        name: A key of :data:`VARIANTS`.
        **settings: Further settings of the layer. Settings that the variant fixes, or that configure a depthwise kernel
            it lacks, are dropped.

    Returns:
        Keyword settings of :class:`UnifiedBatchNorm2d`.

    Raises:
        ValueError: There is no variant of this name.
    """
    if name not in VARIANTS:
        raise ValueError(f"variant: received {name!r}; valid: {', '.join(VARIANTS)}")
    variant = VARIANTS[name]
    free = settings if variant.depthwise else {k: v for k, v in settings.items() if k not in _KERNEL_SETTINGS}
    return {**free, **variant.settings}
