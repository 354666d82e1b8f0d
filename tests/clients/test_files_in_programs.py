"""A run's two LoRA files at full size: who uses which tensors, and at which strength."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from full_size import CONFIGS, family, networks
from lora_formulas import FORMULAS, scale
from lora_readers import READERS
from marks import slow
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

from trainers.common.lora.files import lora_of, write_lora
from trainers.common.lora.header import SETTINGS_KEY
from trainers.common.lora.kohya import write_kohya
from trainers.common.lora.tensors import FILE_NAME, read_about

SETTINGS = {
    "alpha": {"r": 2, "lora_alpha": 3},
    "rslora": {"r": 2, "lora_alpha": 3, "use_rslora": True},
    "dora": {"r": 2, "lora_alpha": 3, "use_dora": True},
    "patterns": {"r": 2, "lora_alpha": 1, "rank_pattern": {"to_k": 1}, "alpha_pattern": {"to_v": 5}},
}
PATTERNS = ("rank_pattern", "alpha_pattern")
TEXT_PATTERNS = {"rank_pattern": {"k_proj": 3}, "alpha_pattern": {"v_proj": 4}}
CASES = [
    slow(("sd1", "attention", "alpha")),
    ("sd1", "all", "patterns"),
    ("sd2", "attention", "rslora"),
    slow(("sd2", "all", "alpha")),
    slow(("sdxl", "attention", "patterns")),
    ("sdxl", "all", "rslora"),
]


def adapted(name, targets, settings):
    """A family's networks on the meta device, with adapters of random numbers on the CPU."""
    shapes, found = family(name), networks(name)
    torch.manual_seed(0)
    for network, module in found.items():
        layers = {layer.removeprefix("text_model.") for layer in shapes.layers(network, targets)}
        layers = [key for key, _ in module.named_modules() if key.removeprefix("text_model.") in layers]
        own = {key: value for key, value in SETTINGS[settings].items() if network == "unet" or key not in PATTERNS}
        own |= TEXT_PATTERNS if network != "unet" and settings == "patterns" else {}
        module.add_adapter(LoraConfig(**own, target_modules=layers), adapter_name="default")
        for layer in adapters(module).values():
            for factor in (layer.lora_A, layer.lora_B):
                factor["default"].weight = nn.Parameter(torch.randn(factor["default"].weight.shape, device="cpu"))
            for magnitude in layer.lora_magnitude_vector.values():
                magnitude.weight = nn.Parameter(torch.rand(magnitude.weight.shape, device="cpu"))
    return found


def adapters(module):
    return {key: layer for key, layer in module.named_modules() if isinstance(layer, LoraLayer)}


def factors(found):
    """By layer: A, and B times the adapter's scaling, as peft merges them."""
    return {
        (name, key if name == "unet" or key.startswith("text_") else f"text_model.{key}"): (
            layer.lora_A["default"].weight.detach(),
            layer.lora_B["default"].weight.detach() * layer.scaling["default"],
        )
        for name, module in found.items()
        for key, layer in adapters(module).items()
    }


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def files(request, tmp_path_factory):
    """(family, targets, {"diffusers": file, "kohya": file}, factors of its networks)."""
    name, targets, settings = request.param
    found = adapted(name, targets, settings)
    folder = tmp_path_factory.mktemp(name)
    return name, targets, written(folder, found), factors(found)


def written(folder, found):
    """The two files as a run writes them."""
    lora = lora_of(found, {"base_model": "base", "trigger_word": "sks"}).folded()
    paths = {"diffusers": folder / FILE_NAME, "kohya": folder / "full.safetensors"}
    write_lora(paths["diffusers"], lora)
    write_kohya(paths["kohya"], lora, "full")
    return paths


