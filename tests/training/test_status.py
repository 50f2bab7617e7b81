"""The progress of a run seen from another shell, its report, and its log in Weights & Biases."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.images import write_image_folder
from tests.training.test_run import RECIPE, ROW, change
from ubn_zoo.cli import main
from ubn_zoo.errors import MissingPackageError, RunError
from ubn_zoo.evaluation.metrics import EpochMetrics, LayerSimilarity, write_metrics
from ubn_zoo.recipes.schema import dump_recipe
from ubn_zoo.training import record, status
from ubn_zoo.training.loggers import open_loggers
from ubn_zoo.training.report import report_page
from ubn_zoo.training.run import run
from ubn_zoo.training.status import Process, RunProgress, Status, StatusFile, read_status

IN_PROC = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the start of a process is read in /proc")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "draw_run", lambda folder: ())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a run that has written its recipe."""
    (tmp_path / "recipe.yaml").write_text(dump_recipe(RECIPE), encoding="utf-8")
    return tmp_path


def write(folder: Path, process: Process, *, state: str = "running", age: float = 0.0) -> None:
    found = RunProgress(RECIPE, 8, 5).status(state)
    StatusFile(folder).write(dataclasses.replace(found, process=process, written=time.time() - age))


def test_time_left_counts_updates_and_evaluations() -> None:
    now = 100.0
    progress = RunProgress(change(epochs=3, batch_size=10), 4, clock=lambda: now)
    assert progress.left is progress.images_per_second is None
    assert str(progress) == "epoch 1/3, update 0/4, starting"
    # The first update does not count, because it may compile and start loaders.
    for seconds in (50.0, 2.0, 2.0, 2.0):
        now += seconds
        progress.step()
    assert progress.images_per_second == 5.0
    assert progress.left == 8 * 2.0
    now += 30.0
    progress.epoch, progress.train_loss = 1, 1.5
    now += 2.0
    progress.step()
    assert progress.images_per_second == 5.0
    assert progress.left == 7 * 2.0 + 2 * 30.0
    assert progress.elapsed == 88.0
    assert str(progress) == "epoch 2/3, update 1/4, loss 1.500, 5 images/s, 1:14 left"
    for _ in range(7):
        progress.step()
    progress.epoch = 3
    assert progress.left == 0.0
    resumed = RunProgress(change(epochs=3), 4, 6, clock=lambda: now)
    resumed.add_elapsed(500.0)
    assert (resumed.epoch, resumed.updates, resumed.elapsed) == (1, 12, 500.0)


@IN_PROC
def test_a_process_is_known_by_more_than_its_id(folder: Path) -> None:
    own = Process.current()
    assert own.is_alive() is True
    assert dataclasses.replace(own, started="1").is_alive() is False
    assert dataclasses.replace(own, host="elsewhere").is_alive() is None
    assert dataclasses.replace(own, place="another boot pid:[1]").is_alive() is None
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    other = dataclasses.replace(own, pid=child.pid, started=(status._stat(child.pid) or ("", None))[1])
    write(folder, other)
    assert read_status(folder).state == "running"
    child.kill()
    deadline = time.monotonic() + 20
    while other.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    # It is a zombie, because its parent has not waited for it.
    assert Path(f"/proc/{child.pid}").exists()
    assert read_status(folder).state == "interrupted"
    child.wait()
    assert other.is_alive() is False
    found = read_status(folder)
    assert (found.state, found.left) == ("interrupted", None)
    assert "its process was killed or crashed; run the same command to resume" in str(found.message)


def test_a_silent_process_elsewhere_is_unknown(folder: Path) -> None:
    other = dataclasses.replace(Process.current(), host="elsewhere", pid=1)
    write(folder, other, age=60.0)
    assert read_status(folder).state == "running"
    write(folder, other, age=3600.0)
    found = read_status(folder)
    assert (found.state, found.message) == ("unknown", "no sign of process 1 on elsewhere for 1:00:00")


