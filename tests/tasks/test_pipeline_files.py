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

from scripts import merge_lora, sample
from trainers.engine.config.config import load_config
from trainers.engine.config.files import ConfigError
from trainers.engine.export.variant import write_variant
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
    assert str(base) not in (folder / "unet" / "config.json").read_text()  # where it was read from is nobody's business
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
    (source.parent / "tokenizer").mkdir()
    for name in ("vocab.json", "tokenizer_config.json", "notes.txt", "secrets.json", "spiece.model"):
        (source.parent / "tokenizer" / name).write_text("{}")
    copy_part(source.parent / "tokenizer", tmp_path / "words")
    assert {path.name for path in (tmp_path / "words").iterdir()} == {"vocab.json", "tokenizer_config.json"}
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


def test_a_base_of_one_variant_says_how_it_is_read(run_in_process, tmp_path):
    base = copy_of("sd1", tmp_path / "base", half=("unet", "vae", "text_encoder"), variant="fp16")
    wanted = r"weights of the variant fp16 alone: train with the task's option variant=fp16, or save it without one: "
    with pytest.raises(FileNotFoundError, match=wanted):
        run_in_process("run", "text_to_image", **{"text_to_image.pretrained_model_name_or_path": str(base)})
    lora = tiny_models.lora_file(tmp_path / "lora")
    with pytest.raises(SystemExit, match=wanted):
        merged_with(base, tmp_path / "merged", lora)


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


def test_no_config_names_a_folder_of_somebodys_machine(run_in_process, tmp_path):
    base = copy_of("sd1", tmp_path / "base")
    for file, changes in (
        ("unet/config.json", {"_name_or_path": "/home/somebody/unet"}),
        ("vae/config.json", {"_name_or_path": 'C:\\Users\\somebody "x"'}),
        ("text_encoder/config.json", {"_name_or_path": "~/somebody/sd", "dtype": "float16"}),
        ("scheduler/scheduler_config.json", {"_name_or_path": "openai/clip"}),
        (
            "tokenizer/tokenizer_config.json",
            {"tokenizer_file": "/home/somebody/a", "special_tokens_map_file": "./special_tokens_map.json"},
        ),
    ):
        (base / file).write_text(json.dumps(json.loads((base / file).read_text()) | changes))
    run = run_in_process("run", "text_to_image", **{"text_to_image.pretrained_model_name_or_path": str(base)})
    lora = tiny_models.lora_file(tmp_path / "lora")
    for folder in (run, merged_with(base, tmp_path / "merged", lora)):
        found = {path: json.loads(path.read_text()) for path in folder.glob("[stuv]*/*config.json")}
        assert len(found) == 5
        assert not any("somebody" in str(config) for config in found.values())
        assert found[folder / "vae" / "config.json"] == json.loads((base / "vae/config.json").read_text()) | {
            "_name_or_path": ""
        }
        assert contents(folder / "scheduler") == contents(base / "scheduler")
        words = found[folder / "tokenizer" / "tokenizer_config.json"]
        assert (words["tokenizer_file"], words["special_tokens_map_file"]) == ("", "./special_tokens_map.json")
        assert draws(folder).isfinite().all()


def test_a_scheduler_that_is_saved_names_no_folder_either(run_in_process, tmp_path):
    base = copy_of("sd1", tmp_path / "base")
    file = base / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_name_or_path": "/home/somebody/sd"}))
    place = {"pretrained_model_name_or_path": str(base), "prediction_type": "v_prediction"}
    run = run_in_process("run", "text_to_image", **{f"text_to_image.{name}": value for name, value in place.items()})
    lora = run_in_process("lora", "lora", **{f"lora.{name}": value for name, value in place.items()})
    for folder in (run, merged_with(base, tmp_path / "merged", lora)):
        config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        assert (config["prediction_type"], config["_name_or_path"]) == ("v_prediction", "")


@pytest.mark.parametrize(
    ("place", "kept"), [("/gone/base", None), ("../base", None), ("owner/name", "owner/name"), ("tests/tasks", None)]
)
def test_a_trained_network_names_the_hub_alone(place, kept):
    from trainers.engine.export.pipeline import _forget_place

    network = diffusers.AutoencoderKL.from_pretrained(tiny_models.model("sd1") / "vae")
    network.register_to_config(_name_or_path=place)
    _forget_place(network)
    assert network.config["_name_or_path"] == kept


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


