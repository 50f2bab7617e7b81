"""Text that becomes public: escaped for Markdown and HTML, and free of secrets."""

from __future__ import annotations

import html
import re

from huggingface_hub import get_token

__all__ = ["code", "escape", "find_secret", "hide_secrets"]

_MARKDOWN = re.compile(r"([\\`*_\[\]|~$])")
_BLOCK_START = re.compile(r"^([#+=-]|\d+(?=[.)]))")
_HIDDEN = "***"

# The group ``secret`` of each pattern must not be shown.
_SECRETS = (
    # NAME=VALUE, as a shell sets a variable, and --name VALUE, as a command takes an option.
    re.compile(
        r"\b[A-Z0-9_]*(?:TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|CREDENTIALS?)[A-Z0-9_]*=(?P<secret>[^\s*]\S*)"
    ),
    re.compile(r"--?(?:[a-z]+-)*(?:token|secret|password|api-key|access-key)[ =](?P<secret>[^\s*]\S*)"),
    re.compile(r"\b[Bb]earer (?P<secret>[A-Za-z0-9._~+/-]{8,}=*)"),
    # Tokens by their issuers' prefixes: Hugging Face, GitHub, GitLab, OpenAI, Amazon, Slack.
    re.compile(r"\b(?P<secret>hf_(?:(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{8,}|[A-Za-z0-9]{16,}))"),
    re.compile(r"\b(?P<secret>gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|sk-[\w-]{16,})"),
    re.compile(r"\b(?P<secret>AKIA[0-9A-Z]{16}|xox[abprs]-[\w-]{10,})"),
    # User and password in a URL.
    re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]*://(?P<secret>[^\s/@*]+)@"),
)


def escape(text: str) -> str:
    """Escape text for a Markdown page, so that it is shown literally and on one line.

    Args:
        text: Any text, for example the name of a dataset. Whitespace is collapsed to single spaces.
    """
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    line = _MARKDOWN.sub(r"\\\1", html.escape(line, quote=False))
    line = _BLOCK_START.sub(lambda match: f"{match[1]}\\" if match[1].isdigit() else f"\\{match[1]}", line)
    # Write the colon as an entity, because URLs would become links.
    return line.replace("://", "&#58;//")


def code(text: str, *, cell: bool = False) -> str:
    """Format text as a Markdown code span.

    Args:
        text: Any text, for example a command. Whitespace is collapsed to single spaces.
        cell: Whether the span is in a table cell, where ``|`` must be escaped even in code.
    """
    line = " ".join(text.split())
    line = line.replace("|", r"\|") if cell else line
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def hide_secrets(text: str) -> str:
    """Replace tokens, passwords and other apparent secrets with ``***``.

    Args:
        text: Text, for example a command line.
    """
    for pattern in _SECRETS:
        text = pattern.sub(lambda match: match[0].replace(match["secret"], _HIDDEN), text)
    token = get_token()
    return text.replace(token, _HIDDEN) if token else text


def find_secret(text: str) -> str | None:
    """Find the first secret in a text and return its context with the secret hidden; None if there is none.

    Args:
        text: The content of a file.
    """
    for line in text.splitlines():
        hidden = hide_secrets(line)
        if hidden != line:
            position = hidden.find(_HIDDEN)
            return hidden[max(0, position - 40) : position + len(_HIDDEN)].strip()
    return None
