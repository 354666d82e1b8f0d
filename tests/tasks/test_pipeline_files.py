"""What finished pipelines hold of their base: what was not trained is the base's, byte for byte, and older programs read it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import tiny_models
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from script_calls import run_script

from scripts import merge_lora
from trainers.weight_files import WeightFile, copy_part, variant_name, weight_files

WEIGHTS = ("model.safetensors", "diffusion_pytorch_model.safetensors")


def contents(folder):
    """{path: bytes} of all files below a folder."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def only(files, *folders):
    return {name: content for name, content in files.items() if name.split("/")[0] in folders}


def layout(file):
    """{name: (shape, dtype)} of a safetensors file."""
    with safe_open(file, "pt") as opened:
        return {key: (opened.get_tensor(key).shape, opened.get_tensor(key).dtype) for key in opened.keys()}  # noqa: SIM118


def copy_of(family, folder, *, half=(), variant=None, shards=()):
    """A copy of a tiny base; `half` are networks in half precision, `shards` those in two files of weights."""
    shutil.copytree(tiny_models.model(family), folder)
    for name in {*half, *shards}:
        [file] = weight_files(folder / name)
        values = load_file(file.path)
        if name in half:
            values = {key: value.half() if value.is_floating_point() else value for key, value in values.items()}
        file.path.unlink()
        if name not in shards:
            save_file(values, folder / name / file.named(variant), metadata={"format": "pt"})
            continue
        stem, keys, weight_map = file.plain.removesuffix(".safetensors"), sorted(values), {}
        for number, part in enumerate((keys[::2], keys[1::2]), start=1):
            shard = variant_name(f"{stem}-0000{number}-of-00002.safetensors", variant)
            save_file({key: values[key] for key in part}, folder / name / shard, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, shard)
        index = {"metadata": {"total_size": sum(value.nbytes for value in values.values())}, "weight_map": weight_map}
        name_of_index = variant_name(f"{stem}.safetensors.index.json", variant)
        (folder / name / name_of_index).write_text(json.dumps(index))
    return folder


def draws(folder, **options):
    """A picture by plain diffusers without a word about precision; no part may be missing."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "output_type": "pt", "height": 32, "width": 32}
    return pipeline("a photo of a cat", generator=torch.Generator().manual_seed(0), **settings).images


def listed(folder):
    """The parts that a pipeline's index lists, and those whose folders are there."""
    index = json.loads((folder / "model_index.json").read_text())
    parts = {name for name, value in index.items() if isinstance(value, list) and value[0] is not None}
    return parts, {path.name for path in folder.iterdir() if path.is_dir() and path.name not in ("samples", "logs")}


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_run_copies_what_it_did_not_train(run_in_process, family):
    base = tiny_models.model(family)
    options = {"base.checkpointing_steps": 100, "text_to_image.pretrained_model_name_or_path": str(base)}
    folder = run_in_process("run", "text_to_image", **options)
    shutil.rmtree(folder / "checkpoint-6")
    parts, folders = listed(folder)
    assert parts == folders == listed(base)[0]
    copied = parts - {"unet"}
    assert only(contents(folder), *copied) == only(contents(base), *copied)
    assert {"vocab.json", "merges.txt"} <= {path.name for path in (folder / "tokenizer").iterdir()}
    names = layout(base / "unet" / WEIGHTS[1])
    assert layout(folder / "unet" / WEIGHTS[1]) == names
    index, of_base = (json.loads((place / "model_index.json").read_text()) for place in (folder, base))
    assert index == of_base
    (folder / "other").touch()
    modes = {path.stat().st_mode for name in parts for path in (folder / name).iterdir()}
    assert modes == {(folder / "other").stat().st_mode}
    assert draws(folder).isfinite().all()


def test_the_export_reads_no_network_of_the_base(run_in_process, monkeypatch):
    """Loading them would take their memory."""
    from trainers.common.autoencoder.latents import LatentSpace
    from trainers.common.text_to_image import pipeline_files
    from trainers.common.text_to_image.base_model import BaseModel

    write = pipeline_files.write_pipeline

    def watched(*place, **options):
        for owner, name in ((BaseModel, "_read"), (LatentSpace, "load")):
            monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("a network is read"))
        return write(*place, **options)

    monkeypatch.setattr(pipeline_files, "write_pipeline", watched)
    assert (run_in_process("run", "text_to_image") / "model_index.json").is_file()


