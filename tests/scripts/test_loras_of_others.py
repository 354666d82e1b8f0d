"""LoRA files as other programs write them: each is one LoRA under names that the rules here give it, and means the same."""

from __future__ import annotations

import copy
import functools
import json
import re
import shutil

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from lora_changes import differences
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from script_calls import run_script
from tiny_models import model

from scripts import convert_lora, merge_lora, sample
from train import main
from trainers.common.lora.files import read_lora
from trainers.common.lora.foreign_kinds import KINDS
from trainers.common.lora.loading import load_lora
from trainers.common.lora.spellings import spelled
from trainers.inference.lora_pipeline import add_loras, parse_loras

RANK, ALPHA = 4, 6.0
NOTE = "{}: only its LoRA is read; left out: {}, trained with it for words of prompts"
ALL = ["to_q", "to_out.0", "proj_in", "ff.net.0.proj", "conv1", "conv_shortcut", "time_emb_proj", "conv", "conv_in",
       "conv_out", "time_embedding.linear_1"]  # fmt: skip
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT = ["q_proj", "out_proj", "fc1"]


# one LoRA ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A pipeline whose UNet has two layers in a level, as the original network's names count them."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(model("sd1"), safety_checker=None)
    torch.manual_seed(0)
    pipeline.unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=2, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
    )  # fmt: skip
    pipeline.save_pretrained(tmp_path_factory.mktemp("base"))
    return tmp_path_factory.getbasetemp() / "base0"


@functools.cache
def loaded(base):
    return diffusers.StableDiffusionPipeline.from_pretrained(base, safety_checker=None)


def copied(base):
    """A pipeline whose networks may be changed."""
    parts = {name: copy.deepcopy(getattr(loaded(base), name)) for name in ("unet", "text_encoder")}
    return diffusers.StableDiffusionPipeline(**loaded(base).components | parts)


def networks_of(base):
    pipeline = copied(base)
    return {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}


def adapted(base, lora_alpha, unet, text, seed=0, **options):
    """Networks with adapters of random numbers."""
    torch.manual_seed(seed)
    networks = {name: part for name, part in networks_of(base).items() if name == "unet" or text}
    for name, network in networks.items():
        targets = unet if name == "unet" else text
        config = LoraConfig(r=RANK, lora_alpha=lora_alpha, target_modules=targets, init_lora_weights=False, **options)
        network.requires_grad_(False)
        network.add_adapter(config)
    return networks


@pytest.fixture(scope="module")
def trained(base):
    """trained(alpha, unet, text) -> the networks; its tensors by network and module, [("unet", "conv_in", A, B), ...]."""
    made = {}

    def make(alpha, unet, text):
        key = repr((alpha, unet, text))
        if key not in made:
            networks = adapted(base, alpha, unet, text)
            rows = [
                (name, key, module.lora_A["default"].weight.data, module.lora_B["default"].weight.data)
                for name, network in networks.items()
                for key, module in network.named_modules()
                if isinstance(module, LoraLayer)
            ]
            made[key] = networks, rows
        return made[key]

    return make


# its names -----------------------------------------------------------------------------------------------------------


