"""Rewrite the messages of Python functions in terms of command-line options."""

from __future__ import annotations

import argparse
import re

__all__ = ["in_options"]

_ARGUMENT = re.compile(r"`(?P<name>[a-z][a-z_]*)(?:=(?P<value>[^`]*))?`")


def in_options(message: str, options: argparse.Namespace) -> str:
    """Replace Python arguments in backquotes with options: ```replace=True``` becomes ``--replace``.

    Args:
        message: Message of an error that a Python function raised.
        options: Parsed command line; only names of its options are rewritten.
    """

    def option(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"]
        if not hasattr(options, name):
            return match[0]
        flag = f"--{name.replace('_', '-')}"
        return flag if value in (None, "True") else f"{flag} {value}"

    return _ARGUMENT.sub(option, message)
