"""UBN-Zoo: Unified Batch Normalization (arXiv 2311.15993) as a drop-in layer, and UBN variants of timm's models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ubn_zoo import errors, models
from ubn_zoo.errors import *  # noqa: F403 - all errors are public names
from ubn_zoo.layers import (
    UnifiedBatchNorm2d,
    UnifiedBatchNormAct2d,
    convert_batchnorm,
    convert_state_dict,
    convert_sync_ubn,
    freeze_ubn,
    fuse,
    unfreeze_ubn,
)

if TYPE_CHECKING:
    from ubn_zoo import cli, data, evaluation, hub, interop, layers, recipes, release, training, utils
    from ubn_zoo.evaluation.condensation import measure_similarity
    from ubn_zoo.evaluation.evaluate import evaluate
    from ubn_zoo.evaluation.predict import predict
    from ubn_zoo.recipes.schema import load_recipe
    from ubn_zoo.release.upload import publish
    from ubn_zoo.training.run import train

__version__ = "0.1.0"

# Imported on first use, because they need more packages than the layer and the models.
_FUNCTIONS = {
    "evaluate": "ubn_zoo.evaluation.evaluate",
    "load_recipe": "ubn_zoo.recipes.schema",
    "measure_similarity": "ubn_zoo.evaluation.condensation",
    "predict": "ubn_zoo.evaluation.predict",
    "publish": "ubn_zoo.release.upload",
    "train": "ubn_zoo.training.run",
}
_ROOMS = ("cli", "data", "evaluation", "hub", "interop", "layers", "recipes", "release", "training", "utils")

__all__ = [
    "UnifiedBatchNorm2d",
    "UnifiedBatchNormAct2d",
    "__version__",
    "cli",
    "convert_batchnorm",
    "convert_state_dict",
    "convert_sync_ubn",
    "data",
    "errors",
    "evaluate",
    "evaluation",
    "freeze_ubn",
    "fuse",
    "hub",
    "interop",
    "layers",
    "load_recipe",
    "measure_similarity",
    "models",
    "predict",
    "publish",
    "recipes",
    "release",
    "train",
    "training",
    "unfreeze_ubn",
    "utils",
]
__all__ += errors.__all__


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        value = getattr(importlib.import_module(_FUNCTIONS[name]), name)
        globals()[name] = value
        return value
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
