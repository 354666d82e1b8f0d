"""LoRA files: written and read, in two formats, and merged into a pipeline."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from lora_changes import differences
from marks import slow
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tiny_models import model

from datasets_lib.errors import InputError, UserError
from scripts import convert_lora, merge_lora
from trainers.common.lora import files as lora_files
from trainers.common.lora import lora_file, original_names
from trainers.common.lora.files import save_lora
from trainers.common.lora.header import SETTINGS_KEY
from trainers.common.lora.loading import load_lora
from trainers.common.lora.lora_file import NETWORKS
from trainers.common.lora.spellings import spelled
from trainers.common.lora.tensors import FILE_NAME, read_about
from trainers.inference.lora_pipeline import add_loras, parse_lora

# linear and convolution, inside blocks and at the top, and one that occurs in both kinds of networks' names
UNET = ["to_q", "to_k", "to_out.0", "conv1", "proj_in", "ff.net.0.proj", "conv_in", "time_emb_proj", "linear_1"]
TEXT = ["q_proj", "out_proj", "fc1"]
ABOUT = {"base_model": "tiny", "trigger_word": "sks"}
PATTERNS = {
    "unet": {"rank_pattern": {"to_k": 2}, "alpha_pattern": {"conv1": 2}},
    "text_encoder": {"alpha_pattern": {"layers.1.mlp.fc1": 1}},
    "text_encoder_2": {"rank_pattern": {"q_proj": 2}},
}
KINDS = {"patterns": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
CASES = [slow(kind) if kind == "rslora" else kind for kind in KINDS]


def networks_of(family, pipeline=None):
    pipeline = pipeline or diffusers.DiffusionPipeline.from_pretrained(model(family))
    found = {name: getattr(pipeline, name, None) for name in NETWORKS}
    return {name: network for name, network in found.items() if network is not None}


def adapted(family, kind="patterns", seed=0, only=NETWORKS, rank=4, alpha=8, unet=UNET, layers=1):
    """Networks with random adapters, as if they had been trained."""
    torch.manual_seed(seed)
    networks = {
        name: network for name, network in networks_of(family, pipeline_of(family, layers)).items() if name in only
    }
    for name, network in networks.items():
        options = {"r": rank, "lora_alpha": alpha, "lora_dropout": 0.5, "init_lora_weights": "gaussian"}
        options |= KINDS[kind] | (PATTERNS[name] if kind == "patterns" else {})
        network.requires_grad_(False)
        network.add_adapter(LoraConfig(**options, target_modules=unet if name == "unet" else TEXT))
        for key, parameter in network.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.1)
            elif "magnitude" in key:
                parameter.data *= 1 + 0.2 * torch.rand_like(parameter)
        network.eval()
    return networks


def pipeline_of(family, layers=1):
    """A tiny pipeline, whose UNet can get as many layers in a block as the real ones have."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(model(family))
    if layers > 1:
        torch.manual_seed(0)
        pipeline.unet = type(pipeline.unet).from_config({**pipeline.unet.config, "layers_per_block": layers})
    return pipeline


def loaded(family, file, layers=1):
    pipeline = pipeline_of(family, layers)
    pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name="read")
    return networks_of(family, pipeline)


@torch.no_grad()
def outputs(networks):
    torch.manual_seed(0)
    tokens = torch.randint(0, 300, (1, 16))
    found = [network(tokens).last_hidden_state for name, network in networks.items() if name != "unet"]
    config = networks["unet"].config
    caption = torch.randn(1, 16, config.cross_attention_dim)
    added = {"text_embeds": torch.randn(1, 32), "time_ids": torch.ones(1, 6)} if "text_encoder_2" in networks else None
    added = {"added_cond_kwargs": added} if added else {}
    return [*found, networks["unet"](torch.randn(1, 4, 8, 8), 500, caption, **added).sample]


