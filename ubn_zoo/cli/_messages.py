"""Messages in the caller's language: arguments of Python functions as options of the command line."""

from __future__ import annotations

import argparse
import re

__all__ = ["in_options"]

_ARGUMENT = re.compile(r"`(?P<name>[a-z][a-z_]*)(?:=(?P<value>[^`]*))?`")


def in_options(message: str, options: argparse.Namespace) -> str:
    """Rewrite the arguments that a message names in backquotes as options: ```replace=True``` becomes ``--replace``.

    Args:
        message: Of an error that a Python function raised.
        options: The parsed command line; only names that it has are rewritten.
    """

    def option(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"]
        if not hasattr(options, name):
            return match[0]
        flag = f"--{name.replace('_', '-')}"
        return flag if value in (None, "True") else f"{flag} {value}"

    return _ARGUMENT.sub(option, message)
