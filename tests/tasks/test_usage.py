"""The lines that load a result are Python, whatever the folder is called."""

from __future__ import annotations

import ast
from types import SimpleNamespace

import pytest

from trainers import TRAINERS
from trainers.engine.config.config import find_trainer

NAMES = ['a "b"', "a\\b", "a\\", "it's", "a\nb", "a\x1b[31m", "ä 日本", "{x} %s", "a\\nb", 'a"""b']


def texts_in(code):
    return [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("task", TRAINERS)
def test_the_lines_name_the_folder(task, name):
    trainer_class, settings = find_trainer(task), {}
    if hasattr(trainer_class.Config, "lora_scale"):
        settings = {"pretrained_model_name_or_path": f"base {name}", "revision": name, "variant": f"{name} 16"}
    prompts = SimpleNamespace(usage=lambda: {"clip_skip": "", "prepared": ""})
    trainer = SimpleNamespace(usage=trainer_class.usage, config=trainer_class.Config(**settings), prompts=prompts)
    trainer.scheduler_usage = lambda: ""
    trainer.base_model = SimpleNamespace(loading=lambda: ("DiffusionPipeline", "from_pretrained", {}))
    code = trainer_class.usage_of(trainer, f"outputs/{name}")
    assert f"outputs/{name}" in texts_in(code)
    assert set(settings.values()) <= set(texts_in(code))
    assert len(code.splitlines()) == trainer_class.usage.count("\n") + 1


def test_the_lines_at_the_end_of_a_run(run_in_process, capsys, tmp_path):
    name = 'my "own" run\\s'
    folder = run_in_process(name, task="noisy_classifier", **{"base.max_train_steps": 1})
    printed = capsys.readouterr().out.partition("To load and sample it:\n\n")[2].partition("\n\n")[0]
    card = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    code = "\n".join(line[2:] for line in printed.splitlines())
    assert str(tmp_path / name) in texts_in(code)
    assert name in texts_in(card)
