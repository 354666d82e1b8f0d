"""The lines of `train.py --describe`: the tasks, or every option of one."""

from __future__ import annotations

import json
from collections.abc import Iterator

from trainers import TRAINERS
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.config.config import find_trainer
from trainers.engine.config.schema import describe_kind, options


def describe(task: str | None) -> Iterator[str]:
    """Yields the lines of `--describe`: the tasks, or the options of `base` and a task (or "package.module:Class")."""
    if task is None:
        yield from (f"{name:24} {target}" for name, target in TRAINERS.items())
        return
    trainer_class = find_trainer(task, task if ":" in task else None)
    for title, schema in (("base", BaseConfig), (task, trainer_class.Config)):
        yield f"\n{title}:"
        for option in options(schema).values():
            yield f"  {option.name}: {describe_kind(option.kind)} = {json.dumps(option.default)}"
            yield f"      {option.comment}"