def assert_equal(first, second, tolerance=0.0):
    assert first.keys() == second.keys()
    assert len(first) > 10
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=tolerance, msg=str(key))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """files(family, ...) -> (file, its networks) for arguments of `adapted`."""
    made = {}

    def make(*arguments, **options):
        key = repr((arguments, options))
        if key not in made:
            networks = adapted(*arguments, **options)
            made[key] = save_lora(tmp_path_factory.mktemp("lora"), networks, ABOUT), networks
        return made[key]

    return make


def run_script(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    script.main()


# files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("family", [slow("sd1"), "sdxl"])
def test_diffusers_reads_what_was_saved(files, family, kind):
    file, networks = files(family, kind)
    read = loaded(family, file)
    assert_equal(differences(read, "read"), differences(networks))
    for mine, theirs in zip(outputs(networks), outputs(read), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    base = outputs(networks_of(family))
    assert all((mine - other).abs().max() > 1e-3 for mine, other in zip(outputs(networks), base, strict=True))


@pytest.mark.parametrize("kind", [*CASES, "no header"])
def test_scripts_load_what_diffusers_does(files, tmp_path, kind):
    file, _ = files("sdxl", kind if kind in KINDS else "patterns")
    if kind not in KINDS:
        tensors = {key: value for key, value in load_file(file).items() if key.startswith("unet.")}
        file = tmp_path / FILE_NAME
        save_file(tensors, file)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(model("sdxl"))
    add_loras(pipeline, [(file, 1.0)])
    theirs = loaded("sdxl", file)
    assert_equal(differences(networks_of(None, pipeline), "lora_0"), differences(theirs, "read"))
    for mine, other in zip(outputs(networks_of(None, pipeline)), outputs(theirs), strict=True):
        assert torch.equal(mine, other)


def test_a_text_encoder_without_attention_in_its_targets_is_read(tmp_path):
    networks = {"text_encoder": networks_of("sd1")["text_encoder"]}
    networks["text_encoder"].add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["fc2"], init_lora_weights=False))
    file = save_lora(tmp_path, networks, {})
    read = {"text_encoder": loaded("sd1", file)["text_encoder"]}
    wanted, found = differences(networks), differences(read, "read")
    assert len(wanted) == 2
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)


def test_the_header_holds_texts_and_settings(files):
    file, _ = files("sd1")
    about = read_about(file.parent)
    settings = json.loads(about.pop(SETTINGS_KEY))
    assert about == ABOUT | {"format": "pt"}
    assert settings["unet.target_modules"] == sorted(UNET)
    assert settings["text_encoder.lora_alpha"] == settings["text_encoder.r"] == 4  # the scale is in the B matrices
    assert settings["unet.alpha_pattern"] == settings["unet.rank_pattern"]
    assert set(settings["unet.rank_pattern"].values()) == {2}
    assert not any("dropout" in key or "path" in key for key in settings)
    assert file.name == FILE_NAME
    (file.parent / "other").write_text("")
    assert file.stat().st_mode == (file.parent / "other").stat().st_mode


def test_a_file_says_whether_it_is_a_dora(files):
    assert lora_files.read_lora(files("sd1", "dora")[0]).is_dora
    assert not lora_files.read_lora(files("sd1", "patterns")[0]).is_dora


@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_is_in_the_file_once_and_alpha_is_the_rank(files, kind):
    file, networks = files("sd1", kind, rank=4, alpha=2)
    tensors, about = load_file(file), read_about(file)
    settings = json.loads(about[SETTINGS_KEY])
    for name, network in networks.items():
        assert settings[f"{name}.lora_alpha"] == settings[f"{name}.r"]
        assert settings[f"{name}.alpha_pattern"] == settings[f"{name}.rank_pattern"]
        assert settings[f"{name}.use_rslora"] is False
        for key, module in network.named_modules():
            if isinstance(module, LoraLayer):
                spelling = ("lora_B", "lora_linear_layer.up")[name != "unet"]
                held = tensors[f"{name}.{lora_file.file_name(name, key)}.{spelling}.weight"]
                assert torch.equal(held, module.lora_B["default"].weight * module.scaling["default"])  # powers of two
    scalings = {module.scaling["default"] for module in networks["unet"].modules() if isinstance(module, LoraLayer)}
    assert scalings == {"patterns": {0.5, 1.0}, "rslora": {1.0}, "dora": {0.5}}[kind]


