"""How far a run is: measured while it trains, and read by ``ubn-zoo status`` from another shell.

A run writes ``status.json`` into its folder every few seconds. Whether the process that wrote it is alive is decided by
its process id together with its start time, host and container, since ids are used again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ubn_zoo.errors import RunError
from ubn_zoo.evaluation.metrics import EpochMetrics, read_metrics
from ubn_zoo.recipes.schema import Recipe, load_recipe
from ubn_zoo.training.folder import BEST, METRICS, RECIPE, is_finished, read_best
from ubn_zoo.utils.files import write_file
from ubn_zoo.utils.progress import duration

__all__ = ["Process", "RunProgress", "Status", "StatusFile", "describe_run", "read_status"]

STATUS = "status.json"
_INTERVAL = 10.0  # seconds between two writes of the file
_SILENT = 300.0  # seconds without a write after which a process that cannot be looked at counts as gone
_WINDOW = 100  # updates that the rate is an average of, the newest with the most weight
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A process, told from others that have or had the same id.

    Attributes:
        host: Name of its machine.
        place: The machine's boot and the container in which its id holds; None where the system does not tell.
        pid: Its id.
        started: When it started, in the system's own unit; None where the system does not tell.
    """

    host: str
    place: str | None
    pid: int
    started: str | None

    @classmethod
    def current(cls) -> Process:
        """This process."""
        pid = os.getpid()
        return cls(host=socket.gethostname(), place=_place(), pid=pid, started=(_stat(pid) or ("", None))[1])

    def is_alive(self) -> bool | None:
        """Whether it is running; None if that cannot be seen from here, such as on another host."""
        if (self.host, self.place) != (socket.gethostname(), _place()) or os.name != "posix":
            return None
        if self.place is not None:
            found = _stat(self.pid)
            return found is not None and found[0] not in ("Z", "X") and found[1] == self.started
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True


def _place() -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _stat(pid: int) -> tuple[str, str | None] | None:
    """State and start time of a process; None if there is none, or the system does not tell."""
    try:
        # The name, in parentheses, may hold spaces and parentheses.
        values = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return values[0], values[19]
    except (OSError, IndexError):
        return None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """How far a run is.

    Attributes:
        state: ``running``, ``finished``, ``interrupted`` (by a signal, or killed), ``failed`` (with an error) or
            ``unknown`` (its process cannot be seen from here and is silent, or the run left no status).
        message: Why, for the last three; None otherwise.
        epoch: Epochs done, evaluation included.
        epochs: Epochs of the recipe.
        update: Updates made.
        updates: Updates of all epochs; None if the run did not tell.
        images_per_second: Training images of all ranks per second, evaluation left out; None before the second update.
        elapsed: Seconds that the run has run, over all starts.
        left: Seconds left, evaluation included once one has been timed; None if there is no estimate.
        train_loss: Mean loss of the current epoch at the last point of the log; None before the first.
        lr: Learning rate at that point.
        written: When this was written, in seconds since 1970; None if the run left no status.
        process: The process that trains, or trained.
    """

    state: str
    message: str | None = None
    epoch: int
    epochs: int
    update: int
    updates: int | None = None
    images_per_second: float | None = None
    elapsed: float | None = None
    left: float | None = None
    train_loss: float | None = None
    lr: float | None = None
    written: float | None = None
    process: Process | None = None


