"""Run grids of experiments, collect their measurements, and make their page and figures.

    python -m research.experiments list                      # the committed grids
    python -m research.experiments run GRID --data-dir DIR   # trains the missing runs, evaluates them at the end
    python -m research.experiments collect GRID              # finished runs -> results/GRID*.csv
    python -m research.experiments cost GRID                 # times of a training step -> results/GRID_cost.csv
    python -m research.experiments report [GRID ...]         # results/*.csv -> docs/results.md and its figures

GRID is the name of a committed grid or the path of a YAML file. An interrupted run resumes. Several commands, also on
several machines that share the folder of runs, can work on one grid.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from research.experiments.grid import list_grids, load_grid, plan
from research.experiments.report import report
from research.experiments.runs import train
from research.experiments.tables import collect, cost
from ubn_zoo.errors import UbnZooError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="list the committed grids")
    running = commands.add_parser("run", help="train the missing runs of a grid")
    running.add_argument("--data-dir", help="image folder, or digits; by default the grid's own data")
    running.add_argument("--processes", type=int, default=1, help="runs to train at a time (default: 1)")
    running.add_argument("--nice", type=int, default=10, help="niceness of the processes (default: 10)")
    collecting = commands.add_parser("collect", help="write results/GRID*.csv from finished runs")
    timing = commands.add_parser("cost", help="time a training step of every variant")
    for command in (running, collecting, timing):
        command.add_argument("grid", metavar="GRID", help="name of a committed grid, or a .yaml file")
    for command in (running, collecting):
        command.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (default: runs)")
    reporting = commands.add_parser("report", help="make the page and its figures from results/*.csv")
    reporting.add_argument("grids", metavar="GRID", nargs="*", help="by default all committed grids with results")
    reporting.add_argument("--docs", type=Path, default=Path("docs"), help="folder that gets them (default: docs)")
    for command in (collecting, timing, reporting):
        command.add_argument("--results", type=Path, default=Path("results"), help="folder of the CSV files")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "list":
            for name in list_grids():
                grid = load_grid(name)
                print(f"{name}: {grid.title} ({len(plan(grid, 'runs'))} runs)")
        elif options.command == "run":
            done = train(options.grid, options.data_dir, options.runs, processes=options.processes, nice=options.nice)
            if not done:
                print("not finished; the same command resumes")
                return 1
        elif options.command == "cost":
            print(cost(load_grid(options.grid), options.results))
        elif options.command == "collect":
            options.results.mkdir(parents=True, exist_ok=True)
            print(*collect(load_grid(options.grid), options.runs, options.results), sep="\n")
        else:
            options.docs.mkdir(parents=True, exist_ok=True)
            print(*report(options.results, options.docs, [load_grid(name) for name in options.grids]), sep="\n")
    except (UbnZooError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
