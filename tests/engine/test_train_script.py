"""The real script on the CPU: files, log lines, the pipeline that comes out, trackers, card, and its error texts."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.training_utils import EMAModel
from marks import slow
from PIL import Image
from processes import wait_for
from repository import ROOT
from run_folders import losses, read_metrics

import datasets_lib
from train import main, train
from trainers import TRAINERS
from trainers.ddpm import DDPMTrainer
from trainers.engine.config.config import find_trainer, load_config
from trainers.engine.distributed.backends import check_devices, check_engine
from trainers.engine.distributed.deepspeed import configure_deepspeed
from trainers.engine.optim import networks
from trainers.engine.run.randomness import SlotRandom
from trainers.engine.validation import sampling
from trainers.inference.saved_run import load_trainer, open_run

PIPELINE = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
}
CHECKPOINT = {"manifest.json", "state.json", "optimizer.safetensors"} | {
    f"{folder}/{name}"
    for folder in ("unet", "unet_ema")
    for name in ("config.json", "diffusion_pytorch_model.safetensors")
}


def files_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_exact_files_and_log_lines(run_in_process):
    folder = run_in_process(
        **{
            "base.checkpointing_steps": 2,
            "base.checkpoints_total_limit": 2,
            "base.valid_steps": 3,
            "base.validation_split": 0.02,
        }
    )
    expected = {"config.yaml", "metrics.jsonl", "README.md", ".lock"} | PIPELINE
    expected |= {f"checkpoint-{step}/{name}" for step in (4, 6) for name in CHECKPOINT}
    expected |= {f"samples/samples-step-{step:06d}.png" for step in (3, 6)}
    assert files_in(folder) == expected
    lines = read_metrics(folder, prefix="loss")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert set(lines[0]) == {
        "step",
        "epoch",
        "lr",
        "loss",
        "skipped",
        "grad_norm/unet",
        "examples_per_second",
        "peak_memory_gib",
    }
    assert all(math.isfinite(line["loss"]) and line["grad_norm/unet"] > 0 for line in lines)
    validations = read_metrics(folder, prefix="valid")
    expected = ["step", "valid/loss", "valid/peak_memory_gib", "valid/seconds", "valid_ema/loss"]
    assert [sorted(line) for line in validations] == [expected] * 2
    assert [line["step"] for line in read_metrics(folder, prefix="save/seconds")] == [2, 4, 6]
    assert [line["step"] for line in read_metrics(folder, prefix="export/seconds")] == [6]
    assert [line["step"] for line in read_metrics(folder, prefix="start/peak_memory_gib")] == [0]
    manifest = json.loads((folder / "checkpoint-6" / "manifest.json").read_text())
    assert set(manifest) == CHECKPOINT - {"manifest.json"}
    assert oct((folder / "checkpoint-6/unet/diffusion_pytorch_model.safetensors").stat().st_mode & 0o777) == oct(
        0o666 & ~_umask()
    )
    side, gap = 2 * (64 + 2) + 2, 8  # 2 x 2 pictures of 16 pixels, enlarged 4 times; raw and averaged weights
    assert Image.open(folder / "samples/samples-step-000003.png").size == (2 * side + gap, side)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize(("steps", "logging_steps", "lines"), [(6, 4, [4, 6]), (5, 5, [5]), (3, 10, [3])])
def test_log_lines_come_at_the_cadence_and_at_the_end(run_in_process, steps, logging_steps, lines):
    folder = run_in_process(**{"base.max_train_steps": steps, "base.logging_steps": logging_steps})
    assert [line["step"] for line in read_metrics(folder, prefix="loss")] == lines


def test_a_logged_loss_is_the_mean_of_its_window(run_in_process):
    every = run_in_process("every")
    third = run_in_process("third", **{"base.logging_steps": 3})
    single = [line["loss"] for line in read_metrics(every, prefix="loss")]
    assert [line["loss"] for line in read_metrics(third, prefix="loss")] == pytest.approx(
        [sum(single[:3]) / 3, sum(single[3:]) / 3], rel=1e-6
    )


def test_the_pipeline_holds_the_averaged_weights_and_draws_the_validations_pictures(run_in_process, monkeypatch):
    drawn = {}
    trainer_class = find_trainer("ddpm")
    original = trainer_class.sample

    def remember(self, requests, rng):
        images = original(self, requests, rng)
        drawn["last"] = images["samples"]
        return images

    monkeypatch.setattr(trainer_class, "sample", remember)
    folder = run_in_process()
    pipeline = DDPMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    averaged = UNet2DModel.from_pretrained(folder / "checkpoint-6" / "unet_ema")
    raw = UNet2DModel.from_pretrained(folder / "checkpoint-6" / "unet")
    for name, tensor in pipeline.unet.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, averaged.state_dict()[name])
    assert any(not torch.equal(tensor, averaged.state_dict()[name]) for name, tensor in raw.state_dict().items())
    generators = SlotRandom(0, torch.arange(4), "sample").generators()
    images = pipeline(batch_size=4, generator=generators, num_inference_steps=2, output_type="np").images
    torch.testing.assert_close(torch.from_numpy(images).permute(0, 3, 1, 2), drawn["last"], rtol=1e-4, atol=1e-5)


def test_checkpoints_have_diffusers_ema_format(run_in_process):
    folder = run_in_process()
    loaded = EMAModel.from_pretrained(folder / "checkpoint-6" / "unet_ema", UNet2DModel)
    assert (loaded.optimization_step, loaded.use_ema_warmup, loaded.power, loaded.decay) == (6, True, 0.75, 0.9999)
    weights = UNet2DModel.from_pretrained(folder / "checkpoint-6" / "unet_ema").parameters()
    assert all(torch.equal(a, b) for a, b in zip(loaded.shadow_params, weights, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {
            "ddpm.prediction_type": "v_prediction",
            "ddpm.rescale_betas_zero_snr": True,
            "ddpm.snr_gamma": 5.0,
            "ddpm.sampler": "ddim",
        },
        {"ddpm.prediction_type": "sample", "ddpm.use_ema": False, "ddpm.lr_scheduler": "one_cycle"},
        {"base.channels": 3, "ddpm.model_config": None, "base.max_train_steps": 1, "base.resolution": 8},
        {
            "base.channels": 4,
            "ddpm.model_config": None,
            "base.max_train_steps": 1,
            "ddpm.valid_batch_size": 1,
            "base.logger": "tensorboard",
        },
        {"base.mixed_precision": "bf16", "base.gradient_accumulation_steps": 2, "ddpm.learning_rate": {"unet": 1e-3}},
        {
            "base.dataloader_num_workers": 2,
            "base.image_cache_mb": 0,
            "base.random_flip": True,
            "base.resolution": 24,
            "base.save_model_steps": 2,
        },
    ],
    ids=lambda options: " ".join(key.split(".")[1] for key in options),
)
def test_options_of_the_task(run_in_process, options):
    folder = run_in_process(**options)
    assert all(math.isfinite(line["loss"]) for line in read_metrics(folder, prefix="loss"))
    scheduler = DDPMPipeline.from_pretrained(folder).scheduler
    assert isinstance(scheduler, DDPMScheduler)
    for option in ("prediction_type", "rescale_betas_zero_snr"):
        if f"ddpm.{option}" in options:
            assert scheduler.config[option] == options[f"ddpm.{option}"]
            assert scheduler.config.timestep_spacing == ("trailing" if "ddpm.snr_gamma" in options else "leading")
    assert (folder / "checkpoint-6" / "unet_ema").exists() == (
        options.get("ddpm.use_ema", True) and "base.channels" not in options
    )


def test_weights_stay_float32_in_mixed_precision(run_in_process):
    folder = run_in_process(**{"base.mixed_precision": "bf16"})
    for name in ("unet", "unet_ema"):
        weights = UNet2DModel.from_pretrained(folder / "checkpoint-6" / name)
        assert {p.dtype for p in weights.parameters()} == {torch.float32}
    exact = run_in_process("exact")
    assert losses(folder) != losses(exact)  # bf16 really ran
    first, of_exact = (read_metrics(run, prefix="loss")[0]["loss"] for run in (folder, exact))
    assert first == pytest.approx(of_exact, rel=0.02)


def test_initial_weights_from_a_folder(run_in_process, tmp_path):
    first = run_in_process("first")
    options = {"ddpm.model_config": None, "base.max_train_steps": 1, "ddpm.learning_rate": 1e-12, "ddpm.use_ema": False}
    same_shape = run_in_process("shape", **{"ddpm.model_config": str(first / "unet")})  # a folder with config.json
    assert losses(same_shape) == losses(first)
    for place in (first, first / "unet"):
        second = run_in_process(f"from-{place.name}", **options, **{"ddpm.pretrained_model_name_or_path": str(place)})
        before, after = (UNet2DModel.from_pretrained(folder, subfolder="unet") for folder in (first, second))
        for name, tensor in before.state_dict().items():
            torch.testing.assert_close(tensor, after.state_dict()[name], rtol=1e-6, atol=1e-7)
    with pytest.raises(
        FileNotFoundError, match=r"pretrained_model_name_or_path = .*nothing: no UNet2DModel in safetensors"
    ):
        run_in_process("missing", **options, **{"ddpm.pretrained_model_name_or_path": str(tmp_path / "nothing")})
    with pytest.raises(ValueError, match="has in_channels = 1, base.channels is 3; make them equal"):
        run_in_process("channels", **options, **{"ddpm.pretrained_model_name_or_path": str(first), "base.channels": 3})


def test_gradient_checkpointing_changes_no_gradient(run_in_process):
    plain, checkpointed = run_in_process("plain"), run_in_process("less", **{"base.gradient_checkpointing": True})
    assert losses(plain) == losses(checkpointed)


def test_validation_is_the_same_every_time_and_leaves_the_training_alone(run_in_process):
    held_out = {"base.validation_split": 0.02}
    often = run_in_process(
        "often", **held_out, **{"base.valid_steps": 1, "base.checkpointing_steps": 1, "base.save_model_steps": 2}
    )
    rarely = run_in_process("rarely", **held_out)
    assert losses(often) == losses(rarely)
    last = [read_metrics(folder, prefix="valid")[-1] for folder in (often, rarely)]
    assert all(line.pop("valid/seconds") > 0 and line.pop("valid/peak_memory_gib") > 0 for line in last)
    assert last[0] == last[1]
    frozen = run_in_process("frozen", **held_out, **{"base.valid_steps": 3, "ddpm.learning_rate": 1e-30})
    first, second = (line["valid/loss"] for line in read_metrics(frozen, prefix="valid"))
    assert first == second


def test_tensorboard_files_read_back(run_in_process):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run_in_process(**{"base.logger": "tensorboard", "base.tracker_project": "digits"})
    events = EventAccumulator(str(folder / "logs" / "digits"), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    logged = [line["loss"] for line in read_metrics(folder, prefix="loss")]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(logged)
    assert [event.step for event in events.Images("samples")] == [6]
    assert "config/text_summary" in events.Tags()["tensors"]


def test_tensorboard_shows_each_step_once_after_a_resume(run_in_process):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"base.logger": "tensorboard", "base.checkpointing_steps": 3}
    run_in_process(**options)
    folder = run_in_process(**options, **{"base.resume_from_checkpoint": "checkpoint-3"})
    events = EventAccumulator(str(folder / "logs" / "diffloop"), size_guidance={"scalars": 0}).Reload()
    assert len(list((folder / "logs" / "diffloop").glob("*tfevents*"))) == 2
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_tensorboard_shows_each_step_once_where_there_was_no_checkpoint_yet(run_in_process, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def die(*arguments):
        raise RuntimeError

    options = {"base.logger": "tensorboard", "base.resume_from_checkpoint": "latest"}
    with monkeypatch.context() as patch:
        patch.setattr("trainers.engine.checkpoint.saver.Saver.begin", die)
        with pytest.raises(RuntimeError):
            run_in_process(**options)
    folder = run_in_process(**options)
    events = EventAccumulator(str(folder / "logs" / "diffloop"), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def wandb_records(path):
    """The records of a .wandb file: LevelDB's log format, blocks of 32 KiB after 7 bytes of header."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # too little left in the block for a header
            position += 32768 - position % 32768
            continue
        size, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        parts += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def finished_records(path):
    """All records of a run that has ended: W&B's own process may write the last ones after `finish` has returned."""

    def complete():
        found = list(wandb_records(path))
        return found if any(record.WhichOneof("record_type") == "exit" for record in found) else None

    return wait_for(complete)


NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def test_wandb_keeps_pipelines_and_tables_of_pictures(run_in_process, monkeypatch, tmp_path):
    """The pipeline twice, after two epochs and at the end, with step and epoch; a table at each validation."""
    for name, value in {"MODE": "offline", "SILENT": "true", "DATA_DIR": tmp_path, "CACHE_DIR": tmp_path}.items():
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    options = {"base.logger": "wandb", "base.save_model_steps": 4, "base.valid_steps": 3, "base.validation_split": 0.02}
    task = "conditional_ddpm"
    monkeypatch.setattr("datasets_lib.sources.digits.NAMES", NAMES)
    classes = {f"{task}.valid_classes": ["three", 7], f"{task}.valid_batch_size": 4}
    folder = run_in_process(task=task, **options, **classes)
    [store] = (folder / "logs" / "wandb").glob("offline-run-*/*.wandb")
    records = finished_records(store)
    artifacts = [
        r.request.log_artifact.artifact for r in records if r.request.WhichOneof("request_type") == "log_artifact"
    ]
    artifacts += [r.artifact for r in records if r.WhichOneof("record_type") == "artifact"]
    pipelines = [artifact for artifact in artifacts if artifact.type == "model"]
    assert [json.loads(artifact.metadata) for artifact in pipelines] == [
        {"step": 4, "epoch": 0.4},
        {"step": 6, "epoch": 0.6},
    ]
    held = {entry.path for entry in pipelines[-1].manifest.contents}
    assert held == {
        "model_index.json",
        "pipeline.py",
        "scheduler/scheduler_config.json",
        *(p for p in PIPELINE if p.startswith("unet")),
    }
    tables = [
        json.loads(path.read_text()) for path in sorted(store.parent.glob("files/media/table/samples_table_*.json"))
    ]
    assert [table["columns"] for table in tables] == [["number", "label", "raw", "averaged"]] * 2
    assert [row[:2] for row in tables[0]["data"]] == [[0, "three"], [1, "seven"], [2, "three"], [3, "seven"]]
    kept = [
        entry.path for artifact in artifacts if artifact.type == "run_table" for entry in artifact.manifest.contents
    ]
    assert len([path for path in kept if path.startswith("media/images/")]) == 2 * 8  # validations, pictures