@pytest.mark.parametrize("shards", [(), ("text_encoder", "vae")])
def test_a_variant_is_copied_by_plain_names(run_in_process, tmp_path, shards):
    networks = ("unet", "vae", "text_encoder")
    base = copy_of("sd1", tmp_path / "base", half=networks, variant="fp16", shards=shards)
    config = base / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"float32"', '"float16"'))
    place = {"text_to_image.pretrained_model_name_or_path": str(base), "text_to_image.variant": "fp16"}
    folder = run_in_process("run", "text_to_image", **place)
    found = contents(folder)
    for name in ("vae", "text_encoder"):
        files = list(weight_files(folder / name))
        assert {file.variant for file in files} == {None}
        wanted = {
            variant_name(f"{name}/{file.plain}", None): file.path.read_bytes() for file in weight_files(base / name)
        }
        weights = {key: content for key, content in wanted.items() if key.endswith(".safetensors")}
        assert len(weights) == (2 if shards else 1)
        assert weights.items() <= found.items()
    dtypes = {dtype for _, dtype in layout(folder / "unet" / WEIGHTS[1]).values()}
    assert dtypes == {torch.float32}
    assert '"float32"' in (folder / "text_encoder" / "config.json").read_text()  # or diffusers reads two precisions
    assert draws(folder).isfinite().all()


def test_only_what_is_safe_to_read_is_copied(tmp_path):
    source = tmp_path / "text_encoder"
    shutil.copytree(tiny_models.model("sd1") / "text_encoder", source)
    for name in ("pytorch_model.bin", "flax_model.msgpack", "model.onnx", "modeling.py", "model.ema.safetensors",
                 "pytorch_model.bin.index.json", "notes.txt", "other.safetensors"):  # fmt: skip
        (source / name).write_text("{}")
    copy_part(source, tmp_path / "copy")
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {"config.json", "model.safetensors"}
    links = tmp_path / "snapshot"  # as the hub's cache
    links.mkdir()
    for path in (tmp_path / "copy").iterdir():
        (links / path.name).symlink_to(path)
    copy_part(links, tmp_path / "resolved")
    assert contents(tmp_path / "resolved") == contents(tmp_path / "copy")
    assert not any(path.is_symlink() for path in (tmp_path / "resolved").iterdir())


def test_weights_that_are_gone_are_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"text_encoder: there is no \*.fp16.safetensors any more; put the base"
    ):
        copy_part(tiny_models.model("sd1") / "text_encoder", tmp_path / "copy", "fp16")


def test_names_of_weights():
    for plain, name in (
        ("model.safetensors", "model.fp16.safetensors"),
        ("model-00001-of-00002.safetensors", "model.fp16-00001-of-00002.safetensors"),
        ("model.safetensors.index.json", "model.safetensors.index.fp16.json"),
    ):
        assert variant_name(plain, "fp16") == name
        assert variant_name(plain, None) == plain


def test_older_names_of_shards_in_a_variant(tmp_path):
    for name in ("model-00001-of-00002.fp16.safetensors", "model.non_ema.safetensors", "model.safetensors.index.json"):
        (tmp_path / name).touch()
    found = [(file.plain, file.variant, file.is_index) for file in weight_files(tmp_path)]
    assert found == [
        ("model-00001-of-00002.safetensors", "fp16", False),
        ("model.safetensors", "non_ema", False),
        ("model.safetensors.index.json", None, True),
    ]
    assert WeightFile(tmp_path, "model.safetensors", None).named("bf16") == "model.bf16.safetensors"


def test_a_tokenizer_of_transformers_5_gets_the_files_of_4(run_in_process, tmp_path):
    base = copy_of("sd1", tmp_path / "base")
    tokenizer = diffusers.DiffusionPipeline.from_pretrained(base).tokenizer
    shutil.rmtree(base / "tokenizer")
    tokenizer.save_pretrained(base / "tokenizer")
    assert not (base / "tokenizer" / "merges.txt").exists()
    run = run_in_process("run", "text_to_image", **{"text_to_image.pretrained_model_name_or_path": str(base)})
    lora = tiny_models.lora_file(tmp_path / "lora")
    run_script(merge_lora, base, tmp_path / "merged", "--lora", lora)
    files = contents(tiny_models.model("sd1") / "tokenizer")
    for folder in (run, tmp_path / "merged"):
        found = contents(folder / "tokenizer")
        assert contents(base / "tokenizer").items() <= found.items()
        assert json.loads(found["vocab.json"]) == json.loads(files["vocab.json"])
        assert [line for line in found["merges.txt"].splitlines() if not line.startswith(b"#")] == [
            line for line in files["merges.txt"].splitlines() if not line.startswith(b"#")
        ]


# --- another autoencoder, another scheduler


def test_another_vae_is_copied_from_its_own_folder(run_in_process, tmp_path):
    vae = tmp_path / "run_of_vae"
    shutil.copytree(tiny_models.model("sdxl") / "vae", vae)
    (vae / "notes.txt").write_text("mine")
    folder = run_in_process("run", "text_to_image", **{"text_to_image.vae": str(vae)})
    (vae / "notes.txt").unlink()
    assert contents(folder / "vae") == contents(vae)


def test_a_scheduler_that_the_run_changed_is_its_own(run_in_process):
    options = {"text_to_image.prediction_type": "v_prediction"}
    folder = run_in_process("run", "text_to_image", **options)
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert (config["_class_name"], config["prediction_type"]) == ("PNDMScheduler", "v_prediction")
