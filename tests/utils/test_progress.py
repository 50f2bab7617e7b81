"""Progress on a terminal and elsewhere."""

from __future__ import annotations

import io
import time

import pytest

from ubn_zoo.utils.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_on_a_terminal_and_quiet_elsewhere() -> None:
    terminal, log = Terminal(), io.StringIO()
    for stream in (terminal, log):
        progress = Progress("train", stream=stream)
        progress(1, 4)
        progress(4, 4)
        progress.close()
    assert "train: 4/4" in terminal.getvalue()
    assert "#" * 24 in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[K")
    assert log.getvalue() == ""


def test_progress_counts_from_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 12.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    log = io.StringIO()
    lines = Progress("train", stream=log, interval=0.0)
    lines(50, 100)
    lines(60, 100)
    assert log.getvalue().splitlines() == [
        "train: 50/100, 0 images/s, starting",
        "train: 60/100, 5 images/s, 0:08 left",
    ]
