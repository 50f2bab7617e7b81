"""The command ``ubn-zoo``.

Every module in this folder without a leading underscore is a command of the same name. Its docstring is the text of
``--help``, and the first line is the summary. ``add_arguments(parser)`` declares the options, and ``run(options)``
returns the exit code. Commands only parse and print; they import the implementation when they run.

Exit codes: 0 success; 1 the command failed and printed one message without a traceback; 2 invalid command line; 3
`predict` skipped unreadable images, or `validate` failed for some models; 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Sequence

from ubn_zoo import __version__
from ubn_zoo.cli._messages import in_options
from ubn_zoo.errors import UbnZooError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Arguments after the program name; by default ``sys.argv[1:]``.

    Returns:
        The exit code.
    """
    options = _parser().parse_args(arguments)
    try:
        code: int = options._run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (`| head`) closed the pipe; Python would report it again when it closes the stream at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UbnZooError, OSError) as error:
        print(f"ubn-zoo: {in_options(str(error), options)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ubn-zoo: interrupted", file=sys.stderr)
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ubn-zoo",
        description="Models with Unified Batch Normalization: train, measure, share.",
        epilog="`ubn-zoo COMMAND --help` describes a command and shows an example.",
    )
    parser.add_argument("--version", action="version", version=f"ubn-zoo {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for found in pkgutil.iter_modules(__path__):
        if found.name.startswith("_"):
            continue
        command = importlib.import_module(f"{__name__}.{found.name}")
        text = inspect.getdoc(command) or ""
        summary = text.partition("\n")[0].rstrip(".")
        commandline = commands.add_parser(
            found.name.replace("_", "-"),
            help=summary[:1].lower() + summary[1:],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(commandline)
        commandline.set_defaults(_run=command.run, _error=commandline.error)
    return parser
