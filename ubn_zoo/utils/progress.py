"""Progress of long loops: a bar on a terminal, silence elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import TextIO

__all__ = ["Progress", "duration"]

WIDTH = 24


def duration(seconds: float) -> str:
    """Seconds as ``minutes:seconds`` or ``hours:minutes:seconds``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Shows the progress of a loop, its rate and the time left.

    On a terminal, one line is updated in place and removed when the loop ends. A log file or a pipe gets no output
    unless `interval` is given. The rate is measured from the first call, because a loop may start midway.

    Args:
        label: Name of the loop.
        unit: Unit of the count, for the rate.
        stream: Output stream; by default standard error, to keep standard output free for results.
        interval: Seconds between lines if the stream is not a terminal; by default there are no lines.
    """

    def __init__(
        self, label: str, *, unit: str = "images", stream: TextIO | None = None, interval: float = math.inf
    ) -> None:
        self._label = label
        self._unit = unit
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._interval = 0.1 if self._terminal else interval
        self._shown = time.monotonic()
        self._first: tuple[int, float] | None = None

    def __call__(self, done: int, total: int, text: Callable[[], str] | None = None) -> None:
        """Report that `done` of `total` are done.

        Args:
            done: Units done.
            total: Total number of units.
            text: Returns text to show instead of count, rate and time left; called only when a line is printed.
        """
        now = time.monotonic()
        before, start = self._first = self._first or (done, now)
        if now - self._shown < self._interval and not (self._terminal and done == total):
            return
        self._shown = now
        if text is None:
            rate = (done - before) / max(now - start, 1e-9)
            left = f"{duration((total - done) / rate)} left" if rate else "starting"
            shown = f"{done}/{total}, {rate:.0f} {self._unit}/s, {left}"
        else:
            shown = text()
        if self._terminal:
            filled = WIDTH * done // max(total, 1)
            self._stream.write(f"\r\x1b[K[{'#' * filled}{'.' * (WIDTH - filled)}] {self._label}: {shown}")
        else:
            self._stream.write(f"{self._label}: {shown}\n")
        self._stream.flush()

    def close(self) -> None:
        """Remove the bar, so that the next line starts clean."""
        if self._terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
