"""Whether one objective, the next token or the next embedding, works for both directions, or specialised ones win.

Small networks of the same sizes learn from the same pairs in the same number of steps, each with another objective; then
their captions are read by the world's grammar and their pictures by its checker. objectives/README.md has the arms.

    python tests/benchmarks/benchmark_objectives.py run outputs/objectives
    python tests/benchmarks/benchmark_objectives.py run outputs/objectives --arms decoder-tuned cosine --seeds 0
    python tests/benchmarks/benchmark_objectives.py report outputs/objectives

The first goes on where it was stopped, as often as it is stopped. Seeds may run side by side, each in its own process.
"""

import argparse
import logging
from dataclasses import fields
from pathlib import Path

from objectives.arms import ARMS, FIRST_ARMS
from objectives.report import draw_plot, make_table
from objectives.runner import Settings, read_results, run_experiment

from modeling_emu.cli.loading import pick_device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, dest="command")
    run = commands.add_parser("run", help="train and measure what is not done yet")
    run.add_argument("output", type=Path)
    run.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    run.add_argument("--arms", nargs="+", choices=ARMS, default=[arm.name for arm in FIRST_ARMS])
    run.add_argument("--device", default="cpu", help="cpu, cuda or auto; the default is %(default)s")
    for field in fields(Settings):
        name = f"--{field.name.replace('_', '-')}"
        run.add_argument(name, type=field.type, default=field.default, help="the default is %(default)s")
    report = commands.add_parser("report", help="print the table of what is done, and write it and the plot")
    report.add_argument("output", type=Path)
    report.add_argument("--to", type=Path, help="folder for table.md and plot.png; the default is that of the run")
    arguments = parser.parse_args()
    if arguments.command == "run":
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        settings = Settings(**{field.name: getattr(arguments, field.name) for field in fields(Settings)})
        run_experiment(arguments.output, arguments.seeds, arguments.arms, settings, str(pick_device(arguments.device)))
        return
    results = read_results(arguments.output)
    table, plot = make_table(results), draw_plot(results)
    folder = arguments.to or arguments.output
    (folder / "table.md").write_text(table, encoding="utf-8")
    plot.save(folder / "plot.png")
    print(table)


if __name__ == "__main__":
    main()
