"""Figures for converted weights from timm's published tables, and the cost of every twin.

Converted weights compute the function of their BatchNorm sibling, so timm's accuracies are theirs too.
``python -m ubn_zoo.evaluation.leaderboard.figures FOLDER YYYY-MM`` rewrites ``figures.json`` from the folder
``results`` of timm's repository (https://github.com/huggingface/pytorch-image-models, Apache-2.0) as of that month. It
takes ten minutes, because it counts the operations of every twin at every size.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_arch_pretrained_cfgs as arch_pretrained_cfgs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ubn_zoo.models.registry import SUFFIX

__all__ = ["FIGURES", "TEST_SETS", "TestSet", "count_operations", "load_figures", "upstream_name", "write_figures"]

FIGURES = Path(__file__).with_name("figures.json")


@dataclasses.dataclass(frozen=True, slots=True)
class TestSet:
    """A test set of timm's tables.

    Attributes:
        name: Name in results files.
        title: Display name.
        images: Number of labeled images.
        table: timm's table.
    """

    name: str
    title: str
    images: int
    table: str


_V2 = "imagenetv2-matched-frequency"
_CLASSES = "ImageNet-1k validation, the 200 classes of ImageNet-"
TEST_SETS = (
    TestSet("imagenet", "ImageNet-1k validation", 50_000, "results-imagenet.csv"),
    # ReaL has no label for 3,163 of the validation images.
    TestSet("imagenet-real", "ImageNet ReaL", 46_837, "results-imagenet-real.csv"),
    TestSet(_V2, "ImageNet-V2 matched frequency", 10_000, f"results-{_V2}.csv"),
    TestSet("sketch", "ImageNet-Sketch", 50_889, "results-sketch.csv"),
    TestSet("imagenet-a", "ImageNet-A", 7_500, "results-imagenet-a.csv"),
    TestSet("imagenet-r", "ImageNet-R", 30_000, "results-imagenet-r.csv"),
    TestSet("imagenet-a-clean", f"{_CLASSES}A", 10_000, "results-imagenet-a-clean.csv"),
    TestSet("imagenet-r-clean", f"{_CLASSES}R", 10_000, "results-imagenet-r-clean.csv"),
)
SPEED = {
    "rtx4090": (
        "benchmark-infer-amp-nhwc-pt240-cu124-rtx4090.csv",
        "RTX 4090, AMP float16, channels last, torch 2.4.0",
    ),
    "pro6000": (
        "benchmark-infer-amp_bf16-nchw-pt291-cu130-pro6000maxq-dynamo.csv",
        "RTX PRO 6000 Max-Q, AMP bfloat16, compiled, torch 2.9.1",
    ),
}


@functools.cache
def load_figures() -> dict[str, Any]:
    """Read ``figures.json``.

    Returns:
        ``source``, ``date`` (year and month) and ``tables`` (SHA-256 by name) of timm's tables; ``speed``, the setup of
        each benchmark; ``columns`` and ``rows``, one row for each set of weights and image size; ``cost``, by twin and
        image size: GMACs, millions of activations, and timm's inference images/s of the BatchNorm sibling for each of
        ``speed``.
    """
    return dict(json.loads(FIGURES.read_text(encoding="utf-8")))


def upstream_name(name: str) -> str:
    """Timm's name of the weights that a converted tag stands for: ``resnet50.a1_in1k`` for ``resnet50_ubn.bn_a1_in1k``.

    Args:
        name: Architecture and tag of a twin.
    """
    architecture, _, tag = name.partition(".")
    return architecture.removesuffix(SUFFIX) + tag.removeprefix("bn").replace("_", ".", 1)


class _Counter(TorchDispatchMode):
    """Counts the multiply-adds of convolutions and matrix products, and the elements of their outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = self.activations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.macs += count(*args, **(kwargs or {}), out_val=result) // 2
            self.activations += (result[0] if isinstance(result, tuple) else result).numel()
        return result


def count_operations(architecture: str, img_size: int, num_classes: int | None = None) -> tuple[float, float]:
    """Count the operations of inference on one image, with a model on the meta device.

    As in timm's tables, convolutions and matrix products are counted, and elementwise operations are not. The depthwise
    convolutions of UBN layers are included.

    Args:
        architecture: Name of a model.
        img_size: Image side in pixels.
        num_classes: Outputs of the classifier; None for the model's own number.

    Returns:
        Billions of multiply-adds, and millions of output elements.
    """
    arguments: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    with torch.device("meta"):
        model = timm.create_model(architecture, **arguments).eval()
        image = torch.zeros(1, 3, img_size, img_size)
    with torch.no_grad(), _Counter() as counter:  # inference mode would hide what composite operators call
        model(image)
    return counter.macs / 1e9, counter.activations / 1e6


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_figures(folder: Path, date: str) -> None:
    """Write ``figures.json``.

    Args:
        folder: Folder of timm's tables.
        date: Year and month of the tables.
    """
    names = {
        upstream_name(name): name
        for architecture in timm.list_models(f"*{SUFFIX}")
        for name, cfg in arch_pretrained_cfgs(architecture).items()
        if cfg.has_weights and name.partition(".")[2].startswith("bn")
    }
    rows: dict[tuple[str, str], list[Any]] = {}
    for place, test_set in enumerate(TEST_SETS):
        for line in _table(folder / test_set.table):
            if line["model"] in names:
                head = [names[line["model"]], int(line["img_size"]), float(line["crop_pct"]), line["interpolation"]]
                row = rows.setdefault((line["model"], line["img_size"]), head + [None] * 2 * len(TEST_SETS))
                row[4 + 2 * place : 6 + 2 * place] = float(line["top1"]), float(line["top5"])
    speed: dict[tuple[str, str], dict[str, float]] = {}
    for key, (table, _) in SPEED.items():
        for line in _table(folder / table):
            measured = speed.setdefault((line["model"].partition(".")[0], line["infer_img_size"]), {})
            measured[key] = float(line["infer_samples_per_sec"])
    cost: dict[str, dict[str, list[float | None]]] = {}
    for upstream, size in sorted({(model.partition(".")[0], size) for model, size in rows}):
        twin = upstream + SUFFIX
        gmacs, macts = count_operations(twin, int(size))
        times = [speed.get((upstream, size), {}).get(key) for key in SPEED]
        cost.setdefault(twin, {})[size] = [round(gmacs, 3), round(macts, 2), *times]
    tables = [test_set.table for test_set in TEST_SETS] + [table for table, _ in SPEED.values()]
    about = {
        "source": "https://github.com/huggingface/pytorch-image-models/tree/main/results",
        "date": date,
        "timm": timm.__version__,
        "tables": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in tables},
        "speed": {key: {"table": table, "title": title} for key, (table, title) in SPEED.items()},
        "columns": ["model", "img_size", "crop_pct", "interpolation"]
        + [f"{test_set.name} {metric}" for test_set in TEST_SETS for metric in ("top1", "top5")],
    }
    lines = ",\n".join(json.dumps(row) for _, row in sorted(rows.items()))
    costs = ",\n".join(f"{json.dumps(name)}: {json.dumps(sizes)}" for name, sizes in cost.items())
    text = f'{json.dumps(about, indent=1)[:-2]},\n"cost": {{\n{costs}\n}},\n"rows": [\n{lines}\n]}}\n'
    json.loads(text)
    FIGURES.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_figures(Path(sys.argv[1]), sys.argv[2])
