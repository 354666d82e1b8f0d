"""`train.py --new`: a config that says what must be decided, and is right once that has been done."""

from __future__ import annotations

import pytest
import yaml
from repository import ROOT

from train import main
from trainers import TRAINERS
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.config.config import find_trainer, load_config
from trainers.engine.config.files import ConfigError
from trainers.engine.config.launcher import resolve_launcher_values
from trainers.engine.config.new_config import OF_BASE, OF_TASK, TO_DECIDE
from trainers.engine.config.schema import options

DECISIONS = {
    "train_data_dir": "my/pictures",
    "resolution": 64,
    "max_train_steps": 7,
    "pretrained_model_name_or_path": "me/sd",
}


def filled_in(text):
    """The text of a config with a decision in every marked place that is no comment."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        name = line.partition(":")[0].strip()
        if line.partition(": ")[2].startswith("CHANGE ME") and not name.startswith("#"):
            lines[number] = line.replace("CHANGE ME", str(DECISIONS[name]))
    return "\n".join(lines)


@pytest.mark.parametrize("task", TRAINERS)
def test_a_new_config_is_right_once_it_is_decided(task, tmp_path, capsys):
    path = tmp_path / "first try.yaml"
    assert main(["--new", task, str(path)]) == 0
    assert f"{path}: written; change what says CHANGE ME, then: python train.py {path}" in capsys.readouterr().out
    assert main([str(path)]) == 2
    problems = capsys.readouterr().err.strip().splitlines()
    known, text = options(BaseConfig), path.read_text()
    marked = {"lora": 4, "lcm_lora": 4, "text_to_image": 4}.get(task, 3)
    assert problems[0] == f"error: {marked} problems in the configuration:"
    assert problems[1:4] == [
        f'  base.{name} = "CHANGE ME": is to be decided: {known[name].comment}' for name in TO_DECIDE
    ]
    path.write_text(filled_in(text))
    run = load_config(path)
    base = BaseConfig(output_dir="outputs/first try", **{name: DECISIONS[name] for name in TO_DECIDE})
    assert list(resolve_launcher_values(base, {})) == []
    config = find_trainer(task).Config(**({"pretrained_model_name_or_path": "me/sd"} if marked == 4 else {}))
    assert (run.task, run.base, run.config) == (task, base, config)


@pytest.mark.parametrize("task", TRAINERS)
def test_every_line_has_its_comment_and_the_first_options_are_to_be_decided(task, tmp_path):
    path = tmp_path / "new.yml"
    assert main(["--new", task, str(path)]) == 0
    first, *lines = path.read_text().splitlines()
    schema = (tmp_path / first.removeprefix("# yaml-language-server: $schema=")).resolve()
    assert schema == ROOT / f"configs/schema/{task}.json"
    known = options(BaseConfig) | {
        f"task.{name}": option for name, option in options(find_trainer(task).Config).items()
    }
    before = lines.index(f"{task}:")
    for number, line in enumerate(lines):
        if line.startswith("  ") and "exactly one of train" not in line and "exactly one of max" not in line:
            name = line.lstrip(" #").partition(":")[0]
            option = known[name if number < before else f"task.{name}"]
            assert line.endswith(f"  # {option.comment}")
    names = [line.strip().partition(":")[0] for line in lines if line.startswith("  ") and line[2] != "#"]
    assert names[: len(TO_DECIDE)] == list(TO_DECIDE)
    assert len(names) >= 20
    assert ("trigger_word" in names) == ("buckets" in names) == (task in ("lora", "lcm_lora", "text_to_image"))


def test_the_explicit_names_are_options():
    every = {name for task in TRAINERS for name in options(find_trainer(task).Config)}
    assert {*OF_BASE, *TO_DECIDE} <= set(options(BaseConfig))
    assert set(OF_TASK) <= every


def test_a_task_outside_the_repository(tmp_path):
    path = tmp_path / "new.yaml"
    assert main(["--new", "trainers.ddpm:DDPMTrainer", str(path)]) == 0
    document = yaml.safe_load(path.read_text())
    assert document["base"]["trainer_class"] == "trainers.ddpm:DDPMTrainer"
    assert document["ddpm"]["learning_rate"] == 1e-4
    assert not path.read_text().startswith("# yaml-language-server")
    path.write_text(filled_in(path.read_text()))
    assert load_config(path).base.trainer_class == "trainers.ddpm:DDPMTrainer"


def test_without_the_schemas_none_is_named(tmp_path, monkeypatch):
    """As in an installation that has the packages and no configs."""
    monkeypatch.setattr("trainers.engine.config.new_config.SCHEMAS", tmp_path)
    assert main(["--new", "vae", str(tmp_path / "new.yaml")]) == 0
    assert (tmp_path / "new.yaml").read_text().startswith("# vae: Trains an AutoencoderKL")


@pytest.mark.parametrize(
    ("task", "name", "message"),
    [
        ("vea", "new.yaml", "vea: no such task; allowed: ddpm, "),
        ("vae", "there.yaml", "there.yaml: exists, and is not overwritten; choose another name"),
        ("vae", "new.json", "new.json: must end in .yaml or .yml; JSON has no room for the comments"),
        ("vae", "new", "new: must end in .yaml or .yml"),
        ("vae", "no/new.yaml", "/no; make it first"),
        ("vae", f"{'n' * 300}.yaml", "nn.yaml: cannot be written (File name too long)"),
    ],
)
def test_a_config_that_cannot_be_written(task, name, message, tmp_path, capsys):
    (tmp_path / "there.yaml").write_text("mine")
    assert main(["--new", task, str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["there.yaml"]
    assert (tmp_path / "there.yaml").read_text() == "mine"


def test_what_is_undecided_comes_with_the_other_problems_and_hides_what_follows_from_it(tmp_path):
    path = tmp_path / "new.yaml"
    assert main(["--new", "vae", str(path)]) == 0
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["base.resolution=64", "base.train_batch_size=0", "base.dataset=digits"])
    assert str(caught.value).splitlines() == [
        "2 problems in the configuration:",
        f'  base.max_train_steps = "CHANGE ME": is to be decided: {options(BaseConfig)["max_train_steps"].comment}',
        "  base.train_batch_size = 0: must be an integer of at least 1",
    ]