def in_original_words(unet):
    """The original network's names of a UNet's parts, numbered in the order in which its code builds them."""
    names = {"conv_in": "input_blocks.0.0", "conv_out": "out.2"}
    names |= {f"time_embedding.linear_{n}": f"time_embed.{2 * n - 2}" for n in (1, 2)}
    names |= {f"add_embedding.linear_{n}": f"label_emb.0.{2 * n - 2}" for n in (1, 2)}
    number = 1
    for level, block in enumerate(unet.down_blocks):
        for layer in range(len(block.resnets)):
            names[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{number}.0"
            names[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
        number += 1
    for place, part in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        names[f"mid_block.{part}"] = f"middle_block.{place}"
    number = 0
    for level, block in enumerate(unet.up_blocks):
        for layer in range(len(block.resnets)):
            names[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{number}.0"
            names[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{number}.1"
            number += 1
        place = 2 if hasattr(block, "attentions") else 1  # behind the attention, if there is one
        names[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{place}.conv"
    return names


INNER = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"}
INNER["conv_shortcut"] = "skip_connection"


def original(unet, module):
    names = in_original_words(unet)
    part = max((name for name in names if module == name or module.startswith(f"{name}.")), key=len)
    rest = module.removeprefix(part).removeprefix(".")
    return f"{names[part]}.{INNER.get(rest, rest)}" if rest else names[part]


def text_name(module):
    return module if module.startswith("text_model.") else f"text_model.{module}"


def prefixed(row, unet="unet.", text="text_encoder."):
    network, module, _, _ = row
    return f"{unet}{module}" if network == "unet" else f"{text}{text_name(module)}"


def pair(name, down, up, kind, alpha=None):
    """The tensors of a module in one of the spellings."""
    spelling = {
        "peft": (".lora_A.weight", ".lora_B.weight"),
        "named": (".lora_A.default.weight", ".lora_B.default.weight"),
        "kohya": (".lora_down.weight", ".lora_up.weight"),
        "diffusers": (".lora.down.weight", ".lora.up.weight"),
        "linear": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
        "procs": ("_lora.down.weight", "_lora.up.weight"),
    }[kind]
    found = {f"{name}{end}": value.contiguous() for end, value in zip(spelling, (down, up), strict=True)}
    return found | ({} if alpha is None else {f"{name}.alpha": torch.tensor(float(alpha))})


def flat(name):
    return name.replace(".", "_")


def procs(module):
    """As attention processors were called: attn1.processor.to_out_lora."""
    return module.replace(".to_out.0", ".to_out").replace("attn1.", "attn1.processor.").replace(
        "attn2.", "attn2.processor."
    )  # fmt: skip


def old_text(row):
    """As the first text encoders' LoRAs were called: self_attn.to_q_lora."""
    return prefixed(row).replace("q_proj", "to_q").replace("out_proj", "to_out")


# name -> (alpha, the UNet's targets, the text encoder's, tensors of a module)
WITH_ALPHA = {
    "alpha beside": (ALL, TEXT, lambda unet, row: pair(prefixed(row), *row[2:], "peft", ALPHA)),
    "kohya": (
        ALL,
        TEXT,
        lambda unet, row: pair(flat(prefixed(row, "lora_unet_", "lora_te_")), *row[2:], "kohya", ALPHA),
    ),
    "kohya, te1": (
        ATTENTION,
        TEXT,
        lambda unet, row: pair(flat(prefixed(row, "lora_unet_", "lora_te1_")), *row[2:], "kohya", ALPHA),
    ),
    "kohya, original names": (
        ALL,
        [],
        lambda unet, row: pair(flat(f"lora_unet_{original(unet, row[1])}"), *row[2:], "kohya", ALPHA),
    ),
    "lycoris": (
        ALL,
        TEXT,
        lambda unet, row: pair(flat(prefixed(row, "lycoris_", "lycoris_")), *row[2:], "kohya", ALPHA),
    ),
    "ComfyUI": (
        ALL,
        TEXT,
        lambda unet, row: pair(
            f"diffusion_model.{original(unet, row[1])}" if row[0] == "unet" else prefixed(row, text="clip_l."),
            *row[2:],
            "kohya",
            ALPHA,
        ),
    ),
    "OneTrainer, dots": (
        ALL,
        TEXT,
        lambda unet, row: pair(prefixed(row, "lora_unet.", "lora_te."), *row[2:], "kohya", ALPHA),
    ),
    "OneTrainer, its own": (
        ALL,
        TEXT,
        lambda unet, row: pair(
            f"unet.{original(unet, row[1])}" if row[0] == "unet" else prefixed(row, text="clip_l."),
            *row[2:],
            "kohya",
            ALPHA,
        ),
    ),
    "no prefix, alpha beside": (
        ATTENTION,
        [],
        lambda unet, row: (
            pair(procs(row[1]), *row[2:], "procs", None) | {f"{procs(row[1])}.alpha": torch.tensor(ALPHA)}
        ),
    ),
}
WITHOUT = {  # alpha = r
    "peft": (ALL, TEXT, lambda unet, row: pair(prefixed(row), *row[2:], "peft")),
    "diffusers": (
        ATTENTION,
        TEXT,
        lambda unet, row: pair(prefixed(row), *row[2:], "diffusers" if row[0] == "unet" else "linear"),
    ),
    "attention processors": (
        ATTENTION,
        ["q_proj", "out_proj"],
        lambda unet, row: pair(procs(prefixed(row)) if row[0] == "unet" else old_text(row), *row[2:], "procs"),
    ),
    "save_attn_procs": (ATTENTION, [], lambda unet, row: pair(procs(row[1]), *row[2:], "procs")),
    "no prefix": (ALL, [], lambda unet, row: pair(row[1], *row[2:], "peft")),
    "peft's names": (
        ALL,
        TEXT,
        lambda unet, row: pair(
            prefixed(row, "unet.base_model.model.", "text_encoder.base_model.model."), *row[2:], "named"
        ),
    ),
    "diffusion_model, lora_A": (
        ALL,
        TEXT,
        lambda unet, row: pair(
            f"diffusion_model.{original(unet, row[1])}"
            if row[0] == "unet"
            else prefixed(row, text="text_encoders.clip_l.transformer."),
            *row[2:],
            "peft",
        ),
    ),
}
FORMATS = {name: (ALPHA, *rest) for name, rest in WITH_ALPHA.items()} | {
    name: (float(RANK), *rest) for name, rest in WITHOUT.items()
}


@pytest.fixture
def written(trained, tmp_path):
    """written(format) -> a file of the LoRA, its alpha and targets, and the networks that it was made from."""

    def make(name, **about):
        alpha, unet, text, tensors_of = FORMATS[name]
        networks, rows = trained(alpha, unet, text)
        tensors = {}
        for row in rows:
            tensors |= tensors_of(networks["unet"], row)
        file = tmp_path / "lora.safetensors"
        save_file(tensors, file, metadata=about or None)
        return file, (alpha, unet, text), networks

    return make


def assert_same(found, wanted, tolerance=1e-6):
    assert found.keys() == wanted.keys()
    assert len(found) >= 8
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=0, atol=tolerance, msg=str(key))


def through_lora_option(base, file):
    """What `--lora FILE` of the scripts does."""
    pipeline = copied(base)
    add_loras(pipeline, parse_loras([str(file)]))
    return differences({"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}, "lora_0")


def products(lora):
    """alpha / r * B @ A of what was read, by the networks' names."""
    found = {}
    for network, tensors in lora.tensors.items():
        for module, scaling in lora.scalings(network).items():
            down, up = (tensors[f"{module}.lora_{letter}.weight"] for letter in "AB")
            product = (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])
            found[network, module.removeprefix("text_model.")] = scaling * product
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_every_user_reads_every_format(base, written, tmp_path, name):
    file, (_, *targets), networks = written(name)
    wanted = differences(networks)
    assert_same(through_lora_option(base, file), wanted)

    continued = adapted(base, 2.0, *targets, seed=1)  # lora.lora_weights, whatever the run's own alpha
    load_lora(file, continued)
    assert_same(differences(continued), wanted)

    for to in ("diffusers", "kohya"):
        run_script(convert_lora, file, tmp_path / f"{to}.safetensors", "--to", to)
        assert_same(products(read_lora(tmp_path / f"{to}.safetensors")), wanted)


def test_a_foreign_file_is_merged_and_drawn_with(base, written, tmp_path):
    file, _, networks = written("ComfyUI")
    run_script(merge_lora, base, tmp_path / "merged", "--lora", f"{file}:0.5", "--dtype", "float32")
    before, after = networks_of(base), networks_of(tmp_path / "merged")
    for (name, key), difference in differences(networks).items():
        layers = [dict(each[name].named_modules())[key] for each in (before, after)]
        torch.testing.assert_close(layers[1].weight, layers[0].weight + 0.5 * difference, rtol=0, atol=1e-6)
    out = tmp_path / "out"
    run_script(sample, base, "--prompt", "a cat", "--steps", "1", "--lora", file, "--output", out)
    assert list(out.rglob("*.png"))


def test_a_run_continues_from_a_foreign_file(base, trained, tiny_config, tmp_path, capsys):
    networks, rows = trained(ALPHA, ATTENTION, [])
    tensors = {"bundle_emb.sks.clip_l": torch.ones(2, 32)}
    for row in rows:
        tensors |= FORMATS["ComfyUI"][3](networks["unet"], row)
    file = tmp_path / "comfy.safetensors"
    save_file(tensors, file)
    options = {"pretrained_model_name_or_path": str(base), "lora_weights": str(file), "train_text_encoder": False,
               "learning_rate": 1e-9, "use_ema": False}  # fmt: skip
    options = {f"lora.{name}": value for name, value in options.items()} | {"base.max_train_steps": 1}
    assert main([str(tiny_config("lora", **options))]) == 0
    assert "NOTE: " + NOTE.format(file, "1 embedding (sks)") in capsys.readouterr().out
    assert_same(products(read_lora(tmp_path / "config")), differences(networks), 1e-5)


PEFT = {
    "plain": {"lora_alpha": 6},
    "rslora": {"lora_alpha": 6, "use_rslora": True},
    "patterns": {"lora_alpha": 6, "rank_pattern": {"conv_in": 2}, "alpha_pattern": {"to_q": 3}},
    "dora": {"lora_alpha": 6, "use_dora": True},
}


def merged(networks):
    """Weights of networks whose adapters are merged, by peft itself."""
    plain = {}
    for name, network in networks.items():
        if isinstance(network, PeftModel):
            network = network.merge_and_unload()
        for module in network.modules():
            if isinstance(module, LoraLayer):
                module.merge()
        for key, value in network.state_dict().items():
            if ".lora_" not in key:
                plain[name, key.replace(".base_layer.", ".")] = value
    return plain


@pytest.mark.parametrize("kind", PEFT)
def test_what_a_network_saves_by_itself(base, tmp_path, kind):
    """diffusers' save_lora_adapter: no prefix, and options in the header that name no network either."""
    networks = adapted(base, unet=ATTENTION, text=[], **PEFT[kind])
    networks["unet"].save_lora_adapter(tmp_path)
    pipeline = copied(base)
    add_loras(pipeline, [(tmp_path, 1.0)])
    assert_same(merged({"unet": pipeline.unet}), merged(networks))


# peft's folders ------------------------------------------------------------------------------------------------------


def saved_by_peft(base, folder, network, options):
    """A folder that peft writes, and the network with the adapter in it."""
    torch.manual_seed(0)
    targets = ["to_q", "to_out.0", "conv1", "conv_in"] if network == "unet" else ["q_proj", "fc1"]
    config = LoraConfig(r=RANK, target_modules=targets, init_lora_weights=False, **options)
    made = get_peft_model(networks_of(base)[network], config)
    for name, parameter in made.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.1 * torch.rand_like(parameter)
    made.save_pretrained(folder)
    return made


@pytest.mark.parametrize("kind", PEFT)
def test_folders_of_peft(base, tmp_path, kind):
    made = {name: saved_by_peft(base, tmp_path / "lora" / name, name, PEFT[kind]) for name in ("unet", "text_encoder")}
    wanted = merged(made)
    pipeline = copied(base)
    loras = parse_loras([str(tmp_path / "lora")])
    assert list(add_loras(pipeline, loras)) == ["lora_0"]
    assert_same(merged({"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}), wanted)


@pytest.mark.parametrize("network", ["unet", "text_encoder"])
def test_a_folder_of_one_network(base, tmp_path, network):
    """The names of modules say which it is."""
    wanted = differences({network: saved_by_peft(base, tmp_path / "x", network, PEFT["plain"]).base_model.model})
    assert through_lora_option(base, tmp_path / "x").keys() == wanted.keys()
    for path in (tmp_path / "x", tmp_path / "x" / "adapter_model.safetensors"):
        found = through_lora_option(base, path)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_the_second_text_encoder_has_a_folder_of_its_name(base, tmp_path):
    saved_by_peft(base, tmp_path / "text_encoder_2", "text_encoder", PEFT["plain"])
    assert list(read_lora(tmp_path).tensors) == ["text_encoder_2"]


def test_pictures_record_all_files_of_a_folder(base, tmp_path):
    saved_by_peft(base, tmp_path / "lora", "unet", PEFT["plain"])
    out = tmp_path / "out"
    run_script(sample, base, "--prompt", "a cat", "--steps", "1", "--lora", tmp_path / "lora", "--output", out)
    [picture] = out.rglob("samples/*.json")
    files = json.loads(picture.read_text())["files"]
    assert {str(tmp_path / "lora" / f"adapter_{name}") for name in ("model.safetensors", "config.json")} <= files.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (None, "no file .*adapter_config.json, which says alpha; peft writes it beside adapter_model.safetensors"),
        ([], r"adapter_config.json: must be a JSON object, found \[\]"),
        ({"peft_type": "LOHA"}, "adapter_config.json: peft_type = LOHA; only LORA is read"),
        ({"r": 3}, "is of rank 4, and its adapter_config.json says 3"),
        ({"use_dora": True}, "use_dora = True in its adapter_config.json, and 0 modules are DoRAs"),
        ({"lora_alpha": 0}, "adapter_config.json: unet.lora_alpha = 0 in it: an alpha must be positive and finite"),
        ({"modules_to_save": ["conv_out"]}, "adapter_config.json: unet.modules_to_save = .* in it changes what"),
        ({"rank_pattern": {"(a+)+": 4}}, "regular expressions are not read"),
    ],
    ids=str,
)
def test_settings_of_peft_that_are_refused(base, tmp_path, options, message):
    saved_by_peft(base, tmp_path, "unet", PEFT["plain"])
    config = tmp_path / "adapter_config.json"
    if options is None:
        config.unlink()
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | options if options else options))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_lora(tmp_path)


def test_folders_that_hold_no_lora_or_two(base, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*; give a LoRA as .safetensors, or a folder with pytorch_l"):
        read_lora(tmp_path)
    (tmp_path / "a.safetensors").touch()
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"it has a.safetensors, adapter_model.bin: give a file"):
        read_lora(tmp_path)
    saved_by_peft(base, tmp_path, "unet", PEFT["plain"])
    shutil.copytree(tmp_path, tmp_path / "unet")
    with pytest.raises(ValueError, match="two of its folders hold a LoRA of unet; one must"):
        read_lora(tmp_path)


# names of the real networks ------------------------------------------------------------------------------------------

SIZES = {
    "sd1": {"cross_attention_dim": 768},
    "sd2": {"cross_attention_dim": 1024, "use_linear_projection": True, "attention_head_dim": [5, 10, 20, 20]},
    "sdxl": {
        "cross_attention_dim": 2048, "use_linear_projection": True, "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20],
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip
COUNTS = {"sd1": 282, "sd2": 282, "sdxl": 794}


@pytest.mark.parametrize("family", SIZES)
def test_all_names_of_a_real_network(family):
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**SIZES[family])
    layers = torch.nn.Linear | torch.nn.Conv2d
    modules = [name for name, module in unet.named_modules() if isinstance(module, layers)]
    assert len(modules) == COUNTS[family]
    names = {original(unet, module): module for module in modules}
    state = {f"model.diffusion_model.{name}.weight": module for name, module in names.items()}
    state |= {f"model.diffusion_model.{name}.bias": None for name in names}  # which it needs
    theirs = convert_ldm_unet_checkpoint(state, unet.config)  # diffusers' own opinion on what the test calls original
    assert {key: value for key, value in theirs.items() if value} == {f"{name}.weight": name for name in modules}

    for name, module in names.items():
        for key in (
            f"diffusion_model.{name}.lora_A.weight",
            f"lora_unet_{flat(name)}.lora_down.weight",
            f"lora_unet_{flat(module)}.lora_down.weight",
            f"lycoris_{flat(module)}.lora_down.weight",
            f"unet.{module}.lora_A.weight",
            f"{module}.lora_A.weight",
        ):
            assert spelled(key) == ("unet", module, "down"), key


# LyCORIS, OneTrainer -------------------------------------------------------------------------------------------------


def test_a_convolution_with_a_kernel_of_its_own(base, tmp_path):
    """LyCORIS' "Tucker": W + alpha / r * (1x1 up) (3x3 mid) (1x1 down), which is computed by convolving."""
    torch.manual_seed(0)
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    down, mid, up = torch.randn(4, 16, 1, 1), torch.randn(4, 4, 3, 3), torch.randn(16, 4, 1, 1)
    parts = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
    file = tmp_path / "x.safetensors"
    save_file({f"{name}.{part}": value for part, value in parts.items()}, file)
    difference = through_lora_option(base, file)["unet", "down_blocks.0.resnets.0.conv1"]
    picture = torch.randn(1, 16, 8, 8)
    convolve = torch.nn.functional.conv2d
    wanted = 0.5 * convolve(convolve(convolve(picture, down), mid, padding=1), up)
    torch.testing.assert_close(convolve(picture, difference, padding=1), wanted, rtol=1e-5, atol=1e-4)
    parts["lora_mid.weight"] = torch.randn(3, 4, 3, 3)
    save_file({f"{name}.{part}": value for part, value in parts.items()}, file)
    with pytest.raises(ValueError, match=r"conv1: lora_mid \[3, 4, 3, 3\] does not fit lora_down \[4, 16, 1, 1\]"):
        read_lora(file)


def test_embeddings_beside_a_lora_are_left_out_and_named(base, written, capsys):
    file, arguments, networks = written("kohya")
    words = {"bundle_emb.<cat>.clip_l": torch.ones(2, 32), "bundle_emb.a.dog.clip_l": torch.ones(2, 32)}
    save_file(load_file(file) | words | {"bundle_emb.a.dog.clip_l_out": torch.ones(2, 32)}, file)
    note = NOTE.format(file, "2 embeddings (<cat>, a.dog)")
    assert_same(through_lora_option(base, file), differences(networks))
    assert capsys.readouterr().out == f"NOTE: {note}\n"
    assert load_lora(file, adapted(base, *arguments)) == (note,)  # the start of a run says it
    save_file(words, file)
    with pytest.raises(ValueError, match="holds no tensor of a LoRA"):
        read_lora(file)


def test_8_bits_are_read_as_what_they_are(base, written, tmp_path):
    file, _, _ = written("kohya")
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
        tensors = {key: value.to(kind) for key, value in load_file(file).items()}
        save_file(tensors, tmp_path / "eight.safetensors")
        save_file({key: value.float() for key, value in tensors.items()}, tmp_path / "full.safetensors")
        found, wanted = (products(read_lora(tmp_path / f"{name}.safetensors")) for name in ("eight", "full"))
        assert_same(found, wanted, 0)
    assert_same(through_lora_option(base, tmp_path / "eight.safetensors"), wanted)


def test_alphas_of_tensors_come_before_the_headers(written, trained):
    settings = {"unet.r": 4, "unet.lora_alpha": 1, "unet.use_rslora": True}
    file, _, _ = written("alpha beside", lora_adapter_metadata=json.dumps(settings))
    tensors = load_file(file)
    del tensors["unet.conv_in.alpha"]
    save_file(tensors, file, metadata={"lora_adapter_metadata": json.dumps(settings)})
    scalings = read_lora(file).scalings("unet")
    assert scalings.pop("conv_in") == 0.5  # 1 / sqrt(4)
    assert set(scalings.values()) == {1.5}


# what is refused -----------------------------------------------------------------------------------------------------

NAME = "lora_unet_mid_block_attentions_0_proj_in"
REFUSED = {
    "a LoHa": f"{NAME}.hada_w1_a",
    "a LoKr": f"{NAME}.lokr_w1",
    "an OFT or BOFT": f"{NAME}.oft_blocks",
    "a GLoRA": f"{NAME}.a1.weight",
    "an IA3": f"{NAME}.on_input",
    "a VeRA": "base_model.model.conv_in.vera_lambda_b",
    "full differences of weights, which need no low rank": f"{NAME}.diff",
    "changed norms, beside or instead of a LoRA": f"{NAME}.w_norm",
    "Custom Diffusion": "down_blocks.0.attn2.processor.to_k_custom_diffusion.weight",
    "an embedding (textual inversion)": "emb_params",
    "a LoRA of FLUX or a similar transformer": "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
    "a LoRA of Stable Diffusion 3": "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight",
    "a LoRA of Stable Cascade": "lora_prior_unet_down_blocks_0.lora_down.weight",
    "a LoRA of a transformer or of T5": "lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight",
    "a control-LoRA": "lora_controlnet",
    "a whole network": "model.diffusion_model.input_blocks.0.0.weight",
}
MORE = {
    f"{NAME}.lokr_t2": "a LoKr",
    "base_model.model.conv_in.oft_R": "an OFT or BOFT",
    f"{NAME}.oft_diag": "an OFT or BOFT",
    f"{NAME}.diff_b": "full differences",
    "clip_g": "an embedding",
    "diffusion_model.double_blocks.0.img_attn.proj.lora_A.weight": "a LoRA of FLUX",
    "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": "a LoRA of FLUX",
    "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": "a LoRA of a transformer",
    "diffusion_model.blocks.0.self_attn.q.lora_A.weight": "a LoRA of a transformer",
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight": "a LoRA of a transformer or of T5",
    "unet.conv_in.weight": "a whole network",
}


@pytest.mark.parametrize(("key", "kind"), [*((key, kind) for kind, key in REFUSED.items()), *MORE.items()])
def test_kinds_that_are_refused_by_name(tmp_path, key, kind):
    file = tmp_path / "x.safetensors"
    save_file({key: torch.ones(2, 2, dtype=torch.int64)}, file)  # before the numbers are looked at
    wanted = f"{file}: {key} belongs to {kind}"
    with pytest.raises(ValueError, match=re.escape(wanted) + ".*; LoRA, LoCon and DoRA of Stable Diffusion are read; "):
        read_lora(file)


def test_every_kind_is_tried():
    assert list(REFUSED) == [kind.name for kind in KINDS]


PAIR = {"unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3), "unet.conv_in.lora_B.weight": torch.ones(16, 2, 1, 1)}
LINEAR = {"unet.a.lora_A.weight": torch.ones(2, 8), "unet.a.lora_B.weight": torch.ones(8, 2)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (PAIR | {"lora_unet_conv_in.lora_down.weight": torch.ones(2, 4, 3, 3)}, "mean the same tensor; remove one"),
        (PAIR | {"conv_in.lora_A.weight": torch.ones(2, 4, 3, 3)}, "mean the same tensor"),
        (PAIR | {"unet.conv_in.lora_A.second.weight": torch.ones(2, 4, 3, 3)}, "mean the same tensor"),
        (PAIR | {"vae.conv_in.lora_A.weight": torch.ones(1, 1)}, "vae.conv_in.lora_A.weight is no tensor of a LoRA of"),
        (PAIR | {"unet.conv_in.scalar": torch.ones(1)}, "read are files of diffusers, peft, kohya's trainer, LyCORIS"),
        (PAIR | {"lora_te4_x.lora_down.weight": torch.ones(1, 1)}, "lora_te4_x.lora_down.weight is no tensor"),
        (PAIR | {"unet.conv_in.alpha": torch.tensor(True)}, "alpha holds numbers of type bool"),
        (LINEAR | {"unet.a.dora_scale": torch.ones(1, 8)}, r"a: dora_scale has the shape \[1, 8\], and lora_B 8 outp"),
        (LINEAR | {"unet.a.lora_mid.weight": torch.ones(2, 2)}, r"lora_mid \[2, 2\] does not fit lora_down \[2, 8\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_tensors_that_do_not_belong_together(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        read_lora(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("start", "network"),
    [
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "text_encoder"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", "text_encoder_2"),
        ("lora_te2.text_model.encoder.layers.0.mlp.fc1", "text_encoder_2"),
        ("clip_g.text_model.encoder.layers.0.mlp.fc1", "text_encoder_2"),
        ("text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1", "text_encoder_2"),
        ("text_encoders.clip_h.transformer.text_model.encoder.layers.0.mlp.fc1", "text_encoder"),
        ("lycoris_text_model_encoder_layers_0_mlp_fc1", "text_encoder"),
        ("text_encoder_2.base_model.model.text_model.encoder.layers.0.mlp.fc1", "text_encoder_2"),
    ],
)
def test_the_two_text_encoders(start, network):
    assert spelled(f"{start}.lora_up.weight") == (network, "text_model.encoder.layers.0.mlp.fc1", "up")
