#!/usr/bin/env python3
"""Run paired experiments, collect their measurements, and make their tables and plots.

    python -m research.experiments list                                   # names of the committed grids
    python -m research.experiments run GRID [--data-dir DIR]              # trains the missing runs of a grid
    python -m research.experiments collect NAME                           # runs -> results/NAME.csv
    python -m research.experiments cost NAME                              # step times -> results/NAME_cost.csv
    python -m research.experiments report                                 # results/*.csv -> docs/*.png, docs/results.md

GRID is the name of a committed grid or the path of a YAML file. An interrupted run resumes. Several commands, also on
several machines that share the folder of runs, can work on one grid.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from research.experiments import EXPERIMENTS, collect, cost, get_experiment, report
from research.experiments.grid import list_grids, load_grid, plan
from research.experiments.runs import train

NAMES = [experiment.name for experiment in EXPERIMENTS]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="list the committed grids")
    running = commands.add_parser("run", help="train the missing runs of a grid")
    running.add_argument("name", metavar="GRID", help="name of a committed grid, or a .yaml file")
    running.add_argument("--data-dir", help="image folder, or digits; by default the grid's own data")
    running.add_argument("--processes", type=int, default=1, help="runs to train at a time (default: 1)")
    running.add_argument("--nice", type=int, default=10, help="niceness of the processes (default: 10)")
    collecting = commands.add_parser("collect", help="write results/NAME.csv from finished runs")
    timing = commands.add_parser("cost", help="time a training step of every variant")
    for command in (collecting, timing):
        command.add_argument("name", choices=NAMES)
    for command in (running, collecting, timing):
        command.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs")
    reporting = commands.add_parser("report", help="make tables and plots from results/*.csv")
    reporting.add_argument("--docs", type=Path, default=Path("docs"), help="folder that gets them")
    for command in (collecting, timing, reporting):
        command.add_argument("--results", type=Path, default=Path("results"), help="folder of the CSV files")
    options = parser.parse_args(arguments)
    if options.command == "list":
        for name in list_grids():
            grid = load_grid(name)
            print(f"{name}: {grid.title} ({len(plan(grid, 'runs'))} runs)")
    elif options.command == "run":
        if not train(options.name, options.data_dir, options.runs, processes=options.processes, nice=options.nice):
            print("stopped; the same command resumes")
            return 1
    elif options.command == "cost":
        print(cost(get_experiment(options.name), options.results))
    elif options.command == "collect":
        print(*collect(get_experiment(options.name), options.runs, options.results), sep="\n")
    else:
        print(*report(options.results, options.docs), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
