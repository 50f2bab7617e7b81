"""Runs, in process and from the command line: their files, and recovery from interruptions."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import errno
import json
import os
import pty
import random
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

from tests import images as stripes
from tests.images import striped_images, write_image_folder
from tests.metrics import ROW
from tests.training.launcher import launcher
from ubn_zoo.cli import main
from ubn_zoo.data.loaders import MemoryEval, MemoryTrain
from ubn_zoo.errors import DataError, RecipeError, RunError, TrainingError
from ubn_zoo.evaluation.evaluate import evaluate
from ubn_zoo.evaluation.metrics import EpochMetrics, read_metrics, read_similarity
from ubn_zoo.evaluation.predict import predict
from ubn_zoo.evaluation.subjects import load_subject
from ubn_zoo.recipes.schema import Recipe, dump_recipe, load_recipe
from ubn_zoo.training import checkpoint as snapshots
from ubn_zoo.training import folder as folders
from ubn_zoo.training import record
from ubn_zoo.training import run as runs
from ubn_zoo.training.build import build_model, build_optimizer, build_scheduler
from ubn_zoo.training.checkpoint import Snapshot, newest_snapshot
from ubn_zoo.training.folder import keep_best, read_best
from ubn_zoo.training.run import run
from ubn_zoo.utils.distributed import Ranks

ROOT = Path(__file__).parents[2]
# A third of the time of resnet10t, most of which is in files of its size.
RECIPE = dataclasses.replace(stripes.RECIPE, model="lcnet_035")
# Times, and the commit, which may change while the tests run.
UNREPEATED = ("seconds", "step_ms", "images_per_second", "commit")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished, uninterrupted run of `RECIPE`; tests must not change it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(change(log_interval=3), images, folder)
    return folder


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the plots, which take a third of the time of such a small run, unless a test requests them."""
    if "drawn" not in request.keywords:
        monkeypatch.setattr(record, "draw_run", lambda folder: ())


def change(**settings: Any) -> Recipe:
    return dataclasses.replace(RECIPE, **settings)


def command(recipe: Path, images: Path, output: Path, *settings: str) -> list[str]:
    where = ["--recipe", str(recipe), "--data-dir", str(images), "--output", str(output)]
    return [sys.executable, "-m", "ubn_zoo", "train", *where, *(["--set", *settings] if settings else [])]


def write_recipe(folder: Path, recipe: Recipe) -> Path:
    path = folder / "mine.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    return path


