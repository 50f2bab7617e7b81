"""The Unified Batch Normalization layer, its equations, and conversions to and from it."""

from . import functional
from .convert import convert_batchnorm, convert_state_dict, convert_sync_ubn, freeze_ubn, unfreeze_ubn
from .fusion import fuse
from .ubn import MAX_KERNEL_SIZE, UnifiedBatchNorm2d, UnifiedBatchNormAct2d
from .variants import VARIANTS, variant_settings

__all__ = [
    "MAX_KERNEL_SIZE",
    "VARIANTS",
    "UnifiedBatchNorm2d",
    "UnifiedBatchNormAct2d",
    "convert_batchnorm",
    "convert_state_dict",
    "convert_sync_ubn",
    "freeze_ubn",
    "functional",
    "fuse",
    "unfreeze_ubn",
    "variant_settings",
]
