"""A training run as data: YAML files in ``ubn_zoo/recipes`` as frozen, validated records.

A recipe says everything that decides the result of a run, and opens with where it comes from, the command that runs it,
the hardware and time that took, and the metric to expect. Nothing is guessed: an unknown key, a key given twice or a
value out of range raises [`RecipeError`][ubn_zoo.recipes.schema.RecipeError], which lists what is valid.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
import math
import os
import re
import sys
import types
import typing
from collections.abc import Collection, Hashable, Iterable
from pathlib import Path
from typing import Any

import timm.optim
import yaml

from ubn_zoo.errors import RecipeError
from ubn_zoo.layers.variants import VARIANTS

__all__ = [
    "NORMS",
    "Recipe",
    "RecipeError",
    "apply_settings",
    "decisive_settings",
    "dump_recipe",
    "list_recipes",
    "load_recipe",
    "parse_recipe",
    "recipe_page",
    "recipe_path",
    "recipe_sha256",
]

NORMS = tuple(VARIANTS)
DESCRIPTIVE = ("source", "command", "hardware", "time", "expected")
# How a run is carried out, not what it computes: a run may go on with other values of these.
OPERATIONAL = ("device", "threads", "workers", "checkpoint_steps", "log_interval", "keep_checkpoints")
# What publishing says about the weights; it changes no result.
PUBLISHED = ("data_name", "data_license", "license")
DATASETS = ("folder", "memory", "wds", "hfds", "hfids")
NAMED_DATASETS = ("hfds", "hfids")

_RECIPES = Path(__file__).resolve().parent
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")

_PAGE = """\
# Recipes