def test_a_run_without_a_status_is_judged_by_its_other_files(folder: Path) -> None:
    assert read_status(folder) == Status(
        state="unknown", message="the run has written no status", epoch=0, epochs=2, update=0
    )
    (folder / "status.json").write_text("{", encoding="utf-8")
    write_metrics(folder / "metrics.csv", [ROW])
    assert (read_status(folder).epoch, read_status(folder).update) == (1, 8)
    write_metrics(folder / "metrics.csv", [ROW, dataclasses.replace(ROW, epoch=2, step=16)])
    (folder / "model.safetensors").touch()
    assert (read_status(folder).state, read_status(folder).message) == ("finished", None)
    with pytest.raises(RunError, match=r"holds no recipe\.yaml; valid: the folder of a run"):
        read_status(folder / "nowhere")


def test_an_unwritable_status_does_not_stop_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "status.json")

    monkeypatch.setattr(status, "write_file", full)
    file = StatusFile(folder)
    for _ in range(2):
        file.write(RunProgress(RECIPE, 8).status("running"))
    assert caplog.text.count("the status of the run cannot be written") == 1


def test_the_status_is_written_at_intervals(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, states = 1000.0, []
    monkeypatch.setattr(status.time, "monotonic", lambda: now)
    file = StatusFile(folder)
    monkeypatch.setattr(file, "write", states.append)
    progress = RunProgress(RECIPE, 8)
    for _ in range(100):
        file.beat(progress)
        now += 1.0
    assert len(states) == 10


def shown(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> str:
    capsys.readouterr()
    assert main(["status", str(folder), *options]) == 0
    return capsys.readouterr().out


def test_the_command_follows_a_run(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    during: list[tuple[str, dict[str, Any]]] = []

    def look(row: EpochMetrics) -> None:
        during.append((shown(capsys, folder), json.loads(shown(capsys, folder, "--json"))))
        assert (folder / "report.html").read_text(encoding="utf-8").count("<circle") > 5
        if row.epoch == 1 and len(during) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    recipe = change(keep_best="loss", probe_images=0)
    run(recipe, images, folder, on_epoch=look)
    text, found = during[0]
    assert (found["state"], found["epoch"], found["epochs"], found["update"], found["updates"]) == (
        *("running", 1, 2),
        *(8, 16),
    )
    assert found["process"]["pid"] == os.getpid()
    assert found["metrics"]["epoch"] == found["best"]["epoch"] == 1
    assert found["images_per_second"] > 0 and found["left"] > 0
    assert text.startswith(f"{folder}: running\n")
    for line in (
        r"epoch +1 of 2 done, update 8 of 16 \(50 %\)",
        r"rate .* images/s",
        "left +0:0",
        "best +epoch 1, loss",
    ):
        assert re.search(line, text), text
    text = shown(capsys, folder)
    assert "run: interrupted\n" in text
    assert "stopped by SIGTERM; the state is saved; run the same command to resume" in text
    assert 'class="state interrupted"' in (folder / "report.html").read_text(encoding="utf-8")
    before = read_status(folder).elapsed

    def fail(done: int, total: int) -> None:
        raise ValueError("a bug <b>")

    with pytest.raises(ValueError, match="a bug"):
        run(recipe, images, folder, on_step=fail)
    assert "run: failed\n  why        ValueError: a bug <b>" in shown(capsys, folder)
    assert "<p>ValueError: a bug &lt;b&gt;</p>" in (folder / "report.html").read_text(encoding="utf-8")

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, images, folder, on_step=interrupt)
    assert read_status(folder).state == "interrupted"
    assert run(recipe, images, folder, on_epoch=look).finished
    finished = read_status(folder)
    assert (finished.state, finished.epoch, finished.update, finished.left) == ("finished", 2, 16, None)
    assert finished.elapsed is not None and before is not None and finished.elapsed > before
    both = json.loads(shown(capsys, folder, str(folder), "--json"))
    assert [one["state"] for one in both] == ["finished", "finished"]
    assert main(["status", str(tmp_path)]) == 1


class Tags(HTMLParser):
    """Checks that tags are closed in order."""

    VOID = ("meta", "path", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page(rows: list[EpochMetrics], similarity: list[LayerSimilarity], **settings: Any) -> tuple[str, Tags]:
    recipe = change(**settings)
    text = report_page(recipe, rows, similarity, RunProgress(recipe, 8, len(rows) * 8).status("running"), [{}])
    tags = Tags()
    tags.feed(text)
    assert not tags.open
    # The page is self-contained and needs no network.
    assert not tags.links and not {"script", "link", "img"} & set(tags.seen) and "url(" not in text
    return text, tags


def test_the_report_is_one_page() -> None:
    rows = [dataclasses.replace(ROW, epoch=epoch, top1=50.0 + epoch, lr=0.1 / epoch) for epoch in range(1, 31)]
    layers = [
        LayerSimilarity(epoch=epoch, layer=f"bn{depth}", depth=depth, similarity=0.1 * depth + 0.01 * epoch)
        for epoch in range(1, 31)
        for depth in range(5)
    ]
    text, tags = page(rows, layers, expected="<script>alert(1)</script>", epochs=40)
    assert tags.seen.count("svg") == 4  # loss, accuracy, learning rate, similarity by layer
    assert tags.seen.count("circle") == 4 * 30 + 2 * 5
    assert "&lt;script&gt;" in text
    assert "30 of 40" in text and "<td>80.00</td>" in text
    assert "epoch 30, top-1: 80" in text
    none, tags = page([], [])
    assert "No epoch is done yet" in none and "svg" not in tags.seen
    _, tags = page([dataclasses.replace(ROW, train_loss=float("inf"))], [])
    assert tags.seen.count("svg") == 3


def test_the_report_of_a_long_run_stays_light() -> None:
    rows = [dataclasses.replace(ROW, epoch=epoch, ema_top1=70.0, top5=90.0) for epoch in range(1, 601)]
    text, tags = page(rows, [], epochs=600, ema_decay=0.9)
    assert len(text) < 400_000
    assert "circle" not in tags.seen
    assert all(len(line.split()) <= 400 for line in re.findall(r'points="([^"]*)"', text))


FAKE_WANDB = """
import json, pathlib

class Error(Exception):
    pass

class Run:
    def __init__(self, options):
        self.file = pathlib.Path(options["dir"]) / "fake.jsonl"
        config = options.pop("config")
        self.write({"init": {**options, "model": config["model"]}})
    def write(self, value):
        with self.file.open("a") as file:
            file.write(json.dumps(value) + "\\n")
    def define_metric(self, name, step_metric):
        self.write({"metric": [name, step_metric]})
    def log(self, values):
        if values["update"] > 40:
            raise Error("the service is gone")
        self.write({"log": values})
    def finish(self, exit_code):
        self.write({"finish": exit_code})

def init(**options):
    if options["project"] == "forbidden":
        raise Error("api_key not configured")
    return Run(options)
"""


def test_weights_and_biases_gets_the_same_curves(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "wandb.py").write_text(FAKE_WANDB, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    folder = tmp_path / "run"
    recipe = change(wandb_project="digits", log_interval=3, probe_images=0)
    run(recipe, images, folder, on_epoch=lambda row: os.kill(os.getpid(), signal.SIGTERM))
    assert run(recipe, images, folder).finished
    lines = [json.loads(line) for line in (folder / "fake.jsonl").read_text(encoding="utf-8").splitlines()]
    starts = [line["init"] for line in lines if "init" in line]
    assert starts[0] == starts[1]
    assert (starts[0]["project"], starts[0]["name"], starts[0]["resume"]) == ("digits", "run", "allow")
    assert [line["finish"] for line in lines if "finish" in line] == [1, 0]
    assert {"metric": ["*", "update"]} in lines
    points = [line["log"] for line in lines if "log" in line]
    assert [point["update"] for point in points if "train/loss" in point] == [3, 6, 8, 9, 12, 15, 16]
    assert [point["update"] for point in points if "test/top1" in point] == [8, 16]
    log = open_loggers(recipe, folder, 0)[-1]
    for updates in (41, 42):
        log.log({"train/loss": 1.0}, updates)
    log.close(True)
    assert caplog.text.count("Weights & Biases gets no more of this run: the service is gone") == 1
    with pytest.raises(RunError, match=r"does not start: api_key not configured; log in with `wandb login`"):
        run(change(wandb_project="forbidden"), images, tmp_path / "other")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)


def test_missing_weights_and_biases_are_reported_before_anything_is_written(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = record.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "wandb" else real(name, *rest))
    with pytest.raises(
        MissingPackageError, match=r"received 'digits', and wandb is missing; pip install 'ubn-zoo\[wandb]"
    ):
        run(change(wandb_project="digits"), images, tmp_path / "run")
    assert not (tmp_path / "run").exists()
