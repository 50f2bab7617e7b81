"""Progress on a terminal and elsewhere."""

from __future__ import annotations

import io

from ubn_zoo.progress import Progress


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
    lines = Progress("train", stream=log, interval=0.0)
    lines(0, 4)
    lines(2, 4)
    assert log.getvalue().splitlines()[0] == "train: 0/4, 0 images/s, starting"
    assert "train: 2/4" in log.getvalue().splitlines()[1]
    assert "left" in log.getvalue().splitlines()[1]
