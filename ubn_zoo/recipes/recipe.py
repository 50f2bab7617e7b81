"""Settings of a training run: every key with its type, default, valid values and meaning."""

from __future__ import annotations

import dataclasses
import functools
import typing
from typing import Annotated, Any

import timm.optim

from ubn_zoo.layers.variants import VARIANTS
from ubn_zoo.recipes.rules import Rule, check, describe_valid, fail, is_optional

__all__ = [
    "DATASETS",
    "NAMED_DATASETS",
    "NORMS",
    "OPTIMIZERS",
    "_BEST_METRICS",
    "Field",
    "Recipe",
    "fields",
    "keys_with_role",
]

NORMS = tuple(VARIANTS)
DATASETS = ("folder", "memory", "wds", "hfds", "hfids")
NAMED_DATASETS = ("hfds", "hfids")
# AdaHessian needs second derivatives, which the training loop does not compute. The others run only on CUDA devices,
# with packages (bitsandbytes, NVIDIA's apex) that this project does not test.
OPTIMIZERS = tuple(
    name
    for name in map(str, timm.optim.list_optimizers())
    if name != "adahessian" and not name.startswith(("bnb", "fused"))
)


_MEASURED = ("top1", "top5", "loss", "calibration_error")
_BEST_METRICS = (*_MEASURED, *(f"ema_{name}" for name in _MEASURED))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Settings of one training run; each key is declared once, with its type, default, valid values and meaning.

    `ubn-zoo recipes --fields` and [`fields`][ubn_zoo.recipes.schema.fields] list the keys. A null that stands for a
    property of the model or the data is resolved when a run starts; the recipe saved with the run contains the resolved
    value.

    Raises:
        RecipeError: A value is invalid, or two values contradict each other.
    """

    source: Annotated[str, Rule("Where the settings come from.", form="text", role="opening")]
    command: Annotated[str, Rule("The command that runs the recipe.", form="text", role="opening")]
    hardware: Annotated[str, Rule("Hardware that ran it, or `not yet run`.", form="text", role="opening")]
    time: Annotated[str, Rule("How long that took, or `not yet run`.", form="text", role="opening")]
    expected: Annotated[str, Rule("Metric to expect, or `not yet run`.", form="text", role="opening")]
    model: Annotated[
        str,
        Rule(
            "timm name of the architecture. With the suffix `_ubn`, as in `resnet50_ubn`, it also sets norm to ubn.",
            form="text",
        ),
    ]
    norm: Annotated[
        str,
        Rule(
            "Normalization: " + "; ".join(f"`{name}`, {v.about}" for name, v in VARIANTS.items()) + ".", choices=NORMS
        ),
    ] = "ubn"
    threshold: Annotated[
        float | None,
        Rule("Gate threshold of `ubn`; null for no gate: training always uses batch statistics.", -1.0, 1.0),
    ] = 0.15
    kernel_size: Annotated[
        int,
        Rule("Taps per side of the depthwise affine kernel of norms that have one.", 1, 31, odd=True),
    ] = 3
    kernel_init: Annotated[
        str,
        Rule(
            "Initialization of that kernel: `identity` (starts as BatchNorm) or `kaiming`.",
            choices=("identity", "kaiming"),
        ),
    ] = "identity"
    norm_eps: Annotated[float | None, Rule("Epsilon of the norm layers; null for the model's own.", 1e-12, 1.0)] = None
    norm_momentum: Annotated[
        float | None,
        Rule(
            "Weight of a batch's statistics in the running statistics, as in torch's BatchNorm; null for the "
            "model's own.",
            1e-06,
            1.0,
        ),
    ] = None
    norm_eval: Annotated[
        bool,
        Rule("Whether training normalizes with the initial running statistics and keeps them and the gates fixed."),
    ] = False
    pretrained: Annotated[bool, Rule("Whether to start from pretrained weights.")] = False
    pretrained_tag: Annotated[str | None, Rule("Tag of the pretrained weights; null for the model's default.")] = None
    checkpoint: Annotated[
        str | None,
        Rule("Safetensors file to start from, such as an earlier run's `model.safetensors`."),
    ] = None
    keep_head: Annotated[
        bool,
        Rule(
            "Whether to keep the classifier of the initial weights, for data with the same classes; otherwise it is "
            "reinitialized."
        ),
    ] = False
    tune: Annotated[
        str,
        Rule(
            "What is trained: `full` for all weights, `head` for the classifier alone, with frozen statistics in "
            "the rest.",
            choices=("full", "head"),
        ),
    ] = "full"
    drop_rate: Annotated[float, Rule("Dropout rate before the classifier.", 0.0, 1.0)] = 0.0
    drop_path_rate: Annotated[float, Rule("Stochastic depth rate.", 0.0, 1.0)] = 0.0
    dataset: Annotated[
        str,
        Rule(
            "Kind of data: `folder` (image folder, or one tar file per split), `memory` (image folder "
            "of small images of one size, decoded once), `wds` (WebDataset shards), `hfds/NAME` (Hugging Face "
            "dataset) or `hfids/NAME` (the same, streamed)."
        ),
    ] = "folder"
    train_split: Annotated[
        str,
        Rule("Training split of the data; with `wds` also shards, such as `train-{0000..0099}.tar`.", form="text"),
    ] = "train"
    test_split: Annotated[
        str | None,
        Rule("Held-out split; null for the first of validation, val and test that the data has."),
    ] = None
    train_samples: Annotated[
        int | None,
        Rule(
            "Maximum number of training images per epoch, evenly spaced over a folder; null for all. Required as the "
            "number of images for a stream without a description.",
            1,
            10**12,
        ),
    ] = None
    test_samples: Annotated[
        int | None,
        Rule("Maximum number of held-out images, chosen as for train_samples; null for all.", 1, 10**12),
    ] = None
    data_name: Annotated[
        str | None,
        Rule(
            "Name of the data for the model card, such as `CIFAR-10`; null for none.",
            form="line",
            role="publishing",
        ),
    ] = None
    data_license: Annotated[
        str | None,
        Rule("SPDX identifier of the data's license; null if unknown.", form="spdx", role="publishing"),
    ] = None
    license: Annotated[
        str | None,
        Rule(
            "SPDX identifier of the license of the published weights; null if undecided.",
            form="spdx",
            role="publishing",
        ),
    ] = None
    exif_rotation: Annotated[
        bool,
        Rule(
            "Whether to apply the EXIF orientation of images in every reader; false keeps the stored orientation, as "
            "timm does."
        ),
    ] = True
    input_key: Annotated[
        str | None,
        Rule("Column or file extension of the image; null for the reader's default."),
    ] = None
    target_key: Annotated[str | None, Rule("Column of the class; null for the reader's default.")] = None
    num_classes: Annotated[
        int | None,
        Rule("Outputs of the classifier; null for the number of classes in the data.", 1, 1_000_000),
    ] = None
    img_size: Annotated[int | None, Rule("Side of training images in pixels; null for the model's.", 1, 16_384)] = None
    test_img_size: Annotated[
        int | None,
        Rule("Side of held-out images in pixels; null for img_size.", 1, 16_384),
    ] = None
    interpolation: Annotated[
        str | None,
        Rule("Resize filter; null for the model's.", choices=("bilinear", "bicubic")),
    ] = None
    train_interpolation: Annotated[
        str | None,
        Rule(
            "Resize filter in training, `random` for either; null for interpolation.",
            choices=("bilinear", "bicubic", "random"),
        ),
    ] = None
    crop_pct: Annotated[
        float | None,
        Rule("Side of the center crop relative to the resized held-out image; null for the model's.", 0.01, 2.0),
    ] = None
    mean: Annotated[
        tuple[float, ...] | None,
        Rule("Mean per channel of pixel values scaled to 0..1; null for the model's.", -10.0, 10.0, lengths=(3,)),
    ] = None
    std: Annotated[
        tuple[float, ...] | None,
        Rule(
            "Standard deviation per channel of pixel values scaled to 0..1; null for the model's.",
            1e-06,
            10.0,
            lengths=(3,),
        ),
    ] = None
    crop: Annotated[
        str,
        Rule(
            "Random crop in training: `rrc` (random size and aspect ratio, resized), `rkrc` (resized with its "
            "aspect ratio kept, random crop), `rkrr` (resized by a random factor, random crop) or `pad` "
            "(zero-padded, random crop; the only one for dataset memory).",
            choices=("rrc", "rkrc", "rkrr", "pad"),
        ),
    ] = "rrc"
    crop_scale: Annotated[
        tuple[float, ...],
        Rule("Smallest and largest share of the image area that `rrc` crops.", 1e-06, 1.0, lengths=(2,)),
    ] = (0.08, 1.0)
    crop_padding: Annotated[
        int,
        Rule("Zero padding in pixels on each side for `pad`, before the resize; 0 for no crop.", 0, 1024),
    ] = 4
    hflip: Annotated[float, Rule("Probability of a horizontal flip.", 0.0, 1.0)] = 0.5
    vflip: Annotated[float, Rule("Probability of a vertical flip.", 0.0, 1.0)] = 0.0
    color_jitter: Annotated[
        float,
        Rule("Strength of random brightness, contrast and saturation; 0 for none.", 0.0, 1.0),
    ] = 0.0
    auto_augment: Annotated[
        str | None,
        Rule("Augmentation policy in timm's notation, such as `rand-m7-mstd0.5-inc1`; null for none.", form="augment"),
    ] = None
    random_erasing: Annotated[float, Rule("Probability of erasing a random rectangle.", 0.0, 1.0)] = 0.0
    erasing_mode: Annotated[
        str,
        Rule(
            "Fill of the rectangle: `const` (zero), `rand` (one color) or `pixel` (noise).",
            choices=("const", "rand", "pixel"),
        ),
    ] = "pixel"
    repeats: Annotated[
        int,
        Rule("Augmented copies of each image in a batch; an epoch then shows that many times fewer images.", 1, 64),
    ] = 1
    mixup: Annotated[float, Rule("Mixup alpha; 0 for none.", 0.0, 100.0)] = 0.0
    cutmix: Annotated[float, Rule("CutMix alpha; 0 for none.", 0.0, 100.0)] = 0.0
    mixup_prob: Annotated[float, Rule("Probability per batch of applying either.", 0.0, 1.0)] = 1.0
    mixup_switch_prob: Annotated[
        float,
        Rule("Probability of CutMix instead of Mixup where both are on.", 0.0, 1.0),
    ] = 0.5
    mixup_off_epoch: Annotated[
        int | None,
        Rule("Epoch at which Mixup and CutMix are switched off; null for never.", 0, 100_000),
    ] = None
    epochs: Annotated[int, Rule("Passes over the training images.", 1, 100_000)]
    batch_size: Annotated[
        int,
        Rule(
            "Images per update, over all ranks and accumulated parts; an incomplete last batch is dropped.",
            2,
            10_000_000,
        ),
    ] = 128
    accumulation: Annotated[
        int,
        Rule("Parts that each rank splits its share of a batch into; norm layers see one part at a time.", 1, 100_000),
    ] = 1
    optimizer: Annotated[str, Rule("timm's name of the optimizer.", choices=OPTIMIZERS)] = "sgd"
    lr: Annotated[float, Rule("Peak learning rate.", 1e-12, 1000.0)]
    momentum: Annotated[float, Rule("Momentum, for optimizers that have one.", 0.0, 1.0)] = 0.9
    betas: Annotated[
        tuple[float, ...] | None,
        Rule(
            "Betas, for optimizers that have them (three for Adan); null for the optimizer's default.",
            0.0,
            1.0,
            lengths=(2, 3),
        ),
    ] = None
    optimizer_eps: Annotated[float | None, Rule("Epsilon of the optimizer; null for its default.", 1e-30, 1.0)] = None
    weight_decay: Annotated[float, Rule("Weight decay of convolution and linear weights.", 0.0, 10.0)] = 5e-4
    norm_decay: Annotated[
        bool,
        Rule("Whether to decay biases and norm parameters too; with layer_decay, UBN's depthwise kernels never decay."),
    ] = False
    layer_decay: Annotated[
        float | None,
        Rule(
            "Factor of the learning rate from one group of layers to the group before it; null for one rate.", 0.01, 1.0
        ),
    ] = None
    scheduler: Annotated[
        str,
        Rule(
            "Schedule of the learning rate after the warm-up.",
            choices=("cosine", "step", "multistep", "poly", "constant"),
        ),
    ] = "cosine"
    warmup_epochs: Annotated[float, Rule("Length of the linear warm-up in epochs.", 0.0, 100_000.0)] = 0.0
    warmup_lr: Annotated[float, Rule("Learning rate at the start of the warm-up.", 0.0, 1000.0)] = 0.0
    warmup_prefix: Annotated[
        bool,
        Rule("Whether the schedule starts when the warm-up ends; otherwise it runs from the first update."),
    ] = False
    min_lr: Annotated[float, Rule("Final learning rate of `cosine` and `poly`.", 0.0, 1000.0)] = 0.0
    decay_epochs: Annotated[float, Rule("Epochs between the drops of `step`.", 0.001, 100_000.0)] = 30.0
    decay_milestones: Annotated[tuple[float, ...], Rule("Epochs of the drops of `multistep`.", 0.001, 100_000.0)] = ()
    decay_rate: Annotated[float, Rule("Factor of each drop; the power of `poly`.", 0.0, 10.0)] = 0.1
    loss: Annotated[
        str,
        Rule("Loss: `cross_entropy`, or `bce` (binary cross-entropy per class).", choices=("cross_entropy", "bce")),
    ] = "cross_entropy"
    bce_threshold: Annotated[
        float | None,
        Rule("With `bce`, targets above it count as 1 and others as 0; null keeps soft targets.", 0.0, 1.0),
    ] = None
    label_smoothing: Annotated[
        float, Rule("Share of the target distributed uniformly over all classes.", 0.0, 0.999)
    ] = 0.0
    clip_grad: Annotated[float | None, Rule("Bound for gradient clipping; null for none.", 1e-12, 1_000_000.0)] = None
    clip_mode: Annotated[
        str,
        Rule(
            "Quantity that is clipped: `norm`, `value`, or `agc` (adaptive gradient clipping).",
            choices=("norm", "value", "agc"),
        ),
    ] = "norm"
    ema_decay: Annotated[
        float | None,
        Rule("Decay per update of the moving average of the weights; null for none.", 0.0, 1.0),
    ] = None
    ema_warmup: Annotated[bool, Rule("Whether the moving average starts with a smaller decay.")] = True
    amp: Annotated[
        str | None,
        Rule("Data type of autocast; null for float32 without autocast.", choices=("bfloat16", "float16")),
    ] = None
    channels_last: Annotated[bool, Rule("Whether the model uses the channels-last memory format.")] = True
    compile: Annotated[bool, Rule("Whether to compile the model with `torch.compile`.")] = False
    grad_checkpointing: Annotated[
        bool,
        Rule("Whether to recompute activations in the backward pass, to save memory."),
    ] = False
    sync_norm: Annotated[bool, Rule("Whether norm layers use the statistics of all ranks.")] = False
    seed: Annotated[int, Rule("Seed of initialization, order and augmentation.", 0, 2**63 - 1)] = 0
    device: Annotated[
        str,
        Rule("`auto` (an accelerator if there is one), or a torch device name.", form="text", role="operation"),
    ] = "auto"
    threads: Annotated[
        int | None,
        Rule("torch's CPU threads; null for torch's choice.", 1, 4096, role="operation"),
    ] = None
    workers: Annotated[int, Rule("Loader processes per rank.", 0, 1024, role="operation")] = 4
    checkpoint_steps: Annotated[
        int | None,
        Rule(
            "Updates between checkpoints within an epoch; null for one at the end of each epoch.",
            1,
            10**9,
            role="operation",
        ),
    ] = None
    log_interval: Annotated[
        int,
        Rule(
            "Updates between values of the training loss in logs and TensorBoard events; the end of an epoch adds one.",
            1,
            10**9,
            role="operation",
        ),
    ] = 50
    wandb_project: Annotated[
        str | None,
        Rule(
            "Weights & Biases project to log the run to, in addition to TensorBoard events; null for none.",
            form="line",
            role="operation",
        ),
    ] = None
    keep_checkpoints: Annotated[int, Rule("Number of newest checkpoints to keep.", 2, 10_000, role="operation")] = 3
    keep_best: Annotated[
        str | None,
        Rule(
            "Held-out metric that selects the best epoch, whose weights are also saved in the run's `best/`; `ema_` "
            "metrics select weights of the moving average; null for none.",
            choices=_BEST_METRICS,
            role="operation",
        ),
    ] = None
    probe_images: Annotated[
        int,
        Rule(
            "Held-out images whose feature similarity is measured in every norm layer after each epoch; 0 for none.",
            0,
            65_536,
        ),
    ] = 64

    def __post_init__(self) -> None:
        for key, annotation, rule in _declarations():
            check(key, getattr(self, key), annotation, rule)
        self._check_model()
        self._check_data()
        self._check_schedule()

    def _check_model(self) -> None:
        if self.model.endswith("_ubn"):
            fail("model", self.model, f"{self.model[:-4]!r} with norm ubn; only files and settings may add _ubn")
        if self.pretrained_tag is not None and not self.pretrained:
            fail("pretrained_tag", self.pretrained_tag, "null, as pretrained is false")
        if self.checkpoint is not None and self.pretrained:
            fail("checkpoint", self.checkpoint, "null, as pretrained is true: weights come from one place")
        if self.keep_head and not (self.pretrained or self.checkpoint):
            fail("keep_head", self.keep_head, "false, as there are no weights to start from")
        if self.tune == "head" and not (self.pretrained or self.checkpoint):
            fail("tune", self.tune, "full, as there are no weights to start from: set pretrained or checkpoint")
        if self.norm_eval and not (self.pretrained or self.checkpoint):
            fail("norm_eval", self.norm_eval, "false, as there are no statistics to start from")
        if self.betas is not None and len(self.betas) != (3 if "adan" in self.optimizer else 2):
            fail("betas", list(self.betas), "three numbers for Adan, two for other optimizers")

    def _check_data(self) -> None:
        kind, slash, name = self.dataset.partition("/")
        if kind not in DATASETS or bool(slash) != (kind in NAMED_DATASETS) or bool(slash) != bool(name):
            forms = (f"{kind}/NAME" if kind in NAMED_DATASETS else kind for kind in DATASETS)
            fail("dataset", self.dataset, "one of " + ", ".join(forms))
        if (self.crop == "pad") != (kind == "memory"):
            fail("crop", self.crop, "pad with dataset memory, and rrc, rkrc or rkrr with others")
        if kind == "memory":
            for key in ("auto_augment", "color_jitter", "vflip"):
                if getattr(self, key):
                    fail(key, getattr(self, key), "none with dataset memory; dataset folder supports it")
        if self.train_interpolation == "random" and kind == "memory":
            fail("train_interpolation", self.train_interpolation, "bilinear or bicubic with dataset memory")
        if self.crop_scale[0] > self.crop_scale[1]:
            fail("crop_scale", list(self.crop_scale), "the smallest share of the area first")
        if self.batch_size % self.accumulation:
            fail("batch_size", self.batch_size, "a multiple of accumulation")
        if (self.mixup or self.cutmix) and self.batch_size // self.accumulation % 2:
            fail(
                "batch_size",
                self.batch_size,
                f"an even number of images in each of the {self.accumulation} parts, as Mixup and CutMix pair images",
            )

    def _check_schedule(self) -> None:
        if self.warmup_epochs >= self.epochs:
            fail("warmup_epochs", self.warmup_epochs, f"less than epochs, {self.epochs}")
        if self.scheduler == "multistep" and not self.decay_milestones:
            fail("decay_milestones", [], "at least one epoch with scheduler multistep")
        if list(self.decay_milestones) != sorted(set(self.decay_milestones)):
            fail("decay_milestones", list(self.decay_milestones), "increasing epochs")
        if self.keep_best is not None and self.keep_best.startswith("ema_") and self.ema_decay is None:
            fail("keep_best", self.keep_best, f"{self.keep_best.removeprefix('ema_')}, as ema_decay is null")
        if self.bce_threshold is not None and self.loss != "bce":
            fail("bce_threshold", self.bce_threshold, "null, as loss is not bce")


@functools.cache
def _declarations() -> tuple[tuple[str, Any, Rule], ...]:
    """Name, type and rule of every key."""
    declared = []
    for name, hint in typing.get_type_hints(Recipe, include_extras=True).items():
        annotation, rule = typing.get_args(hint)
        declared.append((name, annotation, rule))
    return tuple(declared)


@dataclasses.dataclass(frozen=True, slots=True)
class Field:
    """Documentation of a recipe key.

    Attributes:
        key: Name of the key.
        type: Type, such as ``float | None``.
        default: Default in YAML syntax; ``required`` if there is none.
        valid: Valid values.
        meaning: Description of the setting.
    """

    key: str
    type: str
    default: str
    valid: str
    meaning: str


def fields() -> tuple[Field, ...]:
    """Document all keys of a recipe, in declaration order."""
    defaults = {field.name: field.default for field in dataclasses.fields(Recipe)}
    found = []
    for key, annotation, rule in _declarations():
        name = str(annotation) if is_optional(annotation) else getattr(annotation, "__name__", str(annotation))
        if "tuple" in str(annotation):
            name = "list" + (" | None" if is_optional(annotation) else "")
        valid = describe_valid(annotation, rule)
        if key == "dataset":
            valid = ", ".join(f"{kind}/NAME" if kind in NAMED_DATASETS else kind for kind in DATASETS)
        found.append(Field(key, name, _as_yaml(defaults[key]), valid, rule.meaning))
    return tuple(found)


def _as_yaml(value: object) -> str:
    if value is dataclasses.MISSING:
        return "required"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value)


def keys_with_role(*roles: str) -> tuple[str, ...]:
    """Names of the keys with any of the given roles (see `Rule`)."""
    return tuple(key for key, _, rule in _declarations() if rule.role in roles)