def test_a_scale_that_is_no_power_of_two(files):
    file, networks = files("sd1", "rslora", rank=9, alpha=5)
    assert_equal(differences(loaded("sd1", file), "read"), differences(networks), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_kept_where_the_product_is_exact(dtype):
    up = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    for scaling in (0.5, 1 / 3):
        product = lora_file.scaled(up, scaling)
        assert product.dtype == (dtype if scaling == 0.5 else torch.float32)
        torch.testing.assert_close(product.double(), up.double() * scaling, rtol=1e-7, atol=0)


@pytest.mark.parametrize("options", [{"alpha": 2}, {"kind": "rslora", "alpha": 4}, {"alpha": 3}])
def test_another_scale_is_multiplied_into_what_is_loaded(files, monkeypatch, options):
    file, networks = files("sd1", "rslora", alpha=8)
    monkeypatch.setattr(sys.modules[__name__], "PATTERNS", {name: {} for name in PATTERNS})
    others = adapted("sd1", seed=1, **{"kind": "patterns"} | options)
    load_lora(file, others)
    assert_equal(differences(others), differences(networks), 0.0 if options["alpha"] != 3 else 1e-6)


@pytest.mark.parametrize("kind", CASES)
def test_load_lora_restores_every_weight(files, kind):
    file, networks = files("sdxl", kind)
    others = adapted("sdxl", kind, seed=1)
    load_lora(file.parent, others)
    for name in networks:
        wanted = get_peft_model_state_dict(networks[name], save_embedding_layers=False)
        found = get_peft_model_state_dict(others[name], save_embedding_layers=False)
        assert_equal(wanted, found)


def test_weights_stay_float32_whatever_the_file_has(files, tmp_path):
    file, networks = files("sd1")
    half = {key: value.bfloat16() for key, value in load_file(file).items()}
    save_file(half, tmp_path / FILE_NAME, metadata=read_about(file))
    others = adapted("sd1", seed=1)
    load_lora(tmp_path, others)
    assert {p.dtype for network in others.values() for p in network.parameters()} == {torch.float32}
    assert torch.equal(others["unet"].conv_in.lora_A["default"].weight, half["unet.conv_in.lora_A.weight"].float())
    assert networks.keys() == others.keys()


def test_older_spellings_and_no_header(tmp_path):
    networks = adapted("sd1", "dora", rank=3, alpha=3, unet=["to_q", "to_out.0"])
    states = {name: get_peft_model_state_dict(network) for name, network in networks.items()}
    old = {"q.lora_A": "q_lora.down", "q.lora_B": "q_lora.up", "out.0.lora_A": "out_lora.down"}
    old |= {"out.0.lora_B": "out_lora.up", "out.0.lora_mag": "out.lora_mag"}
    unet = {}
    for key, value in states["unet"].items():
        key = key.replace("attn1.", "attn1.processor.")
        for new, spelling in old.items():
            key = key.replace(new, spelling)
        unet[f"unet.{key}"] = value
    text = {f"text_encoder.{key}": v for key, v in convert_state_dict_to_diffusers(states["text_encoder"]).items()}
    save_file(unet | text, tmp_path / "old.safetensors")
    read = lora_files.read_lora(tmp_path / "old.safetensors")
    assert_equal(read.tensors["unet"], states["unet"])
    assert_equal(read.tensors["text_encoder"], {f"text_model.{k}": v for k, v in states["text_encoder"].items()})
    assert read.is_dora
    assert set(read.scalings("unet").values()) == {1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": ("unet",)}, "holds a LoRA of .*text_encoder.*, and unet has one here; the networks must be the same"),
        ({"unet": ["to_q"]}, r"has besides \d+ tensors of unet, such as conv_in.lora_A.weight; the LoRA's targets"),
        ({"unet": [*UNET, "to_v"]}, r"lacks \d+ tensors of unet, such as .*attn1.to_v.lora_A.weight"),
        ({"rank": 8}, r"unet\..* is \[4, .*\], and \[8, .*\] is wanted; rank and base model must be the same"),
        ({"kind": "dora"}, "lacks .* tensors of unet, such as conv_in.lora_magnitude_vector"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_lora_of_another_shape_is_refused(files, tmp_path, options, message):
    file = save_lora(tmp_path, adapted("sd1", "rslora", alpha=4), {})  # one rank and alpha, so that one thing differs
    if "kind" not in options:
        options = options | {"kind": "patterns"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "PATTERNS", {name: {} for name in PATTERNS})
        networks = adapted("sd1", seed=1, **options)
    before = {key: value.clone() for key, value in networks["unet"].state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_lora(file, networks)
    assert all(torch.equal(value, before[key]) for key, value in networks["unet"].state_dict().items())


PAIR = {"unet.conv_in.lora_A.weight": torch.zeros(2, 4, 3, 3), "unet.conv_in.lora_B.weight": torch.zeros(16, 2, 1, 1)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (PAIR | {"unet.conv_in.lora_B.bias": torch.zeros(16)}, "unet.conv_in.lora_B.bias is no tensor of a LoRA of"),
        ({"vae.conv_in.weight": torch.zeros(1)}, "vae.conv_in.weight belongs to a whole network"),
        (dict([*PAIR.items()][:1]), "unet.conv_in needs lora_A and lora_B .* of one rank"),
        ({}, "holds no tensor"),
        ({"lora_unet_conv_in.alpha": torch.ones(())}, "unet.conv_in needs lora_A and lora_B .lora_down and lora_up"),
    ],
)
def test_a_file_that_is_no_lora(tmp_path, tensors, message):
    save_file(tensors, tmp_path / FILE_NAME)
    with pytest.raises(ValueError, match=message):
        lora_files.read_lora(tmp_path)


def test_no_file_and_a_pickle(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no file .*{FILE_NAME}; give a LoRA as .safetensors, or a folder"):
        lora_files.read_lora(tmp_path)
    texts = {
        "lora.bin": "the name of a LoRA must end in .safetensors; this one is a pickle, which can run code",
        "lora.gguf": "the name of a LoRA must end in .safetensors; other formats are not read",
        "lora.safetensors": "cannot be read as safetensors .*; other formats are not read",
    }
    for name, text in texts.items():
        torch.save(PAIR, tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}: {text}"):
            lora_files.read_lora(tmp_path / name)


# two formats ---------------------------------------------------------------------------------------------------------

TAGS = {"sd1": {"unet": "unet", "text_encoder": "te"}}
TAGS["sdxl"] = {"unet": "unet", "text_encoder": "te1", "text_encoder_2": "te2"}


def kohya_differences(file, family, keys):
    """up @ down * alpha / rank of the modules `keys`, by the format's own rule."""
    tensors, found = load_file(file), {}
    for network, key in keys:
        module = key if network == "unet" or key.startswith("text_model.") else f"text_model.{key}"
        if network == "unet" and family == "sdxl":
            module = original_names.original_sdxl_name(module)
        name = f"lora_{TAGS[family][network]}_{module.replace('.', '_')}"
        up, down, alpha = (tensors.pop(f"{name}.{part}") for part in ("lora_up.weight", "lora_down.weight", "alpha"))
        product = (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])
        found[network, key] = product * alpha / len(down)
    assert not tensors
    return found


@pytest.mark.parametrize(
    ("family", "kind"), [("sd1", "patterns"), ("sdxl", "rslora"), slow("sd1", "rslora"), slow("sdxl", "patterns")]
)
def test_both_formats_mean_the_same(files, tmp_path, monkeypatch, family, kind):
    file, networks = files(family, kind)
    kohya, back = tmp_path / "kohya.safetensors", tmp_path / "back.safetensors"
    wanted = differences(networks)
    run_script(monkeypatch, convert_lora, file.parent, kohya, "--to", "kohya")
    assert_equal(kohya_differences(kohya, family, wanted), wanted, 1e-6)
    run_script(monkeypatch, convert_lora, kohya, back, "--to", "diffusers")
    assert_equal(differences(loaded(family, back), "read"), wanted, 1e-6)
    assert {path.name for path in tmp_path.iterdir()} == {"kohya.safetensors", "back.safetensors"}


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_diffusers_reads_the_kohya_format(files, tmp_path, family):
    targets = [name for name in UNET if name != "linear_1"]  # its reader loses SDXL's add_embedding.linear_1
    networks = adapted(family, "rslora", unet=targets, layers=2)  # one alpha for all; layers as in the real ones
    file = save_lora(tmp_path, networks, {})
    convert_lora.convert(file, tmp_path / "kohya.safetensors", "kohya")
    read = loaded(family, tmp_path / "kohya.safetensors", layers=2)
    assert_equal(differences(read, "read"), differences(networks), 1e-6)


def test_dora_in_both_formats(files, tmp_path):
    file, networks = files("sd1", "dora")
    kohya, back = tmp_path / "kohya.safetensors", tmp_path / "back.safetensors"
    with pytest.raises(InputError, match="is a DoRA; .* AUTOMATIC1111 makes another change, .*: --dora writes it"):
        convert_lora.convert(file, kohya)
    convert_lora.convert(file, kohya, dora=True)
    scales = {key: value for key, value in load_file(kohya).items() if key.endswith("dora_scale")}
    assert scales["lora_unet_conv_in.dora_scale"].shape == (16, 1, 1, 1)
    assert scales["lora_te_text_model_encoder_layers_0_mlp_fc1.dora_scale"].shape == (64, 1)
    convert_lora.convert(kohya, back, "diffusers")
    for mine, theirs in zip(outputs(networks), outputs(loaded("sd1", back)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_the_header_of_the_kohya_format(tmp_path):
    module = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    for width, base in ((768, "sd_v1"), (1024, "sd_v2"), (2048, "sdxl_base_v1-0"), (64, None)):
        tensors = {f"{module}.lora_A.weight": torch.ones(8, width), f"{module}.lora_B.weight": torch.ones(16, 8)}
        tensors |= {f"text_encoder.text_model.encoder.layers.0.mlp.fc1.{part}": torch.ones(8, 8) for part in (
            "lora_linear_layer.down.weight", "lora_linear_layer.up.weight")}  # fmt: skip
        settings = {"unet.r": 8, "unet.lora_alpha": 4, "text_encoder.lora_alpha": 4}
        header = {"trigger_word": "sks", SETTINGS_KEY: json.dumps(settings)}
        save_file(tensors, tmp_path / FILE_NAME, metadata=header)
        convert_lora.convert(tmp_path, tmp_path / f"{width}.safetensors", "kohya")
        about = read_about(tmp_path / f"{width}.safetensors")
        wanted = {"trigger_word": "sks", "ss_network_module": "networks.lora", "ss_network_dim": "8"}
        wanted |= {"ss_network_alpha": "4", "format": "pt", "ss_output_name": str(width)}
        wanted |= {
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.title": str(width),
            "modelspec.trigger_phrase": "sks",
        }
        wanted |= {
            "modelspec.usage_hint": "Write sks in the prompt",
            "ss_tag_frequency": f'{{"{width}": {{"sks": 1}}}}',
        }
        assert {key: value for key, value in about.items() if key in wanted} == wanted
        architecture = {"sd_v1": "stable-diffusion-v1/lora", "sd_v2": "stable-diffusion-v2-512/lora", None: None,
                        "sdxl_base_v1-0": "stable-diffusion-xl-v1-base/lora"}[base]  # fmt: skip
        assert about.get("ss_base_model_version") == base
        assert about.get("modelspec.architecture") == architecture
        assert about.get("ss_v2") == (None if base is None else str(width == 1024))
        tag = "te1" if width == 2048 else "te"
        assert f"lora_{tag}_text_model_encoder_layers_0_mlp_fc1.alpha" in load_file(tmp_path / f"{width}.safetensors")


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_the_names_of_all_layers_are_known(family):
    names = [
        (network, key)
        for network, owner in networks_of(family).items()
        for key, module in owner.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    ]
    tags = TAGS["sdxl"]
    kohya = {f"lora_{tags[network]}_{key.replace('.', '_')}": (network, key) for network, key in names}
    assert {name: spelled(f"{name}.alpha")[:2] for name in kohya} == kohya
    assert len(kohya) > 80


ORIGINAL = {
    "input_blocks_0_0": "conv_in",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_0_in_layers_2": "down_blocks.1.resnets.0.conv1",
    "input_blocks_4_0_emb_layers_1": "down_blocks.1.resnets.0.time_emb_proj",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_8_1_transformer_blocks_9_attn1_to_q": "down_blocks.2.attentions.1.transformer_blocks.9.attn1.to_q",
    "middle_block_1_proj_in": "mid_block.attentions.0.proj_in",
    "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
    "output_blocks_0_1_transformer_blocks_1_attn2_to_out_0": (
        "up_blocks.0.attentions.0.transformer_blocks.1.attn2.to_out.0"
    ),
    "output_blocks_5_1_transformer_blocks_0_ff_net_0_proj": (
        "up_blocks.1.attentions.2.transformer_blocks.0.ff.net.0.proj"
    ),
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "label_emb_0_2": "add_embedding.linear_2",
    "time_embed_0": "time_embedding.linear_1",
    "out_2": "conv_out",
}


def test_the_names_of_the_original_sdxl_network():
    text = "lora_te2_text_model_encoder_layers_31_self_attn_q_proj"
    assert spelled(f"{text}.alpha")[:2] == ("text_encoder_2", "text_model.encoder.layers.31.self_attn.q_proj")
    names = {name: spelled(f"lora_unet_{name}.alpha")[:2] for name in ORIGINAL}
    assert names == {name: ("unet", module) for name, module in ORIGINAL.items()}

    for name, module in ORIGINAL.items():
        assert original_names.original_sdxl_name(module).replace(".", "_") == name


def kohya_tensors(name="lora_unet_conv_in", **others):
    tensors = {"lora_down.weight": torch.ones(2, 4, 3, 3), "lora_up.weight": torch.ones(16, 2, 1, 1)}
    return {f"{name}.{part}": value for part, value in (tensors | others).items()}


@pytest.mark.parametrize(
    ("tensors", "to", "message"),
    [
        ({"conv_in.weight": torch.ones(1)}, "kohya", "conv_in.weight belongs to a whole network"),
        ({"conv_in.weight": torch.ones(1)}, "diffusers", "conv_in.weight belongs to a whole network"),
        ({}, "diffusers", "holds no tensor"),
        ({"lora_unet_conv_in.hada_w1_a": torch.ones(1)}, "diffusers", "hada_w1_a belongs to a LoHa"),
        ({"lora_unet_conv_in.lora_up.weight": torch.ones(1)}, "diffusers", "needs lora_A and lora_B .lora_down and lora_up"),
        (kohya_tensors("lora_unet_gate_0_img"), "diffusers", "gate_0_img.* is no tensor of a LoRA of .* known here"),
        (
            {key.replace("conv_in", "gate"): value for key, value in PAIR.items()},
            "kohya",
            "gate is no module of Stable Diffusion's networks that is known here",
        ),
        (
            kohya_tensors("lora_unet_mid_block_attentions_0_proj_in") | kohya_tensors("lora_unet_middle_block_1_proj_in"),
            "diffusers",
            "lora_unet_mid.*proj_in.lora_.* and lora_unet_mid.*proj_in.lora_.* mean the same tensor; remove one of them",
        ),
        (
            kohya_tensors("lora_te_text_model_encoder_layers_0_mlp_fc1")
            | kohya_tensors("lora_te1_text_model_encoder_layers_0_mlp_fc1"),
            "diffusers",
            "mean the same tensor",
        ),
        (kohya_tensors(dora_scale=torch.ones(1, 4, 1, 1)), "diffusers", r"dora_scale has the shape \[1, 4, 1, 1\], and"),
        (
            kohya_tensors(dora_scale=torch.ones(16, 1, 1, 1)) | kohya_tensors("lora_unet_conv_out"),
            "diffusers",
            "unet: 1 of 2 modules are DoRAs",
        ),
    ],
)  # fmt: skip
def test_what_is_not_converted(tmp_path, monkeypatch, tensors, to, message):
    save_file(tensors, tmp_path / "in.safetensors")
    with pytest.raises(ValueError, match=message):
        convert_lora.convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", to)
    with pytest.raises(SystemExit, match="error: "):
        run_script(monkeypatch, convert_lora, tmp_path / "in.safetensors", tmp_path / "out.safetensors", "--to", to)
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_where_a_conversion_goes(tmp_path):
    save_file(PAIR, tmp_path / "in.safetensors")
    (tmp_path / "link.safetensors").symlink_to("nowhere")
    messages = {
        "in.safetensors": "is there already; choose another place, or remove it",
        "link.safetensors": "is there already",
        "out.bin": "the name must end in .safetensors",
        f"{'n' * 244}.safetensors": "cannot be written .*File name too long",
    }
    for output, message in messages.items():
        with pytest.raises(UserError, match=f"{output}: {message}"):
            convert_lora.convert(tmp_path / "in.safetensors", tmp_path / output, "kohya")
    with pytest.raises(InputError, match="--weights raw: .* is no checkpoint and holds none; leave the option out"):
        convert_lora.convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", weights="raw")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.safetensors", "link.safetensors"]
    with pytest.raises(FileNotFoundError, match="no file .*none.safetensors"):
        convert_lora.convert(tmp_path / "none.safetensors", tmp_path / "out.safetensors", "kohya")


# merging -------------------------------------------------------------------------------------------------------------


def weights(folder):
    networks = networks_of(None, diffusers.DiffusionPipeline.from_pretrained(folder))
    return {f"{name}.{key}": value for name, network in networks.items() for key, value in network.state_dict().items()}


def merged_by_hand(family, loras):
    """base + sum weight * B @ A, from the files' tensors: alpha / rank is in B."""
    total = weights(model(family))
    for file, weight in loras:
        tensors = load_file(file)
        for key, value in tensors.items():
            if "lora_A" not in key and "layer.down" not in key:
                continue
            up = tensors[key.replace("lora_A", "lora_B").replace("layer.down", "layer.up")]
            product = (up.flatten(1) @ value.flatten(1)).reshape(len(up), *value.shape[1:])
            key = key.replace(".lora_A", "").replace(".lora_linear_layer.down", "")
            key = key if key in total else key.replace("text_model.", "")
            total[key] = total[key] + weight * product
    return total


@pytest.mark.parametrize("family", ["sd1", slow("sdxl")])
def test_merged_weights_and_pictures(files, tmp_path, monkeypatch, family):
    both, _ = files(family, "rslora", rank=4, alpha=6)  # 6 / sqrt(4) = 3
    unet, _ = files(family, "rslora", seed=1, only=("unet",), rank=9, alpha=3, unet=["to_q", "to_v"])  # 1
    output = tmp_path / "merged"
    loras = ["--lora", f"{both.parent}:0.5", "--lora", f"{unet}:-0.25"]
    run_script(monkeypatch, merge_lora, model(family), output, *loras)
    found, wanted = weights(output), merged_by_hand(family, [(both, 0.5), (unet, -0.25)])
    assert_equal(found, wanted, 1e-6)
    base = weights(model(family))
    changed = {key.partition(".")[0] for key in base if not torch.equal(base[key], found[key])}
    assert changed == set(TAGS[family])
    mode = (tmp_path / "other").touch() or (tmp_path / "other").stat().st_mode
    assert {path.stat().st_mode for path in output.rglob("*.safetensors")} == {mode}

    pipeline = diffusers.DiffusionPipeline.from_pretrained(model(family))
    pipeline.load_lora_weights(both.parent, adapter_name="a")
    pipeline.load_lora_weights(unet.parent, adapter_name="b")
    pipeline.set_adapters(["a", "b"], [0.5, -0.25])
    merged = diffusers.DiffusionPipeline.from_pretrained(output)
    pairs = outputs(networks_of(family, pipeline)), outputs(networks_of(family, merged))
    if family == "sd1":
        pairs = tuple([*found, draw(drawn)] for found, drawn in zip(pairs, (pipeline, merged), strict=True))
    for adapters, baked in zip(*pairs, strict=True):
        torch.testing.assert_close(adapters, baked, rtol=0, atol=1e-5)


def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    return pipeline("a photo of a cat", **options).images


def test_a_weight_of_zero_leaves_the_base(files, tmp_path, monkeypatch):
    file, _ = files("sd1")
    run_script(monkeypatch, merge_lora, model("sd1"), tmp_path / "merged", "--lora", f"{file}:0")
    assert_equal(weights(tmp_path / "merged"), weights(model("sd1")))


def test_merging_dora_and_the_dtype_of_the_files(files, tmp_path, monkeypatch):
    file, networks = files("sd1", "dora")
    run_script(monkeypatch, merge_lora, model("sd1"), tmp_path / "full", "--lora", file)
    full = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "full")
    for adapters, baked in zip(outputs(networks), outputs(networks_of("sd1", full)), strict=True):
        torch.testing.assert_close(adapters, baked, rtol=0, atol=1e-5)
    run_script(monkeypatch, merge_lora, model("sd1"), tmp_path / "half", "--lora", file, "--dtype", "float16")
    half = load_file(next((tmp_path / "half" / "unet").glob("*.safetensors")))
    assert_equal(half, {key: value.half() for key, value in full.unet.state_dict().items()})


def test_file_and_weight(tmp_path, monkeypatch):
    assert parse_lora("a.safetensors") == (Path("a.safetensors"), 1.0)
    assert parse_lora("a:b.safetensors:-0.5") == (Path("a:b.safetensors"), -0.5)
    assert parse_lora("C:\\loras\\a.safetensors") == (Path("C:\\loras\\a.safetensors"), 1.0)
    assert parse_lora("C:\\loras\\a.safetensors:1e-1") == (Path("C:\\loras\\a.safetensors"), 0.1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").touch()
    with pytest.raises(ValueError, match="--lora a:half: half is no weight; give a number, such as a:0.8"):
        parse_lora("a:half")
    with pytest.raises(ValueError, match="--lora a:nan: the weight must be finite"):
        parse_lora("a:nan")


def test_what_is_not_merged(files, tmp_path, monkeypatch):
    sd1, _ = files("sd1")
    (tmp_path / "there").mkdir()
    for base, output, lora, message in (
        (model("sd1"), "there", sd1, "there: exists; choose a new folder"),
        (model("sd1"), "new", tmp_path / "none", "no file .*none"),
        (model("sd1"), "new", f"{sd1}:inf", "the weight must be finite"),
        (model("sdxl"), "new", sd1, r"changes unet.* which in the base is .*; take the base that it was trained on"),
        (tmp_path / "no_base", "new", sd1, "no_base"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            run_script(monkeypatch, merge_lora, base, tmp_path / output, "--lora", lora)
    assert {path.name for path in tmp_path.iterdir()} == {"there"}


def test_a_network_that_the_base_lacks_and_another_pipeline(files, tmp_path, monkeypatch):
    encoder, _ = files("sdxl", only=("text_encoder_2",))
    with pytest.raises(SystemExit, match="changes text_encoder_2, and the base has none; take the base"):
        run_script(monkeypatch, merge_lora, model("sd1"), tmp_path / "new", "--lora", encoder)
    unet = diffusers.UNet2DModel(sample_size=8, block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2,
                                 up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    with pytest.raises(SystemExit, match="is a DDPMPipeline; give Stable Diffusion or SDXL"):
        run_script(monkeypatch, merge_lora, tmp_path / "ddpm", tmp_path / "new", "--lora", encoder)