def numbers(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics without the columns that vary between runs."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key not in UNREPEATED} for row in csv.DictReader(file)]


def assert_same_run(first: Path, second: Path) -> None:
    """Weights, metrics and similarity are bitwise equal."""
    assert numbers(first) == numbers(second)
    assert (first / "similarity.csv").read_bytes() == (second / "similarity.csv").read_bytes()
    names = [path.name for path in sorted(first.glob("model*.safetensors"))]
    assert names == [path.name for path in sorted(second.glob("model*.safetensors"))] != []
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


@pytest.mark.drawn
def test_a_run_writes_all_files_to_use_reproduce_and_publish_it(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = change(model="resnet10t", num_classes=None, dataset="folder", crop="rrc", ema_decay=0.9, norm="ubn")
    recipe = dataclasses.replace(recipe, img_size=32, threshold=0.2, mean=None, std=None)
    done = run(recipe, images, folder)
    assert done.finished
    assert done.updates == 0
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files >= {
        "recipe.yaml",
        "environment.json",
        "metrics.csv",
        "similarity.csv",
        "config.json",
        "model.safetensors",
        "model_ema.safetensors",
        "loss_accuracy.png",
        "learning_rate.png",
        "similarity.png",
        *(f"checkpoints/{n:010d}/{f}.safetensors" for n in (8, 16) for f in ("model", "ema", "optimizer")),
    }
    assert any(name.startswith("events/events.out.tfevents") for name in files)
    assert not any(name.endswith((".pt", ".pth", ".pkl", ".part")) for name in files)

    resolved = load_recipe(folder / "recipe.yaml")
    assert (resolved.num_classes, resolved.mean) == (2, timm.get_pretrained_cfg("resnet10t_ubn").mean)
    rows = read_metrics(folder / "metrics.csv")
    assert rows == done.metrics
    assert [row.epoch for row in rows] == [1, 2]
    assert all(row.ema_top1 is not None and row.gates == 14 for row in rows)
    layers = read_similarity(folder / "similarity.csv")
    assert {row.epoch for row in layers} == {1, 2}
    assert all(row.threshold == 0.2 for row in layers)

    (start,) = json.loads((folder / "environment.json").read_text())["starts"]
    assert start["versions"]["torch"] == torch.__version__
    assert start["seed"] == RECIPE.seed
    assert start["data"]["classes"] == ["horizontal", "vertical"]
    assert start["data"]["test_images"] == 32
    assert (start["data"]["test_split"], start["base"]) == ("test", None)
    assert len(start["data"]["train"]) == 64

    # As timm loads it: settings of the layers, classes and preprocessing included.
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    state = safetensors.torch.load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.bn1.threshold == 0.2
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)
    assert model.pretrained_cfg["label_names"] == ["horizontal", "vertical"]


def test_events_are_those_of_the_metrics(whole: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(whole / "events"))
    events.Reload()
    rows = read_metrics(whole / "metrics.csv")
    found = [(event.step, event.value) for event in events.Scalars("test/top1")]
    assert found == [(row.step, pytest.approx(row.top1)) for row in rows]
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    assert list(losses) == [3, 6, 8, 9, 12, 15, 16]
    assert [losses[row.step] for row in rows] == [pytest.approx(row.train_loss) for row in rows]
    assert any(tag.startswith("similarity/000 ") for tag in events.Tags()["scalars"])


def test_a_finished_run_is_not_run_again_and_another_recipe_is_refused(
    whole: Path, images: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    (folder / "loss_accuracy.png").touch()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    steps: list[int] = []
    described = change(hardware="another computer", workers=1, checkpoint_steps=5)
    again = run(described, images, folder, on_step=lambda done, total: steps.append(done))
    assert again.finished
    assert again.metrics == read_metrics(whole / "metrics.csv")
    assert not steps
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    with pytest.raises(RunError, match=r"holds a run of another recipe \(lr 0\.003 there, 0\.5 here\)"):
        run(change(lr=0.5), images, folder)
    with pytest.raises(RunError, match=r"is not empty and holds no recipe\.yaml"):
        run(RECIPE, images, images)
    with pytest.raises(TrainingError, match="num_classes: received 1; valid: null, or the data's 2 or more"):
        run(change(num_classes=1), images, tmp_path / "other")


def test_a_failed_start_may_be_corrected(images: Path, tmp_path: Path) -> None:
    """Only a checkpoint ties a folder to its recipe."""
    folder = tmp_path / "run"

    def fail(done: int, total: int) -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run(change(lr=0.5), images, folder, on_step=fail)
    assert load_recipe(folder / "recipe.yaml").lr == 0.5
    done = run(change(epochs=1), images, folder)
    assert done.finished
    assert load_recipe(folder / "recipe.yaml").lr == RECIPE.lr
    assert len(json.loads((folder / "environment.json").read_text())["starts"]) == 1
    assert len(list((folder / "events").iterdir())) <= 1
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(RunError, match="holds a run of another recipe"):
        run(change(lr=0.5), images, folder)


@pytest.mark.drawn
@pytest.mark.parametrize("norm", ["bn", "rbn", "bnet"])
def test_siblings_and_ablations_leave_the_same(norm: str, images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(change(norm=norm, epochs=1), images, folder)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    state = safetensors.torch.load_file(folder / "model.safetensors")
    assert state.keys() == model.state_dict().keys()
    assert (folder / "similarity.png").is_file()


def test_a_run_starts_from_the_weights_of_another(images: Path, tmp_path: Path) -> None:
    first = run(change(model="resnet10t", epochs=4), images, tmp_path / "first")
    start = str(tmp_path / "first" / "model.safetensors")
    tuned = run(
        change(model="resnet10t", checkpoint=start, epochs=1, lr=1e-4, warmup_epochs=0.0), images, tmp_path / "second"
    )
    assert tuned.metrics[0].test_loss < first.metrics[0].test_loss


def test_the_best_weights_are_kept_beside_the_newest(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, averages = tmp_path / "run", {}

    def collect(row: EpochMetrics) -> None:
        averages[row.epoch] = safetensors.torch.load_file(folder / "model_ema.safetensors")

    values = {1: 2.0, 2: 1.0, 3: 1.5}
    monkeypatch.setattr(folders, "metric_of", lambda row, metric: values[row.epoch])
    recipe = change(epochs=3, keep_best="ema_loss", ema_decay=0.5, ema_warmup=False)
    done = run(recipe, images, folder, on_epoch=collect)
    assert read_best(folder / "best") == (2, "ema_loss", 1.0)
    model = timm.create_model(f"local-dir:{folder / 'best'}", pretrained=True)
    assert model.pretrained_cfg["label_names"] == ["horizontal", "vertical"]
    assert all(torch.equal(tensor, averages[2][name]) for name, tensor in model.state_dict().items())
    measured = evaluate(load_subject(run=folder / "best"), images, dataset="memory")
    assert measured.loss == pytest.approx(done.metrics[1].ema_test_loss)
    assert predict(folder / "best", [images / "test"], top_k=1)[0].top[0].name in ("horizontal", "vertical")


@pytest.mark.parametrize(
    ("metric", "values", "kept"),
    [
        ("top1", {1: 50.0, 2: 75.0, 3: 75.0, 4: 60.0}, 2),
        ("loss", {1: 2.0, 2: 0.5, 3: 0.75}, 2),
        ("ema_calibration_error", {1: 2.0, 2: 3.0}, 1),
        ("top5", {1: 2.0, 2: 3.0}, 2),
    ],
)
def test_the_best_epoch_is_the_first_of_the_best(
    metric: str, values: dict[int, float], kept: int, tmp_path: Path
) -> None:
    row = dataclasses.replace(ROW, ema_calibration_error=0.0)
    for epoch, value in values.items():
        name = metric.replace("loss", "test_loss")
        measured = dataclasses.replace(row, epoch=epoch, **{name: value})
        state = {"w": torch.tensor(float(epoch))}
        averaged = {"w": torch.tensor(-float(epoch))}
        keep_best(tmp_path, change(keep_best=metric, ema_decay=0.9), measured, Snapshot(epoch, state, averaged, {}, {}))
    assert read_best(tmp_path) == (kept, metric, values[kept])
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert state["w"].item() == (-kept if metric.startswith("ema_") else kept)


def test_the_best_weights_survive_a_kill_before_they_are_written(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = change(keep_best="loss")
    monkeypatch.setattr(folders, "metric_of", lambda row, metric: 3.0 - row.epoch)
    run(recipe, images, tmp_path / "whole")
    real = record.keep_best

    def kill(*arguments: Any) -> bool:
        if arguments[2].epoch == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(record, "keep_best", kill)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, images, tmp_path / "run")
    monkeypatch.setattr(record, "keep_best", real)
    assert read_best(tmp_path / "whole" / "best")[0] == 2
    assert read_best(tmp_path / "run" / "best")[0] == 1
    assert run(recipe, images, tmp_path / "run").updates == 16
    best = Path("best") / "model.safetensors"
    assert (tmp_path / "run" / best).read_bytes() == (tmp_path / "whole" / best).read_bytes()
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_metrics_that_are_not_measured_cannot_choose_the_best(images: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="keep_best: received top5, which needs six classes; valid: top1 or loss"):
        run(change(keep_best="top5"), images, tmp_path / "run")
    with pytest.raises(RecipeError, match="keep_best: received 'ema_loss'; valid: loss, as ema_decay is null"):
        change(keep_best="ema_loss")


def test_a_finished_run_is_trained_for_more_epochs(images: Path, tmp_path: Path) -> None:
    """With a schedule that does not depend on the number of epochs, it ends like a single run of all epochs."""
    constant = {"scheduler": "constant", "ema_decay": 0.9, "keep_best": "loss"}
    run(change(**constant), images, tmp_path / "whole")
    folder = tmp_path / "run"
    run(change(**constant, epochs=1), images, folder)
    with pytest.raises(RunError, match="another recipe"):
        run(change(**constant, lr=0.5), images, folder)
    extended = run(change(**constant), images, folder)
    assert (extended.finished, extended.updates, len(extended.metrics)) == (True, 8, 2)
    assert_same_run(tmp_path / "whole", folder)
    for name in ("model.safetensors", "best.json"):
        assert (tmp_path / "whole" / "best" / name).read_bytes() == (folder / "best" / name).read_bytes()
    assert load_recipe(folder / "recipe.yaml").epochs == 2
    starts = json.loads((folder / "environment.json").read_text())["starts"]
    assert [start["epochs"] for start in starts] == [1, 2]
    with pytest.raises(RunError, match=r"another recipe \(epochs 2 there, 1 here\); choose another folder"):
        run(change(**constant, epochs=1), images, folder)


def test_more_epochs_continue_on_the_longer_schedule(
    whole: Path, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    long = change(epochs=4)
    # Stopped in between, it resumes as any run does.
    stopped = run(long, images, folder, on_epoch=lambda row: os.kill(os.getpid(), signal.SIGTERM))
    assert "is extended from epoch 2 to 4; the learning rate continues as in a schedule of 4 epochs" in caplog.text
    assert len(stopped.metrics) == 3
    done = run(long, images, folder)
    assert done.finished
    assert done.metrics[:2] == read_metrics(whole / "metrics.csv")
    optimizer = build_optimizer(long, build_model(long))
    schedule = build_scheduler(long, optimizer, 8)
    for row in done.metrics[2:]:
        schedule.step_update(row.step - 1)
        assert row.lr == pytest.approx(max(group["lr"] for group in optimizer.param_groups), rel=1e-12)
    # An unfinished run, or one without checkpoints, cannot be extended.
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(RunError, match="without checkpoints/ it cannot be trained for more"):
        run(change(epochs=5), images, folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(RunError, match=r"epochs 4 there, 5 here\); finish it with epochs=4"):
        run(change(epochs=5), images, folder)


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_the_same(images: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, change(epochs=3, checkpoint_steps=2, ema_decay=0.9, mixup=0.2, drop_rate=0.1))
    whole, broken, log = tmp_path / "whole", tmp_path / "broken", tmp_path / "log"
    chance = random.Random(0)
    stages = set()
    with launcher() as commands:
        commands.start(command(path, images, whole)[3:], str(log))
        assert commands.wait() == 0, log.read_text()
        for attempt in range(12):
            before = set((broken / "checkpoints").glob("*"))
            process = commands.start(command(path, images, broken)[3:], str(log))
            deadline = time.monotonic() + 240
            # Wait until it trains, then kill it after a random delay, or at the moment when a save begins.
            while status_of(process) and time.monotonic() < deadline:
                now = set((broken / "checkpoints").glob("*"))
                saving = list((broken / "checkpoints").glob(".*.part"))
                if attempt % 2 and saving:
                    stages.add("inside a save")
                    break
                if now - before:
                    time.sleep(chance.uniform(0.0, 0.4))
                    stages.add("between saves")
                    break
                time.sleep(0.001)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            code = commands.wait()
            assert code in (0, -signal.SIGKILL), log.read_text()
            if code == 0:
                break
        assert stages == {"inside a save", "between saves"}
        commands.start(command(path, images, broken)[3:], str(log))
        assert commands.wait() == 0, log.read_text()
    assert_same_run(whole, broken)
    starts = json.loads((broken / "environment.json").read_text())["starts"]
    assert len(starts) > 2
    assert starts[0]["updates"] == 0 < starts[-1]["updates"]
    assert not list((broken / "checkpoints").glob(".*"))


def status_of(process: int) -> str:
    """The state of a process in one letter; empty if it has ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0].replace("Z", "")
    except OSError:
        return ""


def processes(session: int) -> list[str]:
    """The living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, own = path.read_text().rpartition(")")[2].split()[:4]
            found += [path.parent.name] if int(own) == session and state != "Z" else []
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the processes of a session are listed in /proc")
def test_a_closed_terminal_saves_and_leaves_no_process(images: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, change(epochs=200, dataset="folder", crop="rrc", workers=2))
    folder = tmp_path / "run"
    # The child's own terminal, with all of its output, hangs up when its other end is closed.
    child, terminal = pty.fork()
    if child == 0:
        os.execve(sys.executable, command(recipe, images, folder), dict(os.environ))  # noqa: S606 - no shell wanted
    reader = threading.Thread(target=drain, args=(terminal, hang_up := threading.Event()))
    reader.start()
    deadline = time.monotonic() + 120
    while not list((folder / "checkpoints").glob("[0-9]*")):
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert len(processes(child)) >= 3
    hang_up.set()
    reader.join()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    found = newest_snapshot(folder / "checkpoints")
    assert found is not None
    assert found.updates > 8 * len(read_metrics(folder / "metrics.csv")) - 8
    deadline = time.monotonic() + 20
    while processes(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes(child) == []


def drain(terminal: int, hang_up: threading.Event) -> None:
    """Read what is written to a terminal, then close it."""
    while not hang_up.is_set():
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 4096)
    os.close(terminal)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the processes of a session are listed in /proc")
@pytest.mark.parametrize(
    "name",
    [
        "SIGHUP",
        "SIGKILL",
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("SIGTERM", "SIGINT", "SIGQUIT", "SIGUSR1")),
    ],
)
def test_no_signal_leaves_a_process(name: str, images: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, change(epochs=200, dataset="folder", crop="rrc", workers=2))
    number = getattr(signal, name)
    # A shell's background job ignores SIGINT and SIGQUIT, and what it starts inherits that.
    before = None if name == "SIGKILL" else signal.signal(number, signal.SIG_DFL)
    try:
        process = subprocess.Popen(
            command(recipe, images, tmp_path / "run"),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
    finally:
        if before is not None:
            signal.signal(number, before)
    wait_for(tmp_path / "run" / "checkpoints", process)
    process.send_signal(number)
    process.wait(timeout=60)
    if name in ("SIGHUP", "SIGTERM"):
        assert process.returncode == 0
        assert process.stdout is not None
        assert f"stopped by {name}; the state is saved" in process.stdout.read()
    deadline = time.monotonic() + 30
    while processes(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes(process.pid) == []


def test_an_ignored_hangup_stays_ignored(images: Path, tmp_path: Path) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        done = run(change(epochs=1), images, tmp_path / "run", on_step=lambda *_: os.kill(os.getpid(), signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert done.finished
    assert done.stopped_by is None


@pytest.mark.parametrize("workers", [0, 2])
def test_sigterm_saves_and_ends_cleanly(workers: int, images: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, change(epochs=200, dataset="folder", crop="rrc", workers=workers))
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command(recipe, images, folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(folder / "checkpoints", process)
    # Schedulers signal the whole group, workers included.
    os.killpg(process.pid, signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "stopped by SIGTERM; the state is saved; run the same command to resume" in out
    assert "Traceback" not in errors
    found = newest_snapshot(folder / "checkpoints")
    assert found is not None
    assert found.updates > 8 * len(read_metrics(folder / "metrics.csv")) - 8
    assert not runs.is_finished(folder)


def wait_for(checkpoints: Path, process: subprocess.Popen[str], count: int = 1) -> None:
    deadline = time.monotonic() + 120
    while len(list(checkpoints.glob("[0-9]*"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_stop_and_a_start_in_one_process_end_the_same(whole: Path, images: Path, tmp_path: Path) -> None:
    steps: list[int] = []

    def strike(done: int, total: int) -> None:
        steps.append(done)
        if len(steps) == 11:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    stopped = run(RECIPE, images, tmp_path / "run", on_step=strike)
    assert not stopped.finished
    assert stopped.stopped_by == "SIGTERM"
    assert len(stopped.metrics) == 1
    assert signal.getsignal(signal.SIGTERM) == before
    assert not runs.is_finished(tmp_path / "run")
    updates: list[int] = []
    rest = run(RECIPE, images, tmp_path / "run", on_start=lambda recipe, done: updates.append(done))
    assert rest.finished
    assert updates == [rest.updates] == [12]
    assert len(rest.metrics) == 2
    assert_same_run(whole, tmp_path / "run")


def test_an_interrupted_run_is_usable(images: Path, tmp_path: Path) -> None:
    """It has the weights of its last whole epoch, their average, and the names of the classes."""
    folder = tmp_path / "run"

    def stop(row: EpochMetrics) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    stopped = run(change(ema_decay=0.9), images, folder, on_epoch=stop)
    assert (stopped.finished, len(stopped.metrics)) == (False, 1)
    assert not runs.is_finished(folder)
    snapshot = newest_snapshot(folder / "checkpoints")
    assert snapshot is not None
    assert snapshot.ema is not None
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert model.pretrained_cfg["label_names"] == ["horizontal", "vertical"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, snapshot.model[name]), name
    average = safetensors.torch.load_file(folder / "model_ema.safetensors")
    assert all(torch.equal(tensor, snapshot.ema[name]) for name, tensor in average.items())
    for ema, top1 in ((False, stopped.metrics[0].top1), (True, stopped.metrics[0].ema_top1)):
        subject = load_subject(run=folder, ema=ema)
        assert evaluate(subject, images, dataset="memory").top1 == pytest.approx(top1)
    # A run that was killed after its last checkpoint, before the weights were written, still gets them.
    assert run(change(ema_decay=0.9), images, folder).finished
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    assert not runs.is_finished(folder)
    assert run(change(ema_decay=0.9), images, folder).updates == 16
    assert runs.is_finished(folder)
    assert (folder / "model.safetensors").read_bytes() == weights


def test_a_full_disk_is_reported_and_loses_nothing(
    whole: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    real, saves = snapshots.write_file, 0

    def full(path: Path, content: bytes) -> None:
        nonlocal saves
        saves += Path(path).name == "optimizer.safetensors"
        if saves == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, content)

    monkeypatch.setattr(snapshots, "write_file", full)
    with pytest.raises(
        RunError,
        match=r"optimizer\.safetensors: No space left on device \([0-9]+ MB free in .*\); "
        "the last checkpoint, after update 8, is kept; run the same command to resume from it",
    ):
        run(RECIPE, images, folder)
    monkeypatch.undo()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["0000000008"]
    assert run(RECIPE, images, folder).updates == 8
    assert_same_run(whole, folder)


def test_a_full_disk_before_the_first_checkpoint(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(snapshots, "write_file", full)
    with pytest.raises(RunError, match="there is no checkpoint yet; the same command starts over"):
        run(RECIPE, images, tmp_path / "run")


def test_a_damaged_checkpoint_falls_back(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = change(epochs=3)
    run(recipe, images, tmp_path / "whole")
    folder = Path(shutil.copytree(tmp_path / "whole", tmp_path / "run"))
    (folder / "model.safetensors").unlink()
    damaged = folder / "checkpoints" / "0000000024" / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    again = run(recipe, images, folder)
    assert again.updates == 16
    assert "0000000024/model.safetensors is damaged" in caplog.text
    assert_same_run(tmp_path / "whole", folder)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_its_checkpoints(images: Path, tmp_path: Path) -> None:
    recipe = change(lr=1e3, optimizer="sgd", epochs=5, warmup_epochs=1.0)
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at epoch [1-5] after update .* lower lr"):
        run(recipe, images, tmp_path / "run")
    for folder in (tmp_path / "run" / "checkpoints").glob("[0-9]*"):
        state = snapshots.read_snapshot(folder).model
        assert all(torch.isfinite(tensor).all() for tensor in state.values() if tensor.is_floating_point())


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named(workers: int, images: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(images, tmp_path / "images"))
    bad = next((root / "train" / "vertical").iterdir())
    bad.write_bytes(bad.read_bytes()[:60])
    recipe = change(dataset="folder", crop="rrc", workers=workers, checkpoint_steps=1)
    with pytest.raises(DataError, match=rf"^{bad}: not a readable image .*; repair or remove it and start again$"):
        run(recipe, root, tmp_path / "run")


def test_changed_data_is_reported(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = Path(shutil.copytree(images, tmp_path / "images"))
    recipe = change(dataset="folder", crop="rrc")
    run(recipe, root, tmp_path / "run", on_step=lambda done, total: os.kill(os.getpid(), signal.SIGTERM))
    next((root / "train" / "vertical").iterdir()).unlink()
    assert run(recipe, root, tmp_path / "run").finished
    assert "the train images are not those that this run began with" in caplog.text


def test_the_command_reports_errors_in_one_line(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, RECIPE)
    for arguments, message in (
        (command(recipe, images, tmp_path / "a", "epoch=3"), "ubn-zoo: epoch: unknown key; did you mean 'epochs'"),
        (command(tmp_path / "no.yaml", images, tmp_path / "a"), "ubn-zoo: no file"),
        (command(recipe, tmp_path / "nowhere", tmp_path / "a"), "ubn-zoo: "),
        (command(recipe, images, tmp_path / "a", "device=cuda:7"), "ubn-zoo: device: received 'cuda:7'"),
    ):
        assert main(arguments[3:]) == 1
        shown = capsys.readouterr()
        assert not shown.out
        assert shown.err.startswith(message), shown.err
        assert len(shown.err.strip().splitlines()) == 1
    assert not (tmp_path / "a").exists()


def test_opened_data_replaces_a_folder(tmp_path: Path) -> None:
    batches = (
        MemoryTrain(RECIPE, striped_images(64, 1), Ranks()),
        MemoryEval(RECIPE, striped_images(32, 2), Ranks()),
    )
    assert run(RECIPE, "", tmp_path / "run", data=batches).finished


def torchrun(arguments: Sequence[str], count: int, *options: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", "--standalone", *options]
    return [*launcher, *arguments[1:]]


@pytest.mark.slow
def test_two_ranks_give_the_numbers_of_one(images: Path, tmp_path: Path) -> None:
    settings = {
        "model": "resnet10t",
        "sync_norm": True,
        "optimizer": "sgd",
        "lr": 0.01,
        "momentum": 0.9,
        "ema_decay": 0.9,
    }
    recipe = write_recipe(tmp_path, change(**settings))
    alone, both = tmp_path / "alone", tmp_path / "both"
    run(change(**settings), images, alone)
    done = subprocess.run(torchrun(command(recipe, images, both), 2), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished, top-1") == 1
    one, two = read_metrics(alone / "metrics.csv"), read_metrics(both / "metrics.csv")
    assert [row.ranks for row in two] == [2, 2]
    # Several ranks sum float32 values in another order. Seen: 1e-7 to 1e-6 after eight updates; from then on rectifiers
    # switch at other moments and the difference grows, to 1e-4 of the training loss and 5e-3 of the held-out loss.
    for first, second, training, held_out in zip(one, two, (1e-5, 5e-3), (1e-4, 5e-2), strict=True):
        assert second.train_loss == pytest.approx(first.train_loss, rel=training)
        assert second.similarity_mean == pytest.approx(first.similarity_mean, rel=training)
        assert second.test_loss == pytest.approx(first.test_loss, rel=held_out)
        assert second.ema_test_loss == pytest.approx(first.ema_test_loss, rel=held_out)
        assert abs(second.top1 - first.top1) <= 100 / 32
        assert (second.gates_open, second.gates) == (first.gates_open, first.gates)


@pytest.mark.slow
def test_a_killed_rank_is_reported_and_torchrun_restarts(images: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, change(epochs=2, checkpoint_steps=2))
    folder, script = tmp_path / "run", tmp_path / "dying.py"
    # The second rank dies once, in the middle of the second epoch.
    script.write_text(
        f"""
import os, signal, sys
mark = {str(tmp_path / "died")!r}
if os.environ["RANK"] == "1" and not os.path.exists(mark):
    from ubn_zoo.training import engine as train
    real, calls = train._update, []
    def update(job, parts):
        calls.append(1)
        if len(calls) == 12:
            open(mark, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        real(job, parts)
    train._update = update
from ubn_zoo.cli import main
sys.exit(main())
"""
    )
    arguments = command(recipe, images, folder)
    arguments[1:3] = [str(script)]
    done = subprocess.run(torchrun(arguments, 2, "--max-restarts=1"), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "died").exists()
    starts = json.loads((folder / "environment.json").read_text())["starts"]
    assert [start["ranks"] for start in starts] == [2, 2]
    assert starts[1]["updates"] >= 8
    assert [row.epoch for row in read_metrics(folder / "metrics.csv")] == [1, 2]
    assert "lost another rank" in done.stderr or "exitcode  : -9" in done.stderr


def test_a_lost_rank_is_reported(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*arguments: object, **options: object) -> None:
        raise RuntimeError("[../third_party/gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:4711")

    monkeypatch.setattr(runs, "fit", lost)
    monkeypatch.setattr(Ranks, "barrier", lambda self: None)
    with pytest.raises(RunError, match="rank 0 lost another rank: .*Connection closed by peer.*starts over"):
        run(RECIPE, images, tmp_path / "run", Ranks(0, 2))
