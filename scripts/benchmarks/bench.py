"""Speed in tables, as JSON and in docs/performance.md: scripts/benchmarks/bench.py TABLE

Tables about several processes stand in docs/distributed.md; `predictions` measures nothing. Sides are measured in
turns. Nothing else should run on the machine; the load stands beside the numbers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts.benchmarks import (
    ablation,
    checkpoint,
    data,
    engines,
    loop,
    peers,
    predictions,
    report,
    scale,
    scaling,
    stream,
)

TABLES = {
    "loop": lambda asked: loop.table(asked.pairs, asked.steps, asked.tasks),
    "ablation": lambda asked: ablation.table(asked.pairs, asked.steps),
    "data": lambda asked: data.table(asked.pairs, asked.seconds),
    "peers": lambda asked: peers.table(asked.pairs, asked.steps),
    "checkpoint": lambda asked: checkpoint.table(asked.config, asked.pairs),
    "stream": lambda asked: stream.table(asked.pairs),
    "scale": lambda asked: scale.table(asked.pairs, asked.steps),
    "engines": lambda asked: engines.tables(asked.pairs, asked.steps),
    "predictions": lambda asked: predictions.tables(scaling.assumptions(asked.assume)),
}
DOCUMENTS = dict.fromkeys(("engines", "predictions"), report.DISTRIBUTED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--pairs", type=int, default=5, help="repetitions of every side")
    parser.add_argument("--steps", type=int, default=40, help="of training that are timed, after a warm-up")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a repetition of the table `data`")
    parser.add_argument("--tasks", nargs="+", choices=loop.TASKS, default=loop.TASKS, help="of the table `loop`")
    parser.add_argument("--config", default="configs/ddpm_digits.yaml", help="of the table `checkpoint`")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--assume", nargs="+", default=[], metavar="NAME=VALUE", help="hardware of `predictions`")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    found = TABLES[asked.table](asked)
    assumed = predictions.described(scaling.assumptions(asked.assume)) if asked.table == "predictions" else None
    document = DOCUMENTS.get(asked.table, report.DOCUMENT)
    for table, rows in (found if isinstance(found, dict) else {asked.table: found}).items():
        print(report.write(table, rows, f"scripts/benchmarks/bench.py {' '.join(sys.argv[1:])}", document, assumed))


if __name__ == "__main__":
    main()