# layers that a program never takes from kohya's format, with all targets; of the UNet's two ends and its embeddings
ENDS = {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}
SIZES = {"add_embedding.linear_1", "add_embedding.linear_2"}
NEVER = {
    "kohya": {"sd1": ENDS, "sd2": ENDS, "sdxl": ENDS | SIZES},  # trains none of them
    "kohya's merge": {"sd1": ENDS, "sd2": ENDS, "sdxl": ENDS | SIZES},
    "stable-diffusion.cpp": {"sd1": ENDS, "sd2": ENDS, "sdxl": ENDS - {"conv_in", "conv_out"} | SIZES},
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_uses_all_of_the_file_in_kohyas_format_at_its_strength(files, reader):
    name, targets, paths, wanted = files
    tensors = load_file(paths["kohya"])
    reading = READERS[reader](list(tensors), family(name))
    never = {("unet", layer) for layer in NEVER.get(reader, {}).get(name, ())} if targets == "all" else set()
    assert not reading.refused
    assert reading.used.keys() == wanted.keys() - never
    assert len(reading.unused) == 3 * len(never)
    check(reading, tensors, wanted)


def check(reading, tensors, wanted):
    for layer, parts in reading.used.items():
        found = {part: tensors[key] for part, key in parts.items()}
        down, up = wanted[layer]
        assert torch.equal(found["down"], down), layer
        torch.testing.assert_close(found["up"] * scale(found), up, rtol=1e-6, atol=1e-6, msg=str(layer))


TAKEN = {  # layers that a program takes from the file in diffusers' format; the others none
    "ComfyUI": lambda network, layer, top: ".to_" not in layer,
    "stable-diffusion.cpp": lambda network, layer, top: network == "unet" and not top,
    "OneTrainer": lambda network, layer, top: network == "unet",
}


@pytest.mark.parametrize("reader", READERS)
def test_what_each_reader_takes_of_the_file_in_diffusers_format_has_its_strength(files, reader):
    name, _, paths, wanted = files
    tensors = load_file(paths["diffusers"])
    reading = READERS[reader](list(tensors), family(name))
    check(reading, tensors, wanted)
    taken = TAKEN.get("ComfyUI" if reader == "Forge" else reader, lambda *layer: False)
    assert reading.used.keys() == {layer for layer in wanted if taken(*layer, layer[1] in ENDS | SIZES)}
    assert bool(reading.refused) == (reader in ("Forge", "OneTrainer"))  # these say so, and take nothing


def test_diffusers_of_before_and_of_now_take_the_file_in_their_format_at_its_strength(files):
    name, _, paths, wanted = files
    tensors, found = load_file(paths["diffusers"]), {}
    for key, value in tensors.items():
        network, _, rest = key.partition(".")
        layer, part = rest.rsplit(".lora_", 1)
        part = {"A.weight": 0, "linear_layer.down.weight": 0, "B.weight": 1, "linear_layer.up.weight": 1}[part]
        found.setdefault((network, layer), {})[part] = value
    assert found.keys() == wanted.keys()
    for layer, (down, up) in wanted.items():  # without alpha, 0.30 to 0.33 multiply by 1
        assert torch.equal(found[layer][0], down)
        torch.testing.assert_close(found[layer][1], up, rtol=1e-6, atol=1e-6, msg=str(layer))
    settings = json.loads(read_about(paths["diffusers"])[SETTINGS_KEY])
    for network in CONFIGS[name]:  # from 0.35 on by what the header says, which must be 1, too
        ranks, alphas = (settings.get(f"{network}.{key}_pattern", {}) for key in ("rank", "alpha"))
        assert alphas == ranks
        assert settings[f"{network}.lora_alpha"] == settings[f"{network}.r"]
        assert not settings[f"{network}.use_rslora"]


def test_diffusers_takes_all_of_the_file_in_kohyas_format(files):
    import diffusers

    name, _, paths, wanted = files
    tensors = load_file(paths["kohya"])
    loader = diffusers.StableDiffusionXLPipeline if name == "sdxl" else diffusers.StableDiffusionPipeline
    state, alphas, *_ = loader.lora_state_dict(dict(tensors), unet_config=SimpleNamespace(layers_per_block=2))
    taken = {value.data_ptr() for value in state.values()}
    left = [key for key, value in tensors.items() if value.data_ptr() not in taken and not key.endswith(".alpha")]
    assert left == []
    assert len(alphas) == len(wanted)


VERSIONS = {"sd1": ("SD1", "SD1"), "sd2": ("SD2", "SD2"), "sdxl": ("SDXL", "SDXL")}


def test_browsers_of_loras_show_the_base_and_the_trigger_word(files):
    name, _, paths, _ = files
    about = read_about(paths["kohya"])
    assert (shown_by_a1111(about), shown_by_forge(about)) == VERSIONS[name]
    # A1111 parses what begins with a brace, and sums the counts of all folders of words to suggest as a prompt
    folders = json.loads(about["ss_tag_frequency"])
    assert {word for words in folders.values() for word in words if isinstance(words[word], int)} == {"sks"}
    assert about["modelspec.trigger_phrase"] == "sks"
    assert about["ss_output_name"] == "full"
    assert float(about.get("ss_training_started_at", 0)) >= 0  # shown as a date
    parsed = {key: json.loads(value) for key, value in about.items() if value.startswith("{")}
    assert all(isinstance(parsed.get(key, {}), dict) for key in ("ss_dataset_dirs", "ss_bucket_info"))


def shown_by_a1111(about):
    if about.get("ss_base_model_version", "").startswith("sdxl_"):
        return "SDXL"
    return "SD2" if about.get("ss_v2") == "True" else "SD1" if about else "unknown"


def shown_by_forge(about):
    architecture = about.get("modelspec.architecture")
    if architecture == "stable-diffusion-xl-v1-base/lora":
        return "SDXL"
    if about.get("ss_base_model_version", "").startswith("sdxl_") or about.get("ss_v2") == "True":
        return shown_by_a1111(about)
    return "SD1" if architecture == "stable-diffusion-v1/lora" else "unknown"


IGNORE_DORA = ("kohya", "kohya's merge", "stable-diffusion.cpp")


@pytest.fixture(scope="module")
def dora(tmp_path_factory):
    """Names in the file in kohya's format of a DoRA of all layers, as `convert_lora.py --dora` writes it."""
    path = tmp_path_factory.mktemp("dora") / "dora.safetensors"
    write_kohya(path, lora_of(adapted("sd1", "attention", "dora"), {}).folded(), "dora")
    return load_file(path)


@pytest.mark.parametrize("reader", READERS)
def test_who_takes_the_scale_of_a_dora(dora, reader):
    reading = READERS[reader](list(dora), family("sd1"))
    assert len(reading.used) == 176
    unused = [name for name in dora if name.endswith(".dora_scale")] if reader in IGNORE_DORA else []
    assert reading.unused == unused
    assert reader in IGNORE_DORA or all("dora" in parts for parts in reading.used.values())
    for layer, parts in reading.used.items():
        rows = family("sd1").shapes[layer][0]
        assert "dora" not in parts or dora[parts["dora"]].shape[0] == dora[parts["dora"]].numel() == rows


# formulas -----------------------------------------------------------------------------------------------------------

LAYERS = {
    "linear": (nn.Linear, 320, 640),
    "convolution": (nn.Conv2d, 64, 96, 3),
    "projection": (nn.Conv2d, 320, 320, 1),
}
DORA = {  # error of the change, relative to it: the smallest and largest of three layers
    "ComfyUI": (0.01, 0.02),
    "Forge": (0.01, 0.02),
    "AUTOMATIC1111": (0.05, 3.0),
    "kohya": (0.5, 1.5),
    "kohya's merge": (0.5, 1.5),
    "LyCORIS": (0, 1e-6),
    "stable-diffusion.cpp": (0.5, 1.5),
    "OneTrainer": (0, 1e-6),
}


@torch.no_grad()
def merged(**options):
    """By layer: the base's weight, the parts in kohya's format, and the change when peft merges them."""
    torch.manual_seed(0)
    found = {}
    layers = nn.ModuleDict({name: kind(*sizes, bias=False) for name, (kind, *sizes) in LAYERS.items()})
    bases = {name: layer.weight.clone() for name, layer in layers.items()}
    inject_adapter_in_model(
        LoraConfig(r=4, lora_alpha=8, target_modules=list(LAYERS), init_lora_weights=False, **options), layers
    )
    for name, layer in layers.items():
        layer.lora_B["default"].weight.normal_(std=0.02)
        parts = {
            "down": layer.lora_A["default"].weight,
            "up": layer.lora_B["default"].weight,
            "alpha": torch.tensor(8.0),
        }
        if options.get("use_dora"):
            magnitude = layer.lora_magnitude_vector["default"].weight
            magnitude *= 1 + 0.02 * torch.rand_like(magnitude)
            parts["dora"] = magnitude.reshape(-1, *[1] * (bases[name].dim() - 1))
        layer.merge()
        found[name] = bases[name], parts, layer.get_base_layer().weight - bases[name]
    return found


@pytest.mark.parametrize("reader", READERS)
def test_every_formula_adds_what_peft_adds(reader):
    for weight, parts, change in merged().values():
        torch.testing.assert_close(FORMULAS[reader](parts, weight), change, rtol=0, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("reader", READERS)
def test_what_readers_make_of_dora(reader):
    low, high = DORA[reader]
    errors = [
        float((FORMULAS[reader](parts, weight) - change).norm() / change.norm())
        for weight, parts, change in merged(use_dora=True).values()
    ]
    assert all(low <= error <= high for error in errors), errors
