"""UBN-Zoo: Unified Batch Normalization (arXiv 2311.15993) as a drop-in layer, and UBN variants of timm's models."""

from ubn_zoo import models
from ubn_zoo.layers import (
    UnifiedBatchNorm2d,
    UnifiedBatchNormAct2d,
    convert_batchnorm,
    convert_sync_ubn,
    freeze_ubn,
    fuse,
    unfreeze_ubn,
)

__version__ = "0.1.0"

__all__ = [
    "UnifiedBatchNorm2d",
    "UnifiedBatchNormAct2d",
    "__version__",
    "convert_batchnorm",
    "convert_sync_ubn",
    "freeze_ubn",
    "fuse",
    "models",
    "unfreeze_ubn",
]