class RunProgress:
    """Progress of a run: rate and time left, by its own clock.

    Args:
        recipe: The run.
        steps: Updates per epoch.
        update: Updates made before this start.
        clock: Seconds that pass.
    """

    def __init__(
        self,
        recipe: Recipe,
        steps: int,
        update: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.epochs, self.epoch = recipe.epochs, update // steps
        self.updates, self.update = recipe.epochs * steps, update
        self.train_loss: float | None = None
        self.lr: float | None = None
        self._batch_size, self._steps = recipe.batch_size, steps
        self._clock = clock
        self._elapsed, self._start = 0.0, clock()
        self._last: float | None = None
        self._step_seconds, self._timed = 0.0, 0
        self._between_seconds, self._between = 0.0, 0

    def add_elapsed(self, seconds: float) -> None:
        """Add the time that earlier starts of the run have taken."""
        self._elapsed += seconds

    def step(self) -> None:
        """Count an update."""
        now = self._clock()
        if self._last is not None:
            seconds = now - self._last
            if self.update % self._steps:
                self._timed += 1
                self._step_seconds += (seconds - self._step_seconds) / min(self._timed, _WINDOW)
            else:
                # From the last update of an epoch to the first of the next there is an evaluation.
                self._between += 1
                self._between_seconds += (
                    max(seconds - self._step_seconds, 0.0) - self._between_seconds
                ) / self._between
        self._last = now
        self.update += 1

    @property
    def images_per_second(self) -> float | None:
        """Training images of all ranks per second; None before the second update."""
        return self._batch_size / self._step_seconds if self._step_seconds else None

    @property
    def elapsed(self) -> float:
        """Seconds that the run has run, over all starts."""
        return self._elapsed + self._clock() - self._start

    @property
    def left(self) -> float | None:
        """Seconds left; None without an estimate."""
        if self.update == self.updates and self.epoch == self.epochs:
            return 0.0
        if not self._step_seconds:
            return None
        evaluations = (self.epochs - self.epoch) * self._between_seconds
        return (self.updates - self.update) * self._step_seconds + evaluations

    def __str__(self) -> str:
        """One line: epoch, update, loss, rate, time left for the whole run."""
        step = (self.update - 1) % self._steps + 1 if self.update else 0
        parts = [f"epoch {min(self.epoch + 1, self.epochs)}/{self.epochs}, update {step}/{self._steps}"]
        if self.train_loss is not None:
            parts.append(f"loss {self.train_loss:.3f}")
        rate, left = self.images_per_second, self.left
        parts.append("starting" if rate is None else f"{rate:.0f} images/s")
        if left is not None:
            parts.append(f"{duration(left)} left")
        return ", ".join(parts)

    def status(self, state: str, message: str | None = None) -> Status:
        """The status at this moment, of this process."""
        return Status(
            state=state,
            message=message,
            epoch=self.epoch,
            epochs=self.epochs,
            update=self.update,
            updates=self.updates,
            images_per_second=self.images_per_second,
            elapsed=self.elapsed,
            left=self.left if state == "running" else None,
            train_loss=self.train_loss,
            lr=self.lr,
            written=time.time(),
            process=Process.current(),
        )


class StatusFile:
    """Writes a run's ``status.json``.

    Args:
        folder: Folder of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / STATUS
        self._written = -_INTERVAL
        self._failed = False

    def elapsed(self) -> float:
        """Seconds that earlier starts of the run have taken, as far as they are recorded."""
        found = _read(self._path)
        return (found.elapsed or 0.0) if found else 0.0

    def beat(self, progress: RunProgress) -> None:
        """Write that the run is alive, unless that was written a moment ago."""
        now = time.monotonic()
        if now - self._written >= _INTERVAL:
            self._written = now
            self.write(progress.status("running"))

    def write(self, status: Status) -> None:
        """Write a status; that it cannot be written is a warning, since training does not depend on it."""
        try:
            # Without waiting for the disk: after a power failure nobody needs it.
            write_file(self._path, json.dumps(dataclasses.asdict(status), indent=2) + "\n", durable=False)
        except OSError as error:
            if not self._failed:
                _logger.warning("the status of the run cannot be written: %s", error)
            self._failed = True


def _read(path: Path) -> Status | None:
    try:
        values: dict[str, Any] = json.loads(path.read_bytes())
        return Status(**{**values, "process": Process(**values["process"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def read_status(folder: str | os.PathLike[str]) -> Status:
    """Read how far a run is, from any process.

    Args:
        folder: Folder of the run: in progress, interrupted, failed or finished.

    Raises:
        RunError: It is not the folder of a run.
        RecipeError, EvaluationError: Its recipe or metrics are not valid.
    """
    place = Path(folder)
    if not (place / RECIPE).is_file():
        raise RunError(
            f"{place} holds no {RECIPE}; valid: the folder of a run, as --output of `ubn-zoo train` names it"
        )
    found = _read(place / STATUS)
    if found is None:
        found = _without_status(place)
    if found.state == "running" and found.process is not None and found.written is not None:
        alive, age = found.process.is_alive(), time.time() - found.written
        if alive is None and age > _SILENT:
            message = f"no sign of process {found.process.pid} on {found.process.host} for {duration(age)}"
            found = dataclasses.replace(found, state="unknown", message=message, left=None)
        elif alive is False:
            message = "its process was killed or crashed; run the same command to resume from the last checkpoint"
            found = dataclasses.replace(found, state="interrupted", message=message, left=None)
    if found.state in ("interrupted", "unknown") and is_finished(place):
        found = dataclasses.replace(found, state="finished", message=None, epoch=found.epochs)
    return found


def describe_run(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The status of a run as JSON, with its model, its last row of metrics and its best epoch.

    Args:
        folder: Folder of the run.

    Raises:
        RunError, RecipeError, EvaluationError: As `read_status` does.
    """
    place = Path(folder)
    status, recipe, best = read_status(place), load_recipe(place / RECIPE), read_best(place / BEST)
    rows = read_metrics(place / METRICS) if (place / METRICS).exists() else ()
    return {
        "folder": str(place),
        "model": recipe.model,
        "norm": recipe.norm,
        "seed": recipe.seed,
        **dataclasses.asdict(status),
        "metrics": dataclasses.asdict(rows[-1]) if rows else None,
        "best": None if best is None else dict(zip(("epoch", "metric", "value"), best, strict=True)),
    }


def _without_status(folder: Path) -> Status:
    """What the other files of a run tell."""
    epochs = load_recipe(folder / RECIPE).epochs
    rows: tuple[EpochMetrics, ...] = ()
    with contextlib.suppress(FileNotFoundError):
        rows = read_metrics(folder / METRICS)
    return Status(
        state="unknown",
        message="the run has written no status",
        epoch=len(rows),
        epochs=epochs,
        update=rows[-1].step if rows else 0,
    )
