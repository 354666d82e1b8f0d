"""Speed in tables, as JSON and in the pages of docs/ that have their places: scripts/benchmarks/bench.py TABLE

Sides are measured in turns. Nothing else should run on the machine; the load stands beside the numbers.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts.benchmarks import report

# name, also of the module that measures it -> the page that shows it
TABLES = {
    "loop": "performance",
    "ablation": "performance",
    "peers": "performance",
    "data": "performance",
    "stream": "performance",
    "checkpoint": "performance",
    "scale": "performance",
    "engines": "distributed",
    "predictions": "distributed",
    "lora": "stable_diffusion",
    "peer_quality": "conditional",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--pairs", type=int, default=5, help="repetitions of every side")
    parser.add_argument("--steps", type=int, default=40, help="of training that are timed, after a warm-up")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a repetition of the table `data`")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--assume", nargs="+", default=[], metavar="NAME=VALUE", help="hardware of `predictions`")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    module = importlib.import_module(f"scripts.benchmarks.{asked.table}")
    assumed = module.described(module.assumptions(asked.assume)) if asked.table == "predictions" else None
    command, document = (
        f"scripts/benchmarks/bench.py {' '.join(sys.argv[1:])}",
        report.DOCS / f"{TABLES[asked.table]}.md",
    )
    for table, rows in module.tables(asked).items():
        print(report.write(table, rows, command, document, assumed))


if __name__ == "__main__":
    main()
