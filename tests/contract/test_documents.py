"""What the documents say is what happens: the README's task and commands, the article's config, the shipped configs."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from PIL import Image
from repository import ROOT
from run_folders import read_metrics

from train import main
from trainers.engine.config.config import load_config
from trainers.engine.distributed.backends import check_engine

README = (ROOT / "README.md").read_text()


def code_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_example_task_of_the_readme(tmp_path, monkeypatch):
    [source] = [block for block in code_blocks("python") if "class FlowTrainer" in block]
    [config] = [block for block in code_blocks("yaml") if "flow:FlowTrainer" in block]
    (tmp_path / "flow.py").write_text(source)
    (tmp_path / "flow.yaml").write_text(config)
    monkeypatch.syspath_prepend(tmp_path)
    options = [
        "base.max_train_steps=40",
        "base.logging_steps=10",
        "base.logger=none",
        "flow.model_config=configs/tests/models/unet2d.json",
    ]
    options += [
        f"base.output_dir={tmp_path / 'run'}",
        "flow.lr_warmup_steps=0",
        "flow.learning_rate=2e-3",
        "base.max_train_samples=16",
    ]
    assert main([str(tmp_path / "flow.yaml"), *options]) == 0
    first, *_, last = [line["loss"] for line in read_metrics(tmp_path / "run", prefix="loss")]
    assert last < 0.8 * first
    from flow import FlowTrainer

    assert FlowTrainer.load_pipeline(tmp_path / "run").config.sample_size == 16
    assert main(["--describe", "flow"]) == 2


def test_the_readme_explains_the_config_that_is_shipped():
    [explained] = [yaml.safe_load(block) for block in code_blocks("yaml") if "outputs/quickstart" in block]
    shipped = yaml.safe_load((ROOT / "configs/digits.yaml").read_text())
    for section, values in explained.items():
        for option, value in values.items():
            assert shipped[section][option] == value
    assert f"checkpoint-{shipped['base']['max_train_steps']}/" in README
    assert f"{shipped['base']['max_train_steps']:,} steps" in README


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))])
def test_files_that_a_page_names_exist(page):
    for name in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / name).exists(), name


@pytest.mark.parametrize(
    "path", [*(ROOT / "configs").glob("*.*"), *(ROOT / "configs" / "zero_to_lora").glob("*.*")], ids=lambda p: p.name
)
def test_shipped_configs_load(path):
    load_config(path)


@pytest.fixture
def local_mnist(tmp_path):
    """A local folder with the features of ylecun/mnist: grey 28 x 28 pictures and ten classes, from real digits."""
    import datasets
    from sklearn.datasets import load_digits

    digits = load_digits()
    pictures = [
        Image.fromarray((image * 15.9375).round().astype(np.uint8)).resize((28, 28)) for image in digits.images[:64]
    ]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(i) for i in range(10)])}
    )
    columns = {"image": pictures, "label": digits.target[:64].tolist()}
    folder = tmp_path / "mnist"
    folder.mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "train-00000-of-00001.parquet")
    return folder


def test_the_articles_config_trains_on_a_local_data_set(local_mnist, tmp_path):
    document = ROOT / "configs/ddpm_mnist.json"
    options = [
        f"base.dataset_name={local_mnist}",
        f"base.output_dir={tmp_path / 'run'}",
        "base.logger=none",
        f"base.cache_dir={tmp_path}",
    ]
    smaller = [
        "base.num_epochs=1",
        "base.max_train_samples=4",
        "base.train_batch_size=2",
        "ddpm.ddpm_num_inference_steps=2",
        "ddpm.valid_batch_size=1",
    ]
    assert main([str(document), *options, *smaller]) == 0
    assert [line["step"] for line in read_metrics(tmp_path / "run", prefix="loss")] == [2]
    assert (tmp_path / "run/unet/config.json").exists()
    blocks = json.loads((tmp_path / "run/unet/config.json").read_text())["block_out_channels"]
    assert blocks == [64, 128, 256, 256]


def test_a_hub_name_that_cannot_be_had(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["configs/ddpm_mnist.json", f"base.output_dir={tmp_path / 'run'}", f"base.cache_dir={tmp_path}"]) == 1
    text = capsys.readouterr().err
    assert "ylecun/mnist" in text
    assert "base.train_data_dir" in text
    assert "Traceback" not in text


@pytest.mark.slow  # tests/engine/test_stopping.py launches it by default
def test_accelerate_launch_runs_the_command(tmp_path):
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command = [
        *accelerate,
        "--dynamo_backend",
        "no",
        "train.py",
        "configs/tests/ddpm.json",
        f"base.output_dir={tmp_path / 'run'}",
    ]
    options = ["base.mixed_precision=bf16", "base.gradient_accumulation_steps=2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "precision        bf16" in done.stdout
    assert "8 = 4 x 2 micro-batches x 1 processes" in done.stdout


def test_quickstart_command(tmp_path, capsys):
    options = [
        f"base.output_dir={tmp_path / 'run'}",
        "base.max_train_steps=2",
        "base.validation_split=0.01",
        "conditional_ddpm.valid_batch_size=1",
        "conditional_ddpm.ddpm_num_inference_steps=2",
    ]
    command = ["bash", "scripts/quickstart.sh", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "No checkpoint in" in done.stdout
    # a second time, without importing everything again
    assert main(["configs/digits.yaml", "base.resume_from_checkpoint=latest", *options]) == 0
    assert "the run is finished already" in capsys.readouterr().out
    assert (tmp_path / "run/samples/samples-step-000002.png").exists()


def test_a_wrong_section_is_told_from_a_task_without_repository(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"base": {"dataset": "digits", "num_epochs": 1}, "sdxl": {}}))
    assert main([str(path)]) == 2
    assert 'For your own class set base.trainer_class: "package.module:Class"' in capsys.readouterr().err


def test_the_migration_page_names_options_that_exist():
    from trainers.engine.config.base_options import BaseConfig
    from trainers.engine.config.config import find_trainer
    from trainers.engine.config.schema import options

    page = (ROOT / "docs/migration.md").read_text()
    known = {f"base.{name}" for name in options(BaseConfig)}
    for task in ("lora", "text_to_image", "lcm_lora", "ddpm"):
        known |= {f"{prefix}.{name}" for name in options(find_trainer(task).Config) for prefix in ("task", task)}
    named = set(re.findall(r"`((?:base|task|lora)\.\w+)`", page))
    assert len(named) > 60
    assert named - known == set()
    rows = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("| `--")]
    assert len(rows) > 70
    for there, here in rows:
        assert "`" in here or here.strip() in ("left out", "always"), there


def migration_rows(*titles):
    """{name there: cell of what it is here} of the tables below these headings."""
    page = (ROOT / "docs/migration.md").read_text()
    sections = {part.partition("\n")[0].strip("# "): part for part in re.split(r"\n(?=##+ )", page)}
    rows = {}
    for line in "\n".join(sections[title] for title in titles).splitlines():
        if line.startswith("| `"):
            there, here = line.split("|")[1:3]
            rows |= {name.removeprefix("--"): here for name in re.findall(r"`([\w-]+)`", there)}
    return rows


@pytest.mark.parametrize(
    ("module", "titles"),
    [
        ("diffusers_table", ("diffusers' text-to-image scripts", "Further scripts")),
        ("kohya_table", ("kohya's sd-scripts", "kohya's data")),
    ],
)
def test_the_migration_page_has_the_tables_of_import_config(module, titles):
    table = importlib.import_module(f"trainers.inference.foreign_configs.{module}").TABLE
    rows = migration_rows(*titles)
    assert rows.keys() == table.keys()
    for name, row in table.items():
        here = [f"`{row.here}`"] if row.here else ["left out", "always", "`scripts/"]
        assert any(word in rows[name] for word in here), name


LAUNCHES = {
    "one_gpu": "NO", "all_gpus": "MULTI_GPU", "two_nodes": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED",
    "zero3_offload": "DEEPSPEED",
}  # fmt: skip


def test_every_launch_is_documented():
    assert {path.stem for path in (ROOT / "configs/accelerate").iterdir()} == set(LAUNCHES)
    page = (ROOT / "docs/distributed.md").read_text()
    for name in LAUNCHES:
        text = (ROOT / f"configs/accelerate/{name}.yaml").read_text()
        assert f"accelerate launch --config_file configs/accelerate/{name}.yaml" in text
        assert f"(../configs/accelerate/{name}.yaml)" in page


@pytest.mark.parametrize(("name", "engine"), LAUNCHES.items())
def test_a_launch_is_what_accelerate_and_we_understand(name, engine, monkeypatch):
    """As `accelerate launch` reads the file, and what it exports as our check of the engine does."""
    arguments = ["--config_file", str(ROOT / f"configs/accelerate/{name}.yaml"), "train.py", "CONFIG"]
    found, *_ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    flags = {"FSDP": found.use_fsdp, "MULTI_GPU": found.multi_gpu, "DEEPSPEED": found.use_deepspeed}
    assert flags == {name: engine == name for name in flags}
    assert (found.num_machines, found.mixed_precision) == (2 if name == "two_nodes" else 1, "no")
    found.deepspeed_fields_from_accelerate_config = ""  # accelerate launch sets it
    exported = prepare_deepspeed_cmd_env(found)[1] if found.use_deepspeed else prepare_multi_gpu_env(found)
    for variable, value in exported.items() if engine in ("FSDP", "DEEPSPEED") else ():
        monkeypatch.setenv(variable, value)
    plugins = {"FSDP": FullyShardedDataParallelPlugin, "DEEPSPEED": DeepSpeedPlugin}
    plugin = plugins[engine]() if engine in plugins else None
    if engine == "FSDP":
        assert plugin.transformer_cls_names_to_wrap is None  # ours decide
    state = SimpleNamespace(fsdp_plugin=plugin, deepspeed_plugin=plugin)
    check_engine(SimpleNamespace(distributed_type=DistributedType[engine], state=state, mixed_precision="no"))


@pytest.mark.parametrize("name", ["distributed", "architecture"])
def test_the_tests_that_a_page_names_exist(name):
    page = (ROOT / f"docs/{name}.md").read_text()
    there = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) >= 8
    assert [name for name in named if f"def {name}(" not in there] == []