# --- merging


def merged_with(base, output, lora, *options):
    run_script(merge_lora, base, output, "--lora", lora, *options)
    return output


@pytest.fixture
def encoder_lora(tmp_path):
    """A LoRA of the UNet and of the text encoder."""
    from peft import LoraConfig

    from trainers.common.lora.files import save_lora

    pipeline = diffusers.DiffusionPipeline.from_pretrained(tiny_models.model("sd1"))
    torch.manual_seed(0)
    for network, targets in ((pipeline.unet, ["to_q", "to_v"]), (pipeline.text_encoder, ["q_proj", "v_proj"])):
        settings = {"r": 4, "lora_alpha": 8, "target_modules": targets, "init_lora_weights": False}
        network.add_adapter(LoraConfig(**settings), adapter_name="default")
    return save_lora(tmp_path / "lora", {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}, {})


def fused(base, lora):
    """{network: {tensor: value}} as peft merges in float32."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32)
    pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return {name: getattr(pipeline, name).state_dict() for name in ("unet", "text_encoder")}


@pytest.mark.parametrize("kind", ["float32", "half", "shards"])
def test_a_merge_changes_only_what_the_lora_changes(tmp_path, encoder_lora, kind):
    networks = ("unet", "text_encoder", "vae")
    changes = {"half": {"half": networks}, "shards": {"half": ("vae",), "shards": ("unet", "text_encoder")}}
    base = copy_of("sd1", tmp_path / "base", **changes.get(kind, {}))
    output, wanted = merged_with(base, tmp_path / "merged", encoder_lora), fused(base, encoder_lora)
    found, of_base = contents(output), contents(base)
    assert found.keys() == of_base.keys()
    different = {name for name in found if found[name] != of_base[name] and name != "model_index.json"}
    changed = {
        str(file.path.relative_to(base)) for name in wanted for file in weight_files(base / name) if not file.is_index
    }
    assert different <= changed  # a shard may hold nothing that a LoRA changes
    assert {name.split("/")[0] for name in different} == set(wanted)
    assert len(changed) == (4 if kind == "shards" else 2)
    for name in changed:
        assert layout(output / name) == layout(base / name)
        state = {key.removeprefix("text_model."): value for key, value in wanted[name.split("/")[0]].items()}
        for key, value in load_file(output / name).items():
            assert torch.equal(value, state[key.removeprefix("text_model.")].to(value.dtype)), key
    assert all(key.startswith("text_model.") for key in load_file(next(output.glob("text_encoder/*.safetensors"))))
    index = json.loads(found["model_index.json"])
    assert index == json.loads(of_base["model_index.json"])
    assert draws(output).isfinite().all()


def test_a_merge_in_another_precision_casts_every_network(tmp_path, encoder_lora):
    base = copy_of("sd1", tmp_path / "base", shards=("vae",))
    output, wanted = (
        merged_with(base, tmp_path / "merged", encoder_lora, "--dtype", "bfloat16"),
        fused(base, encoder_lora),
    )
    for name in ("unet", "text_encoder", "vae"):
        for file in weight_files(base / name):
            if file.is_index:
                about = json.loads((output / name / file.path.name).read_text())["metadata"]
                assert about["total_size"] == json.loads(file.path.read_text())["metadata"]["total_size"] // 2
                continue
            found, of_base = load_file(output / name / file.path.name), load_file(file.path)
            assert found.keys() == of_base.keys()
            state = {key.removeprefix("text_model."): value for key, value in wanted.get(name, of_base).items()}
            for key, value in found.items():
                assert torch.equal(value, state[key.removeprefix("text_model.")].bfloat16()), key
    assert contents(output / "tokenizer") == contents(base / "tokenizer")
    assert draws(output).isfinite().all()


def test_a_merge_leaves_out_a_checker_and_what_is_not_there(tmp_path):
    base = copy_of("sd1", tmp_path / "base")
    index = json.loads((base / "model_index.json").read_text())
    about = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    (base / "model_index.json").write_text(json.dumps(index | about | {"_name_or_path": "/home/somebody/base"}))
    output = merged_with(base, tmp_path / "merged", tiny_models.lora_file(tmp_path / "lora"))
    assert json.loads((output / "model_index.json").read_text()) == index
    parts, folders = listed(output)
    assert parts == folders


def test_a_base_whose_other_networks_are_broken_is_not_merged(tmp_path):
    base = copy_of("sd1", tmp_path / "base")
    [file] = weight_files(base / "vae")
    values = load_file(file.path)
    values["decoder.conv_in.bias"][0] = float("nan")
    save_file(values, file.path, metadata={"format": "pt"})
    with pytest.raises(
        SystemExit, match=r"vae\.decoder\.conv_in\.bias holds numbers that are not finite; .*check the base"
    ):
        merged_with(base, tmp_path / "merged", tiny_models.lora_file(tmp_path / "lora"))
    assert not (tmp_path / "merged").exists()


def test_a_merge_that_cannot_be_written(tmp_path, monkeypatch):
    lora = tiny_models.lora_file(tmp_path / "lora")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    for name in ("shutil.copyfile", "safetensors.torch.save_file"):
        with monkeypatch.context() as patch:
            patch.setattr(name, full)
            with pytest.raises(SystemExit, match=r"cannot be written \(.*No space left"):
                merged_with(tiny_models.model("sd1"), tmp_path / "merged", lora)
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


# --- variants

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_every_network_has_a_variant(run_in_process, variant):
    folder = run_in_process("run", "text_to_image", **{"base.export_variant": variant})
    for name in ("unet", "vae", "text_encoder"):
        files = {file.variant: file for file in weight_files(folder / name)}
        assert files.keys() == {None, variant}
        full, half = load_file(files[None].path), load_file(files[variant].path)
        assert half.keys() == full.keys()
        assert all(torch.equal(half[key], value.to(HALF[variant])) for key, value in full.items())
    pictures = draws(folder, variant=variant, torch_dtype=HALF[variant])
    torch.testing.assert_close(pictures.float(), draws(folder).float(), rtol=0, atol=0.05)


def test_a_variant_that_the_base_brings_is_copied(run_in_process, tmp_path):
    base = copy_of("sd1", tmp_path / "base")
    own = base / "text_encoder" / "model.fp16.safetensors"
    values = {key: value.half() * 1.5 for key, value in load_file(base / "text_encoder" / "model.safetensors").items()}
    save_file(values, own, metadata={"format": "pt", "its": "own"})
    options = {"text_to_image.pretrained_model_name_or_path": str(base), "base.export_variant": "fp16"}
    folder = run_in_process("run", "text_to_image", **options)
    assert (folder / "text_encoder" / own.name).read_bytes() == own.read_bytes()
    assert (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").is_file()


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("vae", {"."}), ("ddpm", {"unet"}), ("noisy_classifier", {"classifier"}), ("conditional_ddpm", {"unet"}),
        ("dit", {"transformer"}),
    ],
)  # fmt: skip
def test_variants_of_other_tasks(run_in_process, task, names):
    folder = run_in_process("run", task, **{"base.export_variant": "fp16", "base.max_train_steps": 4})
    name = "diffusion_pytorch_model.fp16.safetensors"
    found = {str(path.parent.relative_to(folder)) for path in folder.rglob(name)}
    assert found == names
    [place] = names
    kind = json.loads((folder / place / "config.json").read_text())["_class_name"]
    network = getattr(diffusers, kind).from_pretrained(folder / place, variant="fp16", torch_dtype=torch.float16)
    assert network.dtype == torch.float16


def test_a_resumed_run_may_change_it(run_in_process):
    options = {"base.max_train_steps": 4, "base.export_variant": "fp16"}
    folder = run_in_process("run", "vae", **options)
    assert {file.variant for file in weight_files(folder)} == {None, "fp16"}
    resumed = {"base.max_train_steps": 5, "base.resume_from_checkpoint": "latest"}
    run_in_process("run", "vae", **resumed)
    assert {file.variant for file in weight_files(folder)} == {None}  # not that of an earlier step
    run_in_process("run", "vae", **resumed | {"base.export_variant": "bf16", "base.max_train_steps": 6})
    assert {file.variant for file in weight_files(folder)} == {None, "bf16"}


def test_numbers_beyond_half_precision(tmp_path):
    for name, value in (("unet", 1e6), ("vae", 1.0)):
        (tmp_path / name).mkdir()
        values = {"weight": torch.tensor([value]), "steps": torch.tensor([7])}
        save_file(values, tmp_path / name / "diffusion_pytorch_model.safetensors")
    [warning] = write_variant(tmp_path, "fp16")
    assert (
        warning
        == "no fp16 weights of unet: weight has numbers beyond the range of fp16; bf16 has the range of full precision"
    )
    assert {file.variant for file in weight_files(tmp_path / "unet")} == {None}
    half = load_file(tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    assert (half["weight"].dtype, half["steps"].item()) == (torch.float16, 7)
    assert write_variant(tmp_path, "bf16") == []


@pytest.mark.parametrize("task", ["lora", "lcm_lora"])
def test_an_adapter_has_no_variant(tiny_config, task):
    with pytest.raises(ConfigError, match=rf'base.export_variant = "fp16": {task} exports an adapter, and no network'):
        load_config(tiny_config(task, **{"base.export_variant": "fp16"}))


def test_an_export_that_is_killed_leaves_the_pipeline_before(run_in_process, monkeypatch):
    """What is written lies in a hidden folder until all of it is there."""
    folder = run_in_process("run", "text_to_image", **{"base.max_train_steps": 1})
    before = only(contents(folder), "unet", "vae", "text_encoder", "tokenizer", "scheduler", "model_index.json")

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(OSError, match="the pipeline could not be written to .*no space left"):
        run_in_process("run", "text_to_image", **{"base.max_train_steps": 2, "base.resume_from_checkpoint": "latest"})
    assert only(contents(folder), *{name.split("/")[0] for name in before}) == before
    assert not list(folder.glob(".tmp-*"))


def test_a_finished_run_from_a_variant_is_drawn_from(run_in_process, tmp_path):
    """Its config names the base's variant, and its own files have none."""
    base = copy_of("sd1", tmp_path / "base", half=("unet", "vae", "text_encoder"), variant="fp16")
    place = {"text_to_image.pretrained_model_name_or_path": str(base), "text_to_image.variant": "fp16"}
    folder = run_in_process("run", "text_to_image", **place, **{"base.max_train_steps": 1})
    shutil.rmtree(folder / "checkpoint-1")
    shutil.rmtree(base)
    run_script(sample, folder, "--output", tmp_path / "drawn", "--number", "1")
    assert list((tmp_path / "drawn").glob("*.png"))