def test_wandb_offline_files_read_back(run_in_process, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    options = {
        "base.logger": "both",
        "base.tracker_project": "project",
        "base.run_name": "name",
        "base.checkpointing_steps": 3,
    }
    folder = run_in_process("run", **options)
    shutil.rmtree(folder / "checkpoint-6")  # as if it had been killed before
    run_in_process("run", **options, **{"base.resume_from_checkpoint": "checkpoint-3"})
    stores = sorted((folder / "logs" / "wandb").glob("offline-run-*/*.wandb"))
    runs, histories, config = [], [], {}
    for path in stores:
        steps = []
        for record in finished_records(path):
            if record.WhichOneof("record_type") == "run":
                runs.append(record.run)
            if record.WhichOneof("record_type") == "config":
                config |= {update.key: json.loads(update.value_json) for update in record.config.update}
            if record.WhichOneof("record_type") == "history":
                items = {
                    ".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }
                steps += [(items["_step"], items["loss"])] if "loss" in items else []
        histories.append(steps)
    assert {(run.project, run.display_name) for run in runs} == {("project", "name")}
    assert len({run.run_id for run in runs}) == 1  # the same run goes on
    logged = [(line["step"], line["loss"]) for line in read_metrics(folder, prefix="loss")]
    assert histories == [logged, logged[3:]]
    assert config["base"]["seed"] == 0
    assert config["ddpm"]["learning_rate"] == 1e-3
    # going back to an older checkpoint is another branch: W&B would drop its steps
    before = (folder / "logs" / "wandb-run-id").read_text()
    run_in_process("run", **options, **{"base.resume_from_checkpoint": "checkpoint-3"})
    assert (folder / "logs" / "wandb-run-id").read_text() != before


def test_model_card(run_in_process):
    from huggingface_hub import ModelCard

    folder = run_in_process(**{"base.validation_split": 0.02})
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "diffusers"
    assert "ddpm" in card.data.tags
    [picture] = re.findall(r"!\[.*?\]\((.*?)\)", card.text)
    assert (folder / picture).is_file()
    assert "| valid_ema/loss |" in card.text
    usage = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    written = yaml.safe_load((folder / "config.yaml").read_text())
    written["base"]["output_dir"] = folder.name  # no path of this machine
    assert yaml.safe_load(re.search(r"```yaml\n(.*?)```", card.text, re.DOTALL)[1]) == written
    assert len(usage.strip().splitlines()) == 3


def test_push_to_hub_uploads_pipeline_card_and_grid_only(run_in_process, monkeypatch):
    calls = {}

    class Api:
        def create_repo(self, name, exist_ok):
            calls["repo"] = name
            return type("Repo", (), {"repo_id": f"me/{name}"})()

        def upload_folder(self, **arguments):
            calls.update(arguments)

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    folder = run_in_process("digits", **{"base.push_to_hub": True})
    uploaded = set(huggingface_hub.utils.filter_repo_objects(files_in(folder), allow_patterns=calls["allow_patterns"]))
    assert uploaded == PIPELINE | {"README.md", "samples/samples-step-000006.png"}
    assert (calls["repo"], calls["repo_id"], calls["folder_path"]) == ("digits", "me/digits", folder)
    assert 'from_pretrained("me/digits")' in (folder / "README.md").read_text()
    assert "token" not in (folder / "config.yaml").read_text()
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match="base.push_to_hub = true: you are not logged in; run `hf auth login`"):
        run_in_process("second", **{"base.push_to_hub": True})


def test_errors_after_the_configuration(tiny_config, capsys, tmp_path, monkeypatch):
    def error_of(**values):
        assert main([str(tiny_config(**values))]) == 1
        return capsys.readouterr().err.strip()

    empty = tmp_path / "empty"
    empty.mkdir()
    folder = {"base.dataset": None, "base.train_data_dir": str(empty)}
    assert str(empty) in error_of(name="a", **folder)
    assert "needs a CUDA device and none is visible" in error_of(name="b", **{"base.mixed_precision": "fp16"})
    assert "learning_rate = {'vae': 0.1}: needs one rate for each of the networks unet" in error_of(
        name="c", **{"ddpm.learning_rate": {"vae": 0.1}}
    )
    (tmp_path / "file").touch()
    assert "cannot be written" in error_of(**{"base.output_dir": str(tmp_path / "file" / "below")})
    held = tmp_path / "held"
    held.mkdir()
    (held / "metrics.jsonl").touch()
    text = error_of(name="held")
    assert (
        "holds a run or other folders already (metrics.jsonl); continue with base.resume_from_checkpoint=latest" in text
    )
    assert "Traceback" not in text
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "WORLD_SIZE = 2: the launcher started these, 1 are connected" in error_of(name="d")


def test_a_network_that_does_not_support_an_option(run_in_process, monkeypatch):
    monkeypatch.setattr(UNet2DModel, "enable_gradient_checkpointing", property(), raising=False)
    with pytest.raises(
        ValueError, match=r"base.gradient_checkpointing = true: network unet \(UNet2DModel\) does not support it"
    ):
        run_in_process(**{"base.gradient_checkpointing": True})


def test_errors_of_libraries_keep_their_traceback(tiny_config, monkeypatch):
    monkeypatch.setattr("train.train", lambda run: int("not a number"))
    with pytest.raises(ValueError, match="invalid literal"):
        json.loads("{}", parse_int=None) or main([str(tiny_config())])


def test_ctrl_c(tiny_config, monkeypatch, capsys):
    def interrupt(run):
        raise KeyboardInterrupt

    monkeypatch.setattr("train.train", interrupt)
    assert main([str(tiny_config())]) == 130
    assert "interrupted before the first step" in capsys.readouterr().err


def test_the_printed_lines_run(run_in_process, tmp_path, monkeypatch):
    folder = run_in_process()
    usage = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    exec(usage, {})
    assert Image.open("sample.png").size == (16, 16)


def test_start_and_end_blocks(tiny_config, capsys):
    train(load_config(tiny_config()))
    text = capsys.readouterr().out
    for expected in (
        "41,609 parameters trained, 0 frozen",
        "steps            6 (0.6 epochs)",
        "4 = 4 x 1 micro-batches x 1 processes",
    ):
        assert expected in text
    assert "DDPMPipeline.from_pretrained(" in text


def train_and_draw(task, run_in_process, **options):
    """Trains a task's tiny config with held-out examples; the run draws at its end, an evaluation from its checkpoint.

    Returns the run's folder after all that the task says of its pictures was asked for.
    """
    held_out = {"base.max_train_samples": 8, "base.validation_split": 0.004}  # 7 of the digits
    folder = run_in_process(task=task, **held_out, **options)
    trainer = load_trainer(open_run(folder))
    validation_set = datasets_lib.build(trainer.base, "validation")
    requests = sampling.evaluation_requests(trainer, 3, validation_set)
    assert len(requests) == (3 if trainer.sample_requests(validation_set) else 0)
    with sampling.evaluation_mode(trainer):
        drawn = sampling.draw(trainer, requests, list(range(len(requests))), 0, 2, validation_set)
    pictures = {name: torch.cat(batches) for name, batches in drawn.items()}
    for name, images in pictures.items():
        assert len(images) == len(requests), name
        assert 0 <= images.min() <= images.max() <= 1, name
    if requests:
        assert pictures["samples"].shape[1:] == (trainer.base.channels, *[trainer.base.resolution] * 2)
        metrics = trainer.sample_metrics(sampling.with_examples(requests, validation_set), pictures)
        assert all(isinstance(value, float) for value in metrics.values())
        assert list((folder / "samples").glob("*-step-*.png"))
    return folder


@pytest.mark.parametrize("task", TRAINERS)
def test_every_task_has_a_tiny_config_and_learns_and_draws(task, run_in_process):
    """Over some steps on the same 8 examples the loss must fall clearly: the update goes the right way."""
    steps = 40 if task in ("dit", "vae", "lora", "lcm_lora") else 20
    folder = train_and_draw(task, run_in_process, **{"base.max_train_steps": steps, "base.logging_steps": steps // 4})
    first, *_, last = [line["loss"] for line in read_metrics(folder, prefix="loss")]
    assert last < 0.9 * first
    assert {"valid/loss", "valid_ema/loss"} <= read_metrics(folder, prefix="valid/")[-1].keys()
    assert find_trainer(task).load_pipeline(folder) is not None


def raising(*arguments):
    raise RuntimeError("broken")


def broken_for(key):
    """A sample() that raises for requests with such a key."""
    sample = DDPMTrainer.sample
    return lambda self, requests, rng: raising() if key in requests[0] else sample(self, requests, rng)


BROKEN = {
    "sample": {"sample": raising},
    "sample of evaluations": {"sample": broken_for("evaluation")},
    "sample of held-out requests": {
        "sample": broken_for("image"),
        "sample_requests": lambda self, validation_set: self.held_out_requests(validation_set, 2),
    },
    "sample_metrics": {"sample_metrics": raising},
    "sample_requests": {"sample_requests": raising},
    "evaluation_requests": {"evaluation_requests": raising},
    "validation_metrics": {"validation_metrics": raising},
}


@pytest.mark.parametrize("what", BROKEN)
def test_the_test_of_every_task_would_notice(what, run_in_process, monkeypatch):
    for method, replacement in BROKEN[what].items():
        monkeypatch.setattr(DDPMTrainer, method, replacement)
    with pytest.raises(RuntimeError, match="broken"):
        train_and_draw("ddpm", run_in_process, **{"base.max_train_steps": 1})


def test_two_metrics_of_a_validation_have_different_names(tiny_config, monkeypatch, capsys):
    monkeypatch.setattr(DDPMTrainer, "sample_metrics", lambda self, requests, images: {"brightness": 0.5, "loss": 0.0})
    assert main([str(tiny_config(**{"base.validation_split": 0.02, "base.max_train_steps": 1}))]) == 1
    error = capsys.readouterr().err
    assert "error: DDPMTrainer: validation_metrics and sample_metrics both return loss; rename one" in error


@pytest.mark.slow
def test_compile_changes_no_names_and_few_bits(run_in_process, network_without_dropout):
    options = {"ddpm.model_config": network_without_dropout}  # compiled dropout draws other numbers
    plain = run_in_process("plain", **options)
    compiled = run_in_process("compiled", **options, **{"base.compile": True})
    for step, value in losses(plain).items():
        assert float.fromhex(losses(compiled)[step]) == pytest.approx(float.fromhex(value), rel=1e-3)
    assert files_in(plain) == files_in(compiled)
    DDPMPipeline.from_pretrained(compiled)


@pytest.mark.slow  # a compilation takes ten seconds
def test_validation_and_saves_compile_nothing(run_in_process, monkeypatch, tmp_path):
    """Other batch sizes, no gradients, eval mode, a config that is written: each would be another compilation."""
    graphs = []

    def count(graph, example_inputs):
        graphs.append([tuple(each.shape) for each in example_inputs if each.ndim == 4 and each.shape[1] == 1])
        return graph.forward

    compile_in_place = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_in_place(self, backend=count))
    settings = json.loads((ROOT / "configs/tests/models/unet2d.json").read_text())
    one_level = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    (tmp_path / "network.json").write_text(json.dumps(settings | one_level))  # a compilation takes long
    options = {"base.compile": True, "base.valid_steps": 2, "base.max_train_steps": 4, "base.validation_split": 0.2}
    options["ddpm.model_config"] = str(tmp_path / "network.json")
    folder = run_in_process(**options, **{"ddpm.valid_batch_size": 3, "base.checkpointing_steps": 1})
    assert "valid_ema/loss" in read_metrics(folder, prefix="valid")[-1]
    assert len(graphs) == 1, f"graphs for inputs {graphs}"


def test_only_the_blocks_that_a_network_names_are_compiled(run_in_process, monkeypatch):
    """Beside one that names some, a network that names none is compiled whole."""
    found = set()
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: found.add(type(self).__name__))
    options = {"base.compile": True, "base.compile_repeated_blocks": True, "base.max_train_steps": 1}
    run_in_process(task="text_to_image", **options)
    assert found == {"BasicTransformerBlock"}
    networks._compile(
        {
            "a": UNet2DConditionModel(sample_size=8, cross_attention_dim=8, block_out_channels=(32,) * 4),
            "b": torch.nn.Linear(1, 1),
        },
        True,
    )
    assert found == {"BasicTransformerBlock", "Linear"}
    with pytest.raises(
        ValueError, match=r"compile_repeated_blocks = true: the networks \(unet\) name no repeated blocks"
    ):
        run_in_process("other", **options)


@pytest.mark.parametrize("task", ["ddpm", slow("vae")])
def test_channels_last_changes_no_names_and_few_bits(run_in_process, network_without_dropout, task):
    options = {"ddpm.model_config": network_without_dropout} if task == "ddpm" else {"vae.decoder_only": False}
    plain = run_in_process("plain", task, **options)
    last = run_in_process("last", task, **options, **{"base.channels_last": True})
    different = 0
    for step, value in losses(plain).items():
        assert float.fromhex(losses(last)[step]) == pytest.approx(float.fromhex(value), rel=1e-4)
        different += losses(last)[step] != value
    assert different  # the layout was another one
    assert files_in(plain) == files_in(last)
    first, second = (find_trainer(task).load_pipeline(folder) for folder in (plain, last))
    for name in ("unet", "vae"):
        for a, b in zip(*(getattr(p, name, torch.nn.Module()).parameters() for p in (first, second)), strict=True):
            assert b.is_contiguous()
            torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


def test_steps_do_not_wait_for_the_device(run_in_process, monkeypatch):
    """Between two log lines no module of ours reads a tensor's value, which on a GPU would wait for it."""
    readers = {}

    def watch(method):
        original = getattr(torch.Tensor, method)

        def reading(self, *arguments, **options):
            caller = sys._getframe(1).f_globals["__name__"]
            if (
                caller.split(".")[0] in ("train", "trainers") and caller != "trainers.engine.data.batches"
            ):  # the order is on the CPU
                readers.setdefault(f"{caller} {method}", 0)
                readers[f"{caller} {method}"] += 1
            return original(self, *arguments, **options)

        monkeypatch.setattr(torch.Tensor, method, reading)

    for method in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        watch(method)
    expected = {
        "trainers.engine.tracking.meters tolist": 4,  # two in a log line: what this process has, and what all have
        "trainers.engine.run.randomness tolist": 2,
        "trainers.engine.validation.sampling cpu": 4,  # pictures, raw and averaged: this process's, and all processes'
    }
    run_in_process(**{"base.logging_steps": 3, "base.validation_split": 0.02, "ddpm.snr_gamma": 5.0})
    assert readers.pop("trainers.engine.validation.means tolist") == 2  # validation metrics, raw and averaged
    assert readers.pop("trainers.common.class_pipeline tolist") == 1  # the noise levels, before the first step
    assert readers.pop("trainers.engine.optim.nonfinite tolist") == 6  # of copies on the host, once the device is done
    assert readers.pop("trainers.engine.checkpoint.snapshot tolist") == 2  # one save, and the export's host copies
    assert readers.pop("trainers.engine.optim.optimizer item") == 6  # where the device is the CPU, which has no queue
    assert readers.pop("trainers.engine.optim.ema item") == 6  # likewise
    assert readers == expected  # 6 steps, 2 log lines


def test_a_step_that_is_skipped_is_told(run_in_process, monkeypatch, capsys):
    trainer_class = find_trainer("ddpm")
    original = trainer_class.compute_loss

    def sometimes_nan(self, batch, rng, step):
        loss, values = original(self, batch, rng, step)
        return (loss * math.nan if step == 3 and self.training else loss), values

    monkeypatch.setattr(trainer_class, "compute_loss", sometimes_nan)
    folder = run_in_process()
    lines = read_metrics(folder, prefix="loss")
    assert [line["skipped"] for line in lines] == [0, 0, 0, 1, 0, 0]
    assert [line["loss"] is None for line in lines] == [False, False, False, True, False, False]
    assert "WARNING: 100% of the last steps were skipped: a gradient was not finite" in capsys.readouterr().out


def test_an_engine_that_is_not_supported(run_in_process, monkeypatch):
    monkeypatch.setattr("trainers.engine.distributed.backends.SUPPORTED", ())
    with pytest.raises(ValueError, match=r"the launcher chose NO: not supported; launch with DDP"):
        run_in_process()


def test_a_launch_that_does_not_do_what_it_was_asked(run_in_process, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"FSDP was asked for, and accelerate runs NO on cpu instead; launch on two"):
        run_in_process()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ValueError, match=r"DEEPSPEED was asked for, and accelerate runs NO on cpu instead"):
        run_in_process()
    with monkeypatch.context() as without:
        without.delenv("LOCAL_RANK", raising=False)
        with pytest.raises(
            ValueError, match=r"USE_DEEPSPEED = true: needs a launcher; start with accelerate launch or"
        ):
            check_devices()
    with monkeypatch.context() as missing:
        missing.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match=r"DeepSpeed, which is not installed: pip install diffloop\[deepspeed\]"):
            check_devices()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"LOCAL_WORLD_SIZE = 4: more processes than the 2 GPUs .* start at most 2"):
        run_in_process("more")


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"fsdp_version": 1}, "fsdp_version = 1: must be 2"),
        ({"cpu_ram_efficient_loading": True}, "frozen networks would be empty on all processes but the first"),
        ({"activation_checkpointing": True}, "it renames weights; set base.gradient_checkpointing instead"),
        ({"cpu_offload": True}, "fsdp_offload_params = true: not supported; set it to false"),
    ],
)
def test_options_of_fsdp_that_are_refused(option, text):
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, "cpu_ram_efficient_loading": False} | option)
    state = SimpleNamespace(fsdp_plugin=plugin)
    with pytest.raises(ValueError, match=re.escape(text)):
        check_engine(SimpleNamespace(distributed_type=DistributedType.FSDP, state=state))


