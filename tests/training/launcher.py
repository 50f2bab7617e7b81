"""Start many ``ubn-zoo`` commands fast, as forks of a process that has already imported everything.

As a script, it reads one JSON list of arguments per line from standard input, forks for each, and prints the child's id
and later its exit status. Each child is a normal process with its own session.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, cast

from ubn_zoo.cli import main


class Launcher:
    """Starts commands one after the other; each must be waited for before the next."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._in, self._out = cast(IO[str], process.stdin), cast(IO[str], process.stdout)

    def start(self, arguments: Sequence[str], errors: str) -> int:
        """Start a command; its standard error goes to a file. Returns its process id."""
        print(json.dumps([errors, *arguments]), file=self._in, flush=True)
        return int(self._out.readline())

    def wait(self) -> int:
        """Wait for the command; returns its exit code, negative for a signal."""
        return os.waitstatus_to_exitcode(int(self._out.readline()))


@contextmanager
def launcher() -> Iterator[Launcher]:
    command = [sys.executable, "-m", "tests.training.launcher"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Launcher(process)
        cast(IO[str], process.stdin).close()


def serve() -> None:
    import ubn_zoo.training.run  # noqa: F401 - what every child needs

    for line in sys.stdin:
        errors, *arguments = json.loads(line)
        child = os.fork()
        if not child:
            os.setsid()
            os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            os.dup2(os.open(os.devnull, os.O_RDWR), 1)
            os.dup2(1, 0)
            sys.exit(main(arguments))
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    serve()