def test_a_vae_of_the_hub_is_copied_from_its_snapshot(tmp_path, monkeypatch):
    from trainers.common.autoencoder.latents import LatentSpace
    from trainers.engine.config.base_options import BaseConfig

    vae, asked = tiny_models.model("sd1") / "vae", []
    base = BaseConfig(resolution=32, num_epochs=1, dataset="digits")
    space = LatentSpace("dit.vae", str(vae), base, torch.device("cpu"), torch.float32)
    space.source = "owner/name"
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *place, **options: asked.append((place, options)) or str(vae)
    )
    space.copy_to(tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(vae)
    [(place, options)] = asked
    assert place == ("owner/name",)
    assert "*" not in options["allow_patterns"]

    def fail(*_, **__):
        raise OSError("no net")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(
        FileNotFoundError, match=r"dit.vae = owner/name: no AutoencoderKL .* could be read; .*\(no net\)"
    ):
        space.copy_to(tmp_path / "again")


def test_a_merge_saves_the_scheduler_that_the_lora_needs(run_in_process, tmp_path):
    run = run_in_process("run", "lora", **{"lora.prediction_type": "v_prediction", "base.max_train_steps": 1})
    output = merged_with(tiny_models.model("sd1"), tmp_path / "merged", run)
    config = json.loads((output / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == "v_prediction"
    index = json.loads((output / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", config["_class_name"]]
    assert draws(output).isfinite().all()
