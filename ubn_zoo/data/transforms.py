"""Transforms of training and held-out images from a complete recipe or a feed."""

from __future__ import annotations

from typing import Any

from timm.data.transforms_factory import create_transform

from ubn_zoo.data.settings import EvalSettings
from ubn_zoo.recipes.schema import Recipe

__all__ = ["eval_input", "eval_transform", "normalization", "train_input", "train_transform"]


def normalization(recipe: EvalSettings) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and standard deviation of a complete recipe."""
    if recipe.mean is None or recipe.std is None:
        raise ValueError("received a recipe without mean or std; valid: a complete one, from `training.build.complete`")
    return recipe.mean, recipe.std


def train_input(recipe: Recipe) -> tuple[int, str]:
    """Side of training images in pixels and their resize filter, of a complete recipe."""
    return _complete_input(recipe.img_size, recipe.train_interpolation or recipe.interpolation)


def eval_input(recipe: EvalSettings) -> tuple[int, str]:
    """Side of held-out images in pixels and their resize filter, of a complete recipe."""
    return _complete_input(recipe.test_img_size or recipe.img_size, recipe.interpolation)


def _complete_input(size: int | None, interpolation: str | None) -> tuple[int, str]:
    if size is None or interpolation is None:
        raise ValueError("received a recipe without img_size or interpolation; valid: a complete one")
    return size, interpolation


def train_transform(recipe: Recipe) -> Any:
    """Timm's training augmentation, which returns uint8 arrays."""
    size, interpolation = train_input(recipe)
    return create_transform(
        input_size=size,
        is_training=True,
        use_prefetcher=True,
        train_crop_mode=recipe.crop,
        scale=(recipe.crop_scale[0], recipe.crop_scale[1]),
        hflip=recipe.hflip,
        vflip=recipe.vflip,
        color_jitter=recipe.color_jitter,
        auto_augment=recipe.auto_augment,
        interpolation=interpolation,
        mean=normalization(recipe)[0],
    )


def eval_transform(recipe: EvalSettings, crop_mode: str | None) -> Any:
    """Timm's evaluation preprocessing, which returns uint8 arrays."""
    size, interpolation = eval_input(recipe)
    return create_transform(
        input_size=size,
        use_prefetcher=True,
        interpolation=interpolation,
        crop_pct=recipe.crop_pct,
        crop_mode=crop_mode,
    )