def deepspeed_accelerator(settings=None, precision="no"):
    plugin = DeepSpeedPlugin(hf_ds_config={"zero_optimization": {"stage": 3}} | (settings or {}))
    state = SimpleNamespace(deepspeed_plugin=plugin)
    engine = {"distributed_type": DistributedType.DEEPSPEED, "mixed_precision": precision}
    return SimpleNamespace(state=state, gradient_accumulation_steps=2, num_processes=2, **engine)


@pytest.mark.parametrize(
    ("settings", "precision", "text"),
    [
        ({"zero_optimization": {"stage": 1}}, "no", "zero_stage = 1: must be 2 or 3; without them launch with DDP"),
        ({"zero_optimization": {"stage": "2"}}, "no", "zero_stage = '2': must be 2 or 3"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "no", "has zero_optimization.zero_hpz_partition_size: not known to keep what a run promises; take it out. Allowed there: allgather_bucket_size, "),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "no", "has zero_optimization.offload_optimizer.ratio: not known"),
        ({"communication_data_type": "bf16"}, "no", "has communication_data_type: not known to keep what a run promises"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "no", "offload_param_device = nvme: must be none or cpu"),
        ({"optimizer": {"type": "AdamW"}}, "no", "has a section optimizer: the run's own is used; take it out"),
        ({"scheduler": {"type": "WarmupLR"}}, "no", "has a section scheduler: the run's own is used; take it out"),
        ({}, "fp16", "base.mixed_precision = fp16: not supported with DeepSpeed; use bf16, or launch with DDP"),
    ],
)  # fmt: skip
def test_settings_of_deepspeed_that_are_refused(settings, precision, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        check_engine(deepspeed_accelerator(settings, precision))


def test_networks_are_built_whole_under_zero_3():
    """accelerate would have transformers divide what it loads, frozen encoders too."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    accelerator = deepspeed_accelerator()
    accelerator.state.deepspeed_plugin.set_deepspeed_weakref()
    assert is_deepspeed_zero3_enabled()
    check_engine(accelerator)
    assert not is_deepspeed_zero3_enabled()


def test_what_deepspeed_is_told(tiny_config):
    options = {"ddpm.max_grad_norm": 0.5, "base.train_batch_size": 4, "base.mixed_precision": "bf16"}
    run = load_config(tiny_config(**options))
    accelerator, unet = deepspeed_accelerator({"gradient_clipping": "auto"}, "bf16"), torch.nn.Linear(1, 1)
    configure_deepspeed(accelerator, {"unet": unet}, run.config, run.base)
    told = accelerator.state.deepspeed_plugin.deepspeed_config
    assert told["gradient_clipping"] == 0.5
    assert (told["train_micro_batch_size_per_gpu"], told["gradient_accumulation_steps"]) == (4, 2)
    assert told["train_batch_size"] == 16
    assert (told["bf16"], told["torch_autocast"]) == (
        {"enabled": False},
        {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []},
    )


def test_what_deepspeed_cannot_do(tiny_config):
    run = load_config(tiny_config())
    unet, size = torch.nn.Linear(1, 1), run.base.train_batch_size
    for settings, text in (
        ({"gradient_clipping": 0.5}, "gradient_clipping = 0.5, and the run's configuration comes to 1.0: leave the"),
        (
            {"gradient_accumulation_steps": 7},
            "gradient_accumulation_steps = 7, and the run's configuration comes to 2:",
        ),
        ({"train_batch_size": 1}, f"train_batch_size = 1, and the run's configuration comes to {size * 2 * 2}: leave"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"the launcher says {text}")):
            configure_deepspeed(deepspeed_accelerator(settings), {"unet": unet}, run.config, run.base)
    accelerator = deepspeed_accelerator(precision="bf16")
    with pytest.raises(ValueError, match=r"configuration says bf16, and base.mixed_precision is no: take its sections"):
        configure_deepspeed(accelerator, {"unet": unet}, run.config, run.base)
    with pytest.raises(ValueError, match=r"trains one network, and this run has 2 \(vae, discriminator\); launch with"):
        configure_deepspeed(accelerator, {"vae": unet, "discriminator": unet}, run.config, run.base)
    run.base.compile = True
    with pytest.raises(ValueError, match=r"base.compile = true: not supported with DeepSpeed; set it to false"):
        configure_deepspeed(accelerator, {"unet": unet}, run.config, run.base)


def test_an_error_of_another_process_names_it(tiny_config, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr("train.time.sleep", lambda seconds: None)
    assert main([str(tiny_config(**{"base.seed": -1}))]) == 2
    assert "error on process 3: 1 problem" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        *("polynomial", "one_cycle", "cosine_with_min_lr"),
        *(slow("linear"), slow("warmup_cosine"), slow("cosine_with_restarts")),
    ],
)
def test_rates_under_accumulation(name, run_in_process):
    from trainers.engine.optim.optimizer import learning_rate_schedule

    options = {"ddpm.lr_scheduler": name, "ddpm.lr_warmup_steps": 2, "base.gradient_accumulation_steps": 2}
    folder = run_in_process(**options)
    config = load_config(folder / "config.yaml").config
    expected = [1e-3 * learning_rate_schedule(config, 6)(step) for step in range(6)]
    assert [line["lr"] for line in read_metrics(folder, prefix="lr")] == pytest.approx(expected)


def test_a_folder_with_other_content_is_refused(run_in_process, tmp_path):
    (tmp_path / "mine" / "unet").mkdir(parents=True)
    (tmp_path / "mine" / "unet" / "precious.txt").touch()
    with pytest.raises(ValueError, match=r"holds a run or other folders already \(unet\)"):
        run_in_process("mine")
    with pytest.raises(
        ValueError, match="network unet would share the run's folder unet; rename it, or base.logging_dir"
    ):
        run_in_process("other", **{"base.logging_dir": "unet"})


def test_wandb_without_a_login(run_in_process, monkeypatch):
    import wandb

    def refuse(**options):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(
        ValueError, match=r"W&B does not start: No API key configured\.; run `wandb login`, or set WANDB_MODE=offline"
    ):
        run_in_process(**{"base.logger": "wandb"})
    run_in_process()  # nothing stands in the way of the corrected command


def test_replaced_images_are_told(run_in_process, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(20):
        Image.new("L", (16, 16), number).save(pictures / f"{number}.png")
    (pictures / "3.png").write_bytes(b"")
    run_in_process(
        **{
            "base.dataset": None,
            "base.train_data_dir": str(pictures),
            "base.max_train_samples": 20,
            "base.bad_images": "skip",
        }
    )
    assert "NOTE: 1 of 20 training images could not be read and were replaced" in capsys.readouterr().out


def test_a_warm_up_as_long_as_the_run_is_told(run_in_process, capsys):
    run_in_process(**{"ddpm.lr_scheduler": "cosine", "ddpm.lr_warmup_steps": 6})
    assert "NOTE: the warm-up is as long as the run" in capsys.readouterr().out


def test_a_pipeline_that_cannot_be_written(tiny_config, capsys, monkeypatch):
    def fail(self, output_dir):
        output_dir.mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(find_trainer("ddpm"), "save_pipeline", fail)
    path = tiny_config()
    assert main([str(path)]) == 1
    assert "the pipeline could not be written to" in capsys.readouterr().err
    assert [p.name for p in path.with_suffix("").iterdir() if p.name.startswith(".")] == [".lock"]


def test_pictures_of_a_wrong_shape(run_in_process, monkeypatch):
    monkeypatch.setattr(
        find_trainer("ddpm"), "sample", lambda self, requests, rng: {"samples": torch.rand(len(requests), 16, 16)}
    )
    with pytest.raises(
        ValueError,
        match=r"sample\(\) of DDPMTrainer returned samples of shape \[4, 16, 16\]; it must be \[4, C, H, W\]",
    ):
        run_in_process()
