"""The configuration: both documented files load unchanged, and every mistake is reported at once, with the way out."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

import pytest

from train import main
from trainers import TRAINERS
from trainers.base import Section, TrainerConfig
from trainers.common.model_files import MODELS_DIR, Grid
from trainers.common.unet2d import unet2d_problems
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.config.config import load_config
from trainers.engine.config.describe import describe
from trainers.engine.config.files import MAX_FILE_BYTES, ConfigError
from trainers.engine.config.launcher import resolve_launcher_values
from trainers.engine.config.schema import coerce, options

ARTICLE = {
    "base": {
        "logging_dir": "logs",
        "output_dir": "models/ddpm_1",
        "checkpointing_steps": 5000,
        "valid_epochs": 1,
        "dataset_name": "ylecun/mnist",
        "resolution": 32,
        "train_batch_size": 64,
        "num_epochs": 10,
    },
    "ddpm": {"model_config": "unet_cfg", "learning_rate": 1e-4, "valid_batch_size": 4},
}


@pytest.fixture
def write(tmp_path):
    def make(text, name="config.json"):
        path = tmp_path / name
        path.write_text(text if isinstance(text, str) else json.dumps(text))
        return path

    return make


def changed(base=None, ddpm=None):
    return {"base": ARTICLE["base"] | (base or {}), "ddpm": ARTICLE["ddpm"] | (ddpm or {})}


def problems_of(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    return str(caught.value)


def test_the_articles_document_loads_unchanged(write):
    run = load_config(write(ARTICLE))
    assert (run.task, run.base.num_epochs, run.base.valid_epochs, run.config.model_config) == (
        "ddpm",
        10,
        1,
        "unet_cfg",
    )
    assert (run.config.learning_rate, run.config.valid_batch_size, run.base.channels) == (1e-4, 4, 3)


def test_yaml_reads_the_same_as_json(write):
    text = "base:\n  dataset: digits\n  num_epochs: 1e1\n  mixed_precision: no\n  resolution: 32\nddpm:\n  learning_rate: 1e-4\n"
    run = load_config(write(text, "config.yaml"))
    assert (run.base.num_epochs, run.config.learning_rate, run.base.mixed_precision) == (10, 1e-4, "no")


def test_the_resolved_configuration_loads_back(write):
    run = load_config(write(ARTICLE), ["ddpm.snr_gamma=5", "base.allow_changes=[dataset]", "base.run_name=null"])
    again = load_config(write(run.as_yaml(), "again.yaml"))
    assert again == run
    assert set(run.as_dict()["base"]) == {field.name for field in dataclasses.fields(BaseConfig)}


def test_all_problems_of_both_sections_come_together(write):
    path = write(
        changed(
            {"train_batchsize": 4, "resolution": "big", "learning_rate": 1}, {"prediction_type": "x0", "snr_gamma": 0}
        )
    )
    assert problems_of(path, "base.seed", "base.channels=2").splitlines() == [
        "7 problems in the configuration:",
        "  base.seed: an override reads section.key=value",
        '  base.resolution = "big": must be an integer of at least 1',
        "  base.train_batchsize = 4: unknown option; did you mean base.train_batch_size?",
        "  base.learning_rate = 1: unknown option; it belongs in section ddpm",
        "  base.channels = 2: must be one of 1, 3, 4",
        '  ddpm.prediction_type = "x0": must be one of epsilon, sample, v_prediction',
        "  ddpm.snr_gamma = 0: must be a number above 0, or null",
    ]


MODELS = ", ".join(sorted(path.stem for path in MODELS_DIR.glob("*.json")))
RULES = [
    ({"num_epochs": None}, {}, "base.num_epochs = null: exactly one of num_epochs and max_train_steps must be set"),
    ({"max_train_steps": 5}, {}, "base.num_epochs = 10: exactly one of num_epochs and max_train_steps must be set"),
    ({"dataset": "digits"}, {}, "must be set, not dataset_name and dataset"),
    ({"dataset_name": None}, {}, "exactly one of dataset_name, train_data_dir and dataset must be set, not none"),
    ({"valid_steps": 5}, {}, "base.valid_epochs = 1: at most one of valid_epochs and valid_steps can be set"),
    ({"save_model_steps": 5, "save_model_epochs": 1}, {}, "at most one of save_model_epochs and save_model_steps can be set"),
    ({"output_dir": " "}, {}, 'base.output_dir = " ": must not be blank'),
    ({"logging_dir": "../logs"}, {}, "base.logging_dir = \"../logs\": must be a relative path below output_dir"),
    ({"logging_dir": "/logs"}, {}, "must be a relative path below output_dir, such as logs"),
    ({"hub_model_id": "a/b/c", "push_to_hub": True}, {}, "base.hub_model_id = \"a/b/c\": must read name or owner/name"),
    ({"hub_model_id": "me/digits"}, {}, "has an effect with push_to_hub: true only"),
    ({"cache_dir": "x", "dataset": "digits", "dataset_name": None}, {}, "base.cache_dir = \"x\": has an effect with dataset_name only"),
    ({"compile_repeated_blocks": True}, {}, "base.compile_repeated_blocks = true: has an effect with compile: true only"),
    ({"dataset_args": {"a": 1}}, {}, 'base.dataset_args = {"a": 1}: has an effect with dataset only'),
    ({"run_name": "a"}, {}, 'base.run_name = "a": has an effect with logger: wandb or both only'),
    ({"enable_xformers_memory_efficient_attention": True}, {}, "needs xformers: pip install diffloop[xformers]"),
    ({}, {"lr_scheduler": "constant", "lr_warmup_steps": 5}, "ddpm.lr_warmup_steps = 5: has no effect with lr_scheduler: constant"),
    ({}, {"lr_num_cycles": 3}, "ddpm.lr_num_cycles = 3: has an effect with lr_scheduler: cosine_with_restarts only"),
    ({}, {"learning_rate": {"unet": -1}}, 'ddpm.learning_rate = {"unet": -1.0}: every rate must be above 0'),
    ({}, {"model_config": "unet_cfgg"}, 'ddpm.model_config = "unet_cfgg": must be a folder with config.json, a JSON file, or a name'),
    ({}, {"model_config": "unet_cfgg"}, f"the names in configs/models are {MODELS}"),
    ({}, {"use_ema": False, "ema_power": 0.5}, "ddpm.ema_power = 0.5: has an effect with use_ema: true only"),
    ({}, {"optimizer": "adamw_8bit"}, 'ddpm.optimizer = "adamw_8bit": needs bitsandbytes: pip install diffloop[bitsandbytes]'),
    ({}, {"optimizer": "adam"}, 'ddpm.optimizer = "adam": must be one of adamw, adamw_8bit'),
    ({}, {"use_8bit_adam": True}, "ddpm.use_8bit_adam = true: has been replaced; write optimizer: adamw_8bit"),
    ({}, {"use_8bit_adam": "8"}, 'ddpm.use_8bit_adam = "8": unknown option; did you mean ddpm.'),
    ({"tracker_project": "a", "logger": "none"}, {}, 'base.tracker_project = "a": has no effect with logger: none'),
    ({"resolution": 28}, {}, "halves the picture 3 times; base.resolution = 28 must be a multiple of 8"),
    ({}, {"pretrained_model_name_or_path": "x"}, "ddpm.model_config = \"unet_cfg\": has no effect with pretrained_model_name_or_path"),
    ({}, {"rescale_betas_zero_snr": True}, "ddpm.rescale_betas_zero_snr = true: needs prediction_type: v_prediction or sample"),
    ({}, {"ddpm_num_steps": 100}, "ddpm.ddpm_num_inference_steps = 1000: must be at most ddpm_num_steps = 100"),
]  # fmt: skip


@pytest.mark.parametrize(("base", "ddpm", "message"), RULES)
def test_rules_over_several_options(write, base, ddpm, message):
    text = problems_of(write(changed(base, ddpm)))
    assert text.startswith("1 problem in the configuration:\n")
    assert message in text


TASKS = ", ".join(TRAINERS)
STRUCTURE = [
    ("[1, 2]", "config.yaml", "holds list; it must hold two sections, `base` and the task's"),
    ("{", "config.json", "cannot be read as JSON"),
    ("a: [", "config.yaml", "cannot be read as YAML"),
    ('{"base": {}, "base": {}}', "config.json", "found duplicate key base"),
    ("base: {}\nbase: {}\n", "config.yaml", "found duplicate key"),
    ('{"ddpm": {}}', "config.json", "base: this section is missing"),
    ('{"a":' * 100_000, "config.json", "cannot be read as JSON"),
    ('{"base": {}}', "config.json", f"exactly one section must name the task ({TASKS}), found none"),
    ('{"base": {}, "ddpm": {}, "lora": {}}', "config.json", "found ddpm, lora"),
    ('{"base": {}, "ddpm": 3}', "config.json", "ddpm = 3: must be a mapping of options to values"),
    ('{"base": {}, "dpm": {}}', "config.json", f"dpm: no such task; allowed: {TASKS}; did you mean ddpm?"),
    ("base: {output_dir: '${oc.env:HOME}'}\nddpm: {}", "config.yaml", "environment variables are not read"),
    ("base: {output_dir: '${base.nothing}'}\nddpm: {}", "config.yaml", "base.output_dir: Interpolation key"),
]


@pytest.mark.parametrize(("text", "name", "message"), STRUCTURE)
def test_documents_that_are_no_configuration(write, text, name, message):
    assert message in problems_of(write(text, name))


def test_large_files_and_alias_bombs(write):
    assert f"a config has at most {MAX_FILE_BYTES}" in problems_of(write(" " * (MAX_FILE_BYTES + 1)))
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert "its aliases expand to more than 100000 values" in problems_of(write("\n".join(lines), "bomb.yaml"))
    assert "its aliases expand to more" in problems_of(write("a: &a [*a]", "endless.yaml"))


def test_interpolation_within_the_document(write):
    text = "base: {dataset: digits, num_epochs: 1, resolution: 32, seed: 7}\nddpm: {valid_batch_size: '${base.seed}'}"
    assert load_config(write(text, "config.yaml")).config.valid_batch_size == 7


def test_an_override_of_one_of_a_pair_replaces_the_other(write):
    run = load_config(write(ARTICLE), ["base.max_train_steps=7", "base.dataset=digits", "base.valid_steps=3"])
    assert (run.base.max_train_steps, run.base.num_epochs) == (7, None)
    assert (run.base.dataset, run.base.dataset_name) == ("digits", None)
    assert (run.base.valid_steps, run.base.valid_epochs) == (3, None)
    assert "exactly one" in problems_of(write(ARTICLE), "base.max_train_steps=7", "base.num_epochs=2")


def test_overrides(write):
    path = write(ARTICLE)
    run = load_config(path, ["ddpm.learning_rate=3e-4", "ddpm.use_ema=false", "base.mixed_precision=no"])
    assert (run.config.learning_rate, run.config.use_ema, run.base.mixed_precision) == (3e-4, False, "no")
    assert "lora: an override names this section, the file has base, ddpm" in problems_of(path, "lora.rank=4")
    assert 'base.allow_changes = "[": must be a list, each item text' in problems_of(path, "base.allow_changes=[")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.here:Trainer", "must be an importable package.module:Class (No module named 'nothing')"),
        ("json:JSONDecoder", "must be a subclass of trainers.base.Trainer"),
        (
            "trainers.base:Trainer",
            "lacks compute_loss, init_modules, sample, save_pipeline, a Config derived from TrainerConfig; see trainers/base.py",
        ),
        ("trainers.ddpm:Missing", "must be an importable package.module:Class"),
    ],
)
def test_a_trainer_class_that_cannot_be_used(write, name, message):
    assert message in problems_of(write(changed({"trainer_class": name})))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config file .*none\.json does not exist \(searched /"):
        load_config(tmp_path / "none.json")


def test_coercion():
    assert coerce(1e3, int) == 1000
    assert isinstance(coerce(3, float), float)
    assert coerce(False, Literal["no", "yes"]) == "no"
    for value, kind in ((True, int), (1.5, int), ("1", int), (1, bool), (float("nan"), float), (True, Literal[1])):
        with pytest.raises(ValueError, match=r".+"):
            coerce(value, kind)


@pytest.mark.parametrize("section", [BaseConfig, TrainerConfig, *(load_config("configs/tests/ddpm.json")[2:3])])
def test_every_option_has_a_comment(section):
    section = section if isinstance(section, type) else type(section)
    assert [name for name, option in options(section).items() if not option.comment] == []


def test_an_attribute_without_annotation_is_an_error_when_the_class_is_made():
    with pytest.raises(TypeError, match=r"Lost\.rank = 4 has no annotation; write `rank: <type> = 4`"):

        class Lost(Section):
            rank = 4


def test_a_config_class_without_the_decorator_is_an_error():
    class Forgotten(TrainerConfig):
        rank: int = 4

    with pytest.raises(
        TypeError, match=r"Forgotten\.rank is not a field: decorate the class with @dataclass\(kw_only=True\)"
    ):
        options(Forgotten)


def test_describe_reads_the_source():
    @dataclass(kw_only=True)
    class Documented(Section):
        first: int = 1  # the first
        second: Literal["a", "b"] | None = (
            None  # the second
        )  # fmt: skip

    assert {name: option.comment for name, option in options(Documented).items()} == {
        "first": "the first",
        "second": "the second",
    }
    text = "\n".join(describe("ddpm"))
    assert "  snr_gamma: a number above 0, or null = null\n      min-SNR loss weights, 5 is usual" in text
    assert "  logging_steps: an integer of at least 1 = 50\n" in text
    assert "ddpm" in "\n".join(describe(None))
    with pytest.raises(ConfigError, match="dppm: no such task"):
        list(describe("dppm"))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "base.mixed_precision = bf16: the launcher says ACCELERATE_MIXED_PRECISION = fp16"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "ACCELERATE_MIXED_PRECISION = fp8: must be no, fp16 or bf16"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"}, "base.gradient_accumulation_steps = 2: the launcher says"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}, None),
        ({"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_two_different_values_of_launcher_and_config(environment, message):
    found = list(
        resolve_launcher_values(BaseConfig(mixed_precision="bf16", gradient_accumulation_steps=2), environment)
    )
    assert message in found[0] if message else found == []


def test_null_means_the_launchers_value(write, monkeypatch):
    run = load_config(write(ARTICLE))
    assert (run.base.mixed_precision, run.base.gradient_accumulation_steps) == ("no", 1)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    run = load_config(write(ARTICLE))
    assert (run.base.mixed_precision, run.base.gradient_accumulation_steps) == ("bf16", 4)
    assert "mixed_precision: bf16" in run.as_yaml()


def test_the_command_reports_and_returns_2(write, capsys):
    assert main([str(write(changed({"seed": -1})))]) == 2
    captured = capsys.readouterr()
    assert (
        captured.err.strip()
        == "error: 1 problem in the configuration:\n  base.seed = -1: must be an integer in [0, 18446744073709551615]"
    )
    assert captured.out == ""
    assert main(["none.yaml"]) == 2
    assert main(["--describe", "nothing"]) == 2
    assert main(["--describe"]) == 0
    assert main([str(write(ARTICLE)), "--print-config", "base.seed=5"]) == 0
    assert "  seed: 5\n" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "a CONFIG is needed" in capsys.readouterr().err


def test_networks_that_do_not_fit(tmp_path):
    def problems(**settings):
        (tmp_path / "net.json").write_text(json.dumps(settings))
        return list(unet2d_problems(str(tmp_path / "net.json"), Grid(1, 32)))

    assert problems(in_channels=3, out_channels=1) == ["has in_channels = 3, base.channels is 1; make them equal"]
    assert problems(in_channels=1, out_channels=3) == ["has out_channels = 3, base.channels is 1; make them equal"]
    [problem] = problems(in_channels=1, out_channels=1, block_out_channels=5)
    assert problem.endswith(f"configs/models: {tmp_path}/net.json: block_out_channels = 5 must be a list of numbers")
    assert problems(in_channels=1, out_channels=1, block_out_channels=[8, 8]) == []
    for resolution in (8, 16, 28, 32, 64, 256, 512):
        assert list(unet2d_problems(None, Grid(1, resolution))) == []


def test_what_the_data_sets_say_comes_with_the_other_problems(write, capsys):
    path = write(changed({"dataset_name": None, "dataset": "digit", "background_color": "whit", "seed": -1}))
    assert main([str(path)]) == 2
    text = capsys.readouterr().err
    assert "3 problems in the configuration" in text
    assert "base.dataset = \"digit\": it must be one of: digits, package.module:build; did you mean 'digits'?" in text
    assert 'base.background_color = "whit": must be a colour: a name such as white, or #rrggbb' in text


def test_a_home_folder_is_expanded(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert load_config(write(changed({"output_dir": "~/run"}))).base.output_dir == "/home/me/run"


def test_describe_of_a_task_outside_the_repository():
    assert "  snr_gamma: a number above 0, or null = null" in "\n".join(describe("trainers.ddpm:DDPMTrainer"))
