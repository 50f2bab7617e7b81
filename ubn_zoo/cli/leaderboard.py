"""Build the leaderboard, or check rows for it.

Examples:
    ubn-zoo leaderboard build --results mine.csv speed.csv --output board
    ubn-zoo leaderboard check theirs.csv --reproduce 500 --data-dir imagenet

`build` joins the figures that converted weights inherit from timm's published tables, the accuracies of the manifest,
and results files: those of `ubn-zoo validate --results`, and speed tables of `ubn-zoo benchmark --output`. It writes
index.html (one page that needs no network), a CSV file for each test set, README.md and model-index.json. --markdown
replaces the tables in a page of the documentation.

`check` rejects rows that are incomplete or implausible, or whose weights do not match the manifest or a local file. It
prints each rejected row with the reason and exits with 1. With --reproduce, it also evaluates the models again.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="build|check")
    build = actions.add_parser("build", help="write the leaderboard's page and tables")
    build.add_argument("--results", nargs="+", default=[], metavar="FILE", help="results files and speed tables")
    build.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the files")
    build.add_argument("--markdown", type=Path, metavar="FILE", help="Markdown page whose tables are replaced")
    check = actions.add_parser("check", help="check somebody else's results file")
    check.add_argument("file", type=Path, metavar="FILE", help="results file of `ubn-zoo validate --results`")
    check.add_argument("--reproduce", type=int, metavar="N", help="evaluate every model on N images again")
    check.add_argument("--data-dir", metavar="DIR", help="folder of the test set, with --reproduce")
    check.add_argument("--workers", type=int, default=4, help="loader processes, with --reproduce (default: 4)")


def run(options: argparse.Namespace) -> int:
    """Build or check."""
    if options.action == "build":
        from ubn_zoo.evaluation.leaderboard.board import build_board
        from ubn_zoo.evaluation.leaderboard.render import write_board, write_tables

        board = build_board(options.results)
        files = write_board(board, options.output)
        if options.markdown is not None:
            write_tables(board, options.markdown)
        for name, rows in board.tables.items():
            measured = sum(row.measured != "inherited, measured by timm" for row in rows)
            print(f"{board.titles[name]}: {len(rows)} rows, {measured} of them measured")
        print(f"written: {files[0]} and {len(files) - 1} more files in {options.output}")
        return 0

    from ubn_zoo.evaluation.leaderboard.check import check_results

    if (options.reproduce is None) != (options.data_dir is None):
        options._error("--reproduce and --data-dir go together")
    accepted, rejected = check_results(
        options.file, reproduce=options.reproduce, data_dir=options.data_dir, workers=options.workers
    )
    for reason in rejected:
        print(f"rejected: {reason}")
    print(f"{accepted} of {accepted + len({reason.partition(':')[0] for reason in rejected})} rows accepted")
    return 1 if rejected else 0
