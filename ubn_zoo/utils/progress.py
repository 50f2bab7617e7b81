"""Progress of long loops: a bar on a terminal, silence elsewhere."""

from __future__ import annotations

import math
import sys
import time
from typing import TextIO

__all__ = ["Progress"]

WIDTH = 24


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Shows how far a loop is, how fast and for how long yet.

    On a terminal one line is drawn again and again, and wiped when the loop ends. Elsewhere (a log file, a pipe)
    nothing is shown, unless an interval is asked for. Speed is that since the first call: a loop may start midway.

    Args:
        label: What the loop does.
        unit: What is counted, for the rate.
        stream: Where it is shown; by default standard error, so that results on standard output stay clean.
        interval: Seconds between lines where the stream is no terminal; by default there are none.
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

    def __call__(self, done: int, total: int) -> None:
        """Tell that `done` of `total` are done."""
        now = time.monotonic()
        before, start = self._first = self._first or (done, now)
        if now - self._shown < self._interval and not (self._terminal and done == total):
            return
        self._shown = now
        rate = (done - before) / max(now - start, 1e-9)
        left = f"{_duration((total - done) / rate)} left" if rate else "starting"
        text = f"{self._label}: {done}/{total}, {rate:.0f} {self._unit}/s, {left}"
        if self._terminal:
            filled = WIDTH * done // max(total, 1)
            self._stream.write(f"\r\x1b[K[{'#' * filled}{'.' * (WIDTH - filled)}] {text}")
        else:
            self._stream.write(f"{text}\n")
        self._stream.flush()

    def close(self) -> None:
        """Wipe the bar, so that the next line starts clean."""
        if self._terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