<!-- Written by `python -m ubn_zoo.recipes.schema docs/recipes.md`; edit ubn_zoo/recipes/*.yaml instead. -->

A recipe is a training run as a file. `ubn-zoo recipes NAME` prints it, and `--set KEY=VALUE` after the command changes
it, for example `--set norm=bn` for the BatchNorm twin. `Recipe` in `ubn_zoo/recipe.py` explains every key. Figures of
others are theirs, with BatchNorm; "not yet run" says that this project has none of its own yet.
"""


def _fail(key: str, received: object, valid: str) -> typing.NoReturn:
    raise RecipeError(f"{key}: received {received!r}; valid: {valid}")


def _check_range(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        _fail(key, value, f"from {low:g} to {high:g}")


def _check_choice(key: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        _fail(key, value, "one of " + ", ".join(choices))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One training run.

    What is None, and said here to come from the model or the data, is filled in when the run starts; the recipe that a
    run keeps has it.

    Attributes:
        source: Where the settings come from.
        command: The command that runs it.
        hardware: What it was run on, or "not yet run".
        time: How long that took, or "not yet run".
        expected: The metric to expect, or "not yet run".
        model: timm's name of the architecture, without ``_ubn``.
        norm: Its normalization: ``ubn``, ``bn``, or the ablations ``rbn`` (both calibrations, neither gate nor
            depthwise kernel) and ``bnet`` (the depthwise kernel alone).
        threshold: Gate threshold of ``ubn``; None for no gate, batch statistics always.
        kernel_size: Taps per side of the depthwise affine of ``ubn`` and ``bnet``.
        kernel_init: Its start, ``identity`` (as BatchNorm) or ``kaiming``.
        norm_eps: Epsilon of the norm layers; None for the model's own.
        norm_momentum: Weight of a batch's statistics in the running ones; None for the model's own.
        pretrained: Whether to start from pretrained weights.
        pretrained_tag: Their tag; None for the model's default.
        checkpoint: Safetensors file to start from, such as an earlier run's ``model.safetensors``.
        keep_head: Whether the classifier of the weights that training starts from is kept, for data with the same
            classes; otherwise it starts anew.
        tune: What is trained: ``full``, or the ``head`` alone with frozen statistics behind it.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth.
        dataset: Kind of data: ``folder`` (an image folder, or tar files in the place of its splits), ``memory`` (an
            image folder of small images of one size, decoded once), ``wds`` (WebDataset shards), ``hfds/NAME`` (Hugging
            Face datasets) or ``hfids/NAME`` (the same, streamed).
        train_split: Training part of the data; with ``wds`` also shards, ``train-{0000..0099}.tar``.
        test_split: Held-out part; None for the first of validation, val, test that is there.
        train_samples: Training images in an epoch: at most that many, spread evenly over a folder; the number of images
            of a stream, where its description does not have it. None for all.
        test_samples: Likewise of the held-out images.
        data_name: The data's name for people, such as ``CIFAR-10``, as a model card shows it; None if it has none.
        data_license: SPDX identifier of the data's license; None if it is not known.
        license: SPDX identifier of the license that the trained weights are published under; None if that is open.
        exif_rotation: Whether images are turned upright as their EXIF data says; false reads pixels as they are stored,
            as timm does.
        input_key: Column or file ending of the image; None for the reader's default.
        target_key: Column of the class; None for the reader's default.
        num_classes: Outputs of the classifier; None for the classes of the data.
        img_size: Side in pixels of training images; None for the model's.
        test_img_size: Side in pixels of held-out images; None for ``img_size``.
        interpolation: Filter of resizing, ``bilinear`` or ``bicubic``; None for the model's.
        train_interpolation: Likewise in training, or ``random``; None for ``interpolation``.
        crop_pct: Side of the center crop over that of the resized image, for held-out images; None for the model's.
        mean: Mean per channel, of pixel values scaled to 0..1; None for the model's.
        std: Standard deviation per channel, of pixel values scaled to 0..1; None for the model's.
        crop: Random crop in training: ``rrc`` (of random size and ratio, resized), ``rkrc`` (resized keeping the ratio,
            random crop), ``rkrr`` (resized by a random factor, random crop), ``pad`` (zero-padded, random crop; the
            only one of ``memory``).
        crop_scale: Least and most share of the area that ``rrc`` crops.
        crop_padding: Zero padding in pixels around the image, before the resize, that ``pad`` moves in; 0 for no crop.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        color_jitter: Strength of random brightness, contrast and saturation; 0 for none.
        auto_augment: timm's text for an augmentation policy, such as ``rand-m7-mstd0.5-inc1``; None for none.
        random_erasing: Probability of erasing a rectangle.
        erasing_mode: What fills it: ``const`` (zero), ``rand`` (one color) or ``pixel`` (noise).
        repeats: Augmented copies of each image in a batch; an epoch shows as many fewer images.
        mixup: Alpha of Mixup; 0 for none.
        cutmix: Alpha of CutMix; 0 for none.
        mixup_prob: Probability of either, per batch.
        mixup_switch_prob: Probability of CutMix where both are on.
        mixup_off_epoch: Epoch from which on they are off; None for never.
        epochs: Passes over the training images.
        batch_size: Images per update, over all ranks and accumulated parts; an incomplete last batch is left out.
        accumulation: Parts that a rank's share of a batch is divided in; normalization sees one part at a time.
        optimizer: timm's name of it.
        lr: Peak learning rate.
        momentum: Momentum, of optimizers that have one.
        betas: Betas, of optimizers that have them; None for their default.
        optimizer_eps: Epsilon; None for the optimizer's default.
        weight_decay: Decay of convolution and linear weights.
        norm_decay: Whether biases and normalization parameters decay too.
        layer_decay: Factor of the learning rate from one layer group to the one before it; None for the same rate.
        scheduler: ``cosine``, ``step``, ``multistep``, ``poly`` or ``constant``, after the warm-up.
        warmup_epochs: Length of the linear warm-up, in epochs.
        warmup_lr: Learning rate that it starts at.
        warmup_prefix: Whether the schedule starts after the warm-up, rather than go on from where it would be then.
        min_lr: Learning rate that ``cosine`` and ``poly`` end at.
        decay_epochs: Epochs between the drops of ``step``.
        decay_milestones: Epochs of the drops of ``multistep``.
        decay_rate: Factor of each drop; the power of ``poly``.
        loss: ``cross_entropy``, or ``bce`` (binary cross-entropy, one per class).
        bce_threshold: Mixed targets above it count as 1, others as 0, with ``bce``; None leaves them as they are.
        label_smoothing: Share of the target that is spread over all classes.
        clip_grad: Bound on the gradient; None for none.
        clip_mode: What it bounds: ``norm``, ``value``, or ``agc`` (adaptive).
        ema_decay: Decay of the moving average of the weights, per update; None for none.
        ema_warmup: Whether the average starts with a smaller decay.
        amp: Autocast's dtype, ``bfloat16`` or ``float16``; None for float32 throughout.
        channels_last: Memory format of the model.
        compile: Whether ``torch.compile`` compiles the model.
        grad_checkpointing: Whether activations are computed again in the backward pass, to save memory.
        sync_norm: Whether statistics are those of all ranks.
        seed: Seed of initialization, order and augmentation.
        device: ``auto`` (an accelerator if there is one), or torch's name of the device.
        threads: torch's threads on the CPU; None for torch's own choice.
        workers: Processes that load data, per rank.
        checkpoint_steps: Updates between checkpoints within an epoch; None for one at the end of each epoch only.
        log_interval: Updates between two points of the training loss in events and logs.
        keep_checkpoints: Newest checkpoints that are kept.
        probe_images: Held-out images whose feature similarity is measured in every norm layer after each epoch; 0 for
            none.

    Raises:
        RecipeError: A value is not valid.
    """

    source: str
    command: str
    hardware: str
    time: str
    expected: str
    model: str
    norm: str = "ubn"
    threshold: float | None = 0.15
    kernel_size: int = 3
    kernel_init: str = "identity"
    norm_eps: float | None = None
    norm_momentum: float | None = None
    pretrained: bool = False
    pretrained_tag: str | None = None
    checkpoint: str | None = None
    keep_head: bool = False
    tune: str = "full"
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    dataset: str = "folder"
    train_split: str = "train"
    test_split: str | None = None
    train_samples: int | None = None
    test_samples: int | None = None
    data_name: str | None = None
    data_license: str | None = None
    license: str | None = None
    exif_rotation: bool = True
    input_key: str | None = None
    target_key: str | None = None
    num_classes: int | None = None
    img_size: int | None = None
    test_img_size: int | None = None
    interpolation: str | None = None
    train_interpolation: str | None = None
    crop_pct: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop: str = "rrc"
    crop_scale: tuple[float, ...] = (0.08, 1.0)
    crop_padding: int = 4
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.0
    auto_augment: str | None = None
    random_erasing: float = 0.0
    erasing_mode: str = "pixel"
    repeats: int = 1
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_off_epoch: int | None = None
    epochs: int
    batch_size: int = 128
    accumulation: int = 1
    optimizer: str = "sgd"
    lr: float
    momentum: float = 0.9
    betas: tuple[float, ...] | None = None
    optimizer_eps: float | None = None
    weight_decay: float = 5e-4
    norm_decay: bool = False
    layer_decay: float | None = None
    scheduler: str = "cosine"
    warmup_epochs: float = 0.0
    warmup_lr: float = 0.0
    warmup_prefix: bool = False
    min_lr: float = 0.0
    decay_epochs: float = 30.0
    decay_milestones: tuple[float, ...] = ()
    decay_rate: float = 0.1
    loss: str = "cross_entropy"
    bce_threshold: float | None = None
    label_smoothing: float = 0.0
    clip_grad: float | None = None
    clip_mode: str = "norm"
    ema_decay: float | None = None
    ema_warmup: bool = True
    amp: str | None = None
    channels_last: bool = True
    compile: bool = False
    grad_checkpointing: bool = False
    sync_norm: bool = False
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    workers: int = 4
    checkpoint_steps: int | None = None
    log_interval: int = 50
    keep_checkpoints: int = 3
    probe_images: int = 64

    def __post_init__(self) -> None:
        types_by_name = _field_types(Recipe)
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name), types_by_name[field.name])
        for key in (*DESCRIPTIVE, "model", "device", "train_split"):
            if not getattr(self, key).strip():
                _fail(key, getattr(self, key), "a text that is not empty")
        for key, choices in _CHOICES.items():
            value = getattr(self, key)
            if value is not None or not _optional(types_by_name[key]):
                _check_choice(key, value, choices)
        for key, low, high in _RANGES:
            value = getattr(self, key)
            if value is not None:
                _check_range(key, value, low, high)
        for key, length, low, high in _LISTS:
            values = getattr(self, key)
            if values is None:
                continue
            if length is not None and len(values) != length:
                _fail(key, list(values), f"a list of {length} numbers")
            for value in values:
                _check_range(key, value, low, high)
        if self.data_name is not None and not (self.data_name.strip() and self.data_name.isprintable()):
            _fail("data_name", self.data_name, "one line of text that is not empty")
        for key in ("data_license", "license"):
            value = getattr(self, key)
            if value is not None and not _LICENSE.fullmatch(value):
                _fail(key, value, "an SPDX identifier such as apache-2.0")
        self._check_model()
        self._check_data()
        self._check_schedule()

    def _check_model(self) -> None:
        if self.model.endswith("_ubn"):
            _fail("model", self.model, f"the architecture's own name, {self.model[:-4]!r}; norm says the rest")
        if self.kernel_size % 2 == 0:
            _fail("kernel_size", self.kernel_size, "an odd number")
        if self.pretrained_tag is not None and not self.pretrained:
            _fail("pretrained_tag", self.pretrained_tag, "null, as pretrained is false")
        if self.checkpoint is not None and self.pretrained:
            _fail("checkpoint", self.checkpoint, "null, as pretrained is true: weights come from one place")
        if self.keep_head and not (self.pretrained or self.checkpoint):
            _fail("keep_head", self.keep_head, "false, as there are no weights to start from")
        if self.tune == "head" and not (self.pretrained or self.checkpoint):
            _fail("tune", self.tune, "full, as there are no weights to start from: set pretrained or checkpoint")

    def _check_data(self) -> None:
        kind, slash, name = self.dataset.partition("/")
        if kind not in DATASETS or bool(slash) != (kind in NAMED_DATASETS) or bool(slash) != bool(name):
            _fail("dataset", self.dataset, "one of " + ", ".join(_dataset_forms()))
        if (self.crop == "pad") != (kind == "memory"):
            _fail("crop", self.crop, "pad with dataset memory, and rrc, rkrc or rkrr with others")
        if kind == "memory":
            for key in ("auto_augment", "color_jitter", "vflip"):
                if getattr(self, key):
                    _fail(key, getattr(self, key), "none with dataset memory; dataset folder has it")
        if self.train_interpolation == "random" and kind == "memory":
            _fail("train_interpolation", self.train_interpolation, "bilinear or bicubic with dataset memory")
        if self.crop_scale[0] > self.crop_scale[1]:
            _fail("crop_scale", list(self.crop_scale), "the least share of the area first")
        if self.batch_size % self.accumulation:
            _fail("batch_size", self.batch_size, "a multiple of accumulation")

    def _check_schedule(self) -> None:
        if self.warmup_epochs >= self.epochs:
            _fail("warmup_epochs", self.warmup_epochs, f"less than epochs, {self.epochs}")
        if self.scheduler == "multistep" and not self.decay_milestones:
            _fail("decay_milestones", [], "at least one epoch with scheduler multistep")
        if list(self.decay_milestones) != sorted(set(self.decay_milestones)):
            _fail("decay_milestones", list(self.decay_milestones), "epochs that grow")
        if self.bce_threshold is not None and self.loss != "bce":
            _fail("bce_threshold", self.bce_threshold, "null, as loss is not bce")


def _dataset_forms() -> tuple[str, ...]:
    return tuple(f"{kind}/NAME" if kind in NAMED_DATASETS else kind for kind in DATASETS)


def _optimizers() -> tuple[str, ...]:
    return tuple(map(str, timm.optim.list_optimizers()))


_CHOICES: dict[str, tuple[str, ...]] = {
    "norm": NORMS,
    "kernel_init": ("identity", "kaiming"),
    "tune": ("full", "head"),
    "interpolation": ("bilinear", "bicubic"),
    "train_interpolation": ("bilinear", "bicubic", "random"),
    "crop": ("rrc", "rkrc", "rkrr", "pad"),
    "erasing_mode": ("const", "rand", "pixel"),
    "optimizer": _optimizers(),
    "scheduler": ("cosine", "step", "multistep", "poly", "constant"),
    "loss": ("cross_entropy", "bce"),
    "clip_mode": ("norm", "value", "agc"),
    "amp": ("bfloat16", "float16"),
}

_RANGES: tuple[tuple[str, float, float], ...] = (
    ("threshold", -1.0, 1.0),
    ("kernel_size", 1, 99),
    ("norm_eps", 1e-12, 1.0),
    ("norm_momentum", 1e-6, 1.0),
    ("drop_rate", 0.0, 1.0),
    ("drop_path_rate", 0.0, 1.0),
    ("train_samples", 1, 10**12),
    ("test_samples", 1, 10**12),
    ("num_classes", 1, 1_000_000),
    ("img_size", 1, 16_384),
    ("test_img_size", 1, 16_384),
    ("crop_pct", 0.01, 2.0),
    ("crop_padding", 0, 1_024),
    ("hflip", 0.0, 1.0),
    ("vflip", 0.0, 1.0),
    ("color_jitter", 0.0, 1.0),
    ("random_erasing", 0.0, 1.0),
    ("repeats", 1, 64),
    ("mixup", 0.0, 100.0),
    ("cutmix", 0.0, 100.0),
    ("mixup_prob", 0.0, 1.0),
    ("mixup_switch_prob", 0.0, 1.0),
    ("mixup_off_epoch", 0, 100_000),
    ("epochs", 1, 100_000),
    ("batch_size", 2, 10_000_000),
    ("accumulation", 1, 100_000),
    ("lr", 1e-12, 1e3),
    ("momentum", 0.0, 1.0),
    ("optimizer_eps", 1e-30, 1.0),
    ("weight_decay", 0.0, 10.0),
    ("layer_decay", 0.01, 1.0),
    ("warmup_epochs", 0.0, 100_000.0),
    ("warmup_lr", 0.0, 1e3),
    ("min_lr", 0.0, 1e3),
    ("decay_epochs", 1e-3, 100_000.0),
    ("decay_rate", 0.0, 10.0),
    ("bce_threshold", 0.0, 1.0),
    ("label_smoothing", 0.0, 0.999),
    ("clip_grad", 1e-12, 1e6),
    ("ema_decay", 0.0, 1.0),
    ("seed", 0, 2**63 - 1),
    ("threads", 1, 4_096),
    ("workers", 0, 1_024),
    ("checkpoint_steps", 1, 10**9),
    ("log_interval", 1, 10**9),
    ("keep_checkpoints", 2, 10_000),
    ("probe_images", 0, 65_536),
)

_LISTS: tuple[tuple[str, int | None, float, float], ...] = (
    ("mean", 3, -10.0, 10.0),
    ("std", 3, 1e-6, 10.0),
    ("crop_scale", 2, 1e-6, 1.0),
    ("betas", 2, 0.0, 1.0),
    ("decay_milestones", None, 1e-3, 100_000.0),
)

_TYPE_NAMES = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    tuple: "a list of finite numbers",
}


def _field_types(cls: Hashable) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _optional(wanted: Any) -> bool:
    return isinstance(wanted, types.UnionType)


def _base_type(wanted: Any) -> type:
    if _optional(wanted):
        wanted = next(option for option in typing.get_args(wanted) if option is not types.NoneType)
    return typing.get_origin(wanted) or wanted


def _check_type(key: str, value: object, wanted: Any) -> None:
    if value is None and _optional(wanted):
        return
    base = _base_type(wanted)
    if base is tuple and not isinstance(value, tuple):
        _fail(key, value, _TYPE_NAMES[base])
    items = value if isinstance(value, tuple) else (value,)
    scalar = float if base is tuple else base
    for item in items:
        fits = isinstance(item, (int, float) if scalar is float else scalar)
        if not fits or (isinstance(item, bool) and scalar is not bool) or (scalar is float and not math.isfinite(item)):
            _fail(key, value, _TYPE_NAMES[base])


def _convert(value: object, wanted: Any) -> object:
    """Bring a YAML value into the shape of a field's type; what does not fit is left for the record's own checks."""
    base = _base_type(wanted)
    if base is tuple and isinstance(value, list):
        return tuple(_convert(item, float) for item in value)
    if base is float and isinstance(value, str):
        # YAML 1.1 reads 5e-4, without a point, as a text.
        try:
            return float(value)
        except ValueError:
            return value
    if base is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe subset, without keys that occur twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise RecipeError(f"received the key {key!r}; valid: a text")
            if key in seen:
                raise RecipeError(f"{key}: the key occurs twice; keep one")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _unknown_key(key: object) -> typing.NoReturn:
    names = [field.name for field in dataclasses.fields(Recipe)]
    similar = difflib.get_close_matches(str(key), names, n=1)
    hint = f"did you mean {similar[0]!r}? " if similar else ""
    raise RecipeError(f"{key}: unknown key; {hint}valid: {', '.join(names)}")


def _build(values: dict[Any, Any]) -> Recipe:
    types_by_name = _field_types(Recipe)
    for key in values:
        if key not in types_by_name:
            _unknown_key(key)
    required = [field.name for field in dataclasses.fields(Recipe) if field.default is dataclasses.MISSING]
    missing = [name for name in required if name not in values]
    if missing:
        raise RecipeError(f"missing: {', '.join(missing)}; a recipe needs at least {', '.join(required)}")
    converted: dict[str, Any] = {key: _convert(value, types_by_name[key]) for key, value in values.items()}
    return Recipe(**converted)


def parse_recipe(text: str) -> Recipe:
    """Read a recipe from the text of its file.

    Args:
        text: YAML, one mapping from keys to values.

    Raises:
        RecipeError: It is not YAML, or a key or value is not valid.
    """
    try:
        values = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise RecipeError(f"not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"received {type(values).__name__}; valid: a mapping from keys to values")
    return _build(values)


def list_recipes() -> tuple[str, ...]:
    """Names of the recipes in the package, sorted."""
    return tuple(sorted(path.stem for path in _RECIPES.glob("*.yaml")))


def recipe_path(name: str | os.PathLike[str]) -> Path:
    """Find a recipe's file.

    Args:
        name: Name of a recipe in the package, or the path of a ``.yaml`` file.

    Raises:
        RecipeError: There is no such recipe; the message lists those in the package.
    """
    text = os.fspath(name)
    path = Path(text) if text.endswith((".yaml", ".yml")) else _RECIPES / f"{text}.yaml"
    if path.parent == _RECIPES and path.stem not in list_recipes():
        raise RecipeError(f"no recipe {text!r}; valid: {', '.join(list_recipes())}, or the path of a .yaml file")
    if not path.is_file():
        raise RecipeError(f"no file {text!r}; valid: {', '.join(list_recipes())}, or the path of a .yaml file")
    return path


def load_recipe(name: str | os.PathLike[str]) -> Recipe:
    """Read a recipe.

    Args:
        name: Name of a recipe in the package, or the path of a ``.yaml`` file.

    Raises:
        RecipeError: There is no such recipe, or it is not valid; the message names the file.
    """
    path = recipe_path(name)
    try:
        return parse_recipe(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from error
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


def recipe_sha256(name: str | os.PathLike[str]) -> str:
    """SHA-256 of a recipe's file, 64 hexadecimal digits.

    Args:
        name: Name of a recipe in the package, or the path of a ``.yaml`` file.

    Raises:
        RecipeError: There is no such recipe.
    """
    return hashlib.sha256(recipe_path(name).read_bytes()).hexdigest()


def apply_settings(recipe: Recipe, settings: Iterable[str]) -> Recipe:
    """Change values of a recipe.

    Args:
        recipe: The recipe to start from; it is not changed.
        settings: ``key=value`` each, the value as it would be written in the file.

    Raises:
        RecipeError: A setting is not ``key=value``, or its key or value is not valid.
    """
    values: dict[Any, Any] = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise RecipeError(f"received {setting!r}; valid: key=value")
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"{key}: not valid YAML: {error}") from None
    return _build(values)


def decisive_settings(recipe: Recipe) -> dict[str, Any]:
    """The values that decide a run's result: not what its recipe says about itself, nor how it is carried out."""
    left_out = (*DESCRIPTIVE, *OPERATIONAL, *PUBLISHED)
    return {key: value for key, value in dataclasses.asdict(recipe).items() if key not in left_out}


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe with all its values as YAML, the inverse of `parse_recipe`."""
    values = dataclasses.asdict(recipe)
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120)


def _introduction(text: str) -> str:
    """The comment that a recipe's file begins with."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(line.lstrip("# ") for line in lines)


def recipe_page() -> str:
    """The recipes of the package as a Markdown page: a table, and what each says of itself."""
    names = list_recipes()
    text = [
        _PAGE,
        "| Recipe | Model | Data | Epochs | Batch | Optimizer | Peak rate |",
        "|---|---|---|---|---|---|---|",
    ]
    recipes = {name: load_recipe(name) for name in names}
    for name, recipe in recipes.items():
        cells = (f"[{name}](#{name})", recipe.model, recipe.dataset, recipe.epochs, recipe.batch_size)
        text.append(f"| {' | '.join(map(str, cells))} | {recipe.optimizer} | {recipe.lr:g} |")
    for name, recipe in recipes.items():
        text += [f"\n## {name}\n", _introduction(recipe_path(name).read_text(encoding="utf-8")) + "\n"]
        text += [f"- Command: `{recipe.command}`", f"- Hardware: {recipe.hardware}", f"- Time: {recipe.time}"]
        text += [f"- Expected: {recipe.expected}", f"- Source: {recipe.source}"]
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(recipe_page(), encoding="utf-8")
