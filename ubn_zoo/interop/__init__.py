"""UBN for tools that look for BatchNorm by class: freezing, re-estimated statistics, weight decay, synchronization.

Each function here handles both BatchNorm and UBN. :func:`install` patches the corresponding functions of torch, timm
and other libraries, for scripts that cannot be changed.
"""

from .install import Installation, install, uninstall
from .norms import freeze, unfreeze, update_statistics, weight_decay_groups
from .operations import multiply_adds

__all__ = [
    "Installation",
    "freeze",
    "install",
    "multiply_adds",
    "unfreeze",
    "uninstall",
    "update_statistics",
    "weight_decay_groups",
]
