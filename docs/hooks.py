"""MkDocs hooks of the documentation site.

Links in the repository are relative paths, as GitHub shows them. The site holds the files of ``docs/`` at its root and
the files of ``OUTSIDE`` under their own path; links between them are adapted when the site is built.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from ubn_zoo.evaluation.leaderboard.board import build_board
from ubn_zoo.evaluation.leaderboard.render import board_files

REPOSITORY = Path(__file__).parents[1]
# Files outside docs/ that pages link to.
OUTSIDE = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "results/README.md", "results/*.csv"]
EVALUATIONS = "results/leaderboard/*.csv"
LEADERBOARD = "\n\n**[Open the leaderboard](leaderboard/index.html)**: search, filter, compare, charts.\n"

# Code first, so that an example of a link stays as it is.
_LINK = re.compile(r"```.*?```|`[^`]*`|\]\((?![a-z]+:|[/#])([^)\s#]+)", re.DOTALL)
# mkdocstrings shows a Sphinx role such as :func:`name` as text followed by code.
_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):<code>[~.]?")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside ``docs/``, and the leaderboard, which is built from the committed results."""
    for pattern in OUTSIDE:
        for path in sorted(REPOSITORY.glob(pattern)):
            name = path.relative_to(REPOSITORY).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    board = build_board([REPOSITORY / "results" / "benchmark_cpu.csv", *sorted(REPOSITORY.glob(EVALUATIONS))])
    for name, content in board_files(board).items():
        if name != "README.md":
            files.append(File.generated(config, f"leaderboard/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between files of the site."""
    here = page.file.src_uri
    source = here if page.file.generated_by else f"docs/{here}"

    def adapted(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        return "](" + posixpath.relpath(target.removeprefix("docs/"), posixpath.dirname(here) or ".")

    if here == "leaderboard.md":
        markdown = markdown.replace("\n", LEADERBOARD, 1)
    return _LINK.sub(adapted, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show Sphinx roles of docstrings as code."""
    return _ROLE.sub("<code>", html)
