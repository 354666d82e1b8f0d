"""Base models, autoencoders and classifiers of others: nothing in them is run, and what is wrong ends in a message."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
from pathlib import Path

import pytest
import tiny_models
import torch
from diffusers import DDPMScheduler, UNet2DModel
from limited import run_limited
from script_calls import run_script

from scripts import inspect_data, make_class_images, merge_lora, sample
from train import main
from trainers.common.autoencoder.options import load_autoencoder
from trainers.common.diffusion.guidance import ClassifierGuidance, classifier_problems
from trainers.common.model_files import Grid
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.config.config import find_trainer
from trainers.engine.dry_run.suggestions import out_of_resources
from trainers.engine.validation.feature_networks import load_classifier
from trainers.model_configs import check_files, read_config
from trainers.pretrained import read_model, reading

WEIGHTS = "diffusion_pytorch_model.safetensors"


class Payload:
    """What leaves a file behind when it is unpickled."""

    def __init__(self, mark):
        self.code = f"open({str(mark)!r}, 'w').close()"

    def __reduce__(self):
        return exec, (self.code,)


@pytest.fixture
def mark(tmp_path):
    """The file that code of others would write; it is looked for at the end of each test."""
    path = tmp_path / "ran"
    yield path
    assert not path.exists(), "code of others ran"


@pytest.fixture
def base(tmp_path):
    return Path(shutil.copytree(tiny_models.model("sd1"), tmp_path / "base"))


def write_code(path, mark, name="Evil"):
    path.write_text(f"open({str(mark)!r}, 'w').close()\nclass {name}: pass\n")


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# attack(base, mark): changes a good pipeline's folder


def code_beside_a_part(base, mark):
    write_code(base / "unet" / "evil.py", mark)
    change(base / "model_index.json", unet=["evil", "Evil"])


def a_module_on_the_path(base, mark):
    write_code(base.parent / "evil_on_path.py", mark)
    change(base / "model_index.json", unet=["evil_on_path", "Evil"])


def a_function_of_a_library(base, mark):
    change(base / "model_index.json", unet=["os", "system"])


def a_module_that_diffusers_imports(base, mark):
    change(base / "model_index.json", unet=["sys", "exit"])


def a_pipeline_of_its_own(base, mark):
    write_code(base / "pipeline.py", mark, "Pipeline")
    change(base / "model_index.json", _class_name=["pipeline", "Pipeline"])


def a_part_elsewhere(base, mark):
    change(base / "model_index.json", **{"../unet": ["diffusers", "UNet2DConditionModel"]})


def a_part_of_three(base, mark):
    change(base / "model_index.json", unet=["diffusers", "UNet2DConditionModel", "x"])


def a_list_for_the_index(base, mark):
    (base / "model_index.json").write_text("[]")


def a_nested_index(base, mark):
    (base / "model_index.json").write_text("[" * 100_000)


def a_text_encoder_with_code(base, mark):
    write_code(base / "text_encoder" / "evil.py", mark, "CLIPTextModel")
    change(base / "text_encoder" / "config.json", auto_map={"AutoModel": "evil.CLIPTextModel"})


def a_tokenizer_with_code(base, mark):
    write_code(base / "tokenizer" / "evil.py", mark)
    change(base / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})


def a_unet_with_code(base, mark):
    write_code(base / "unet" / "evil.py", mark)
    change(base / "unet" / "config.json", auto_map={"AutoModel": "evil.Evil"})


def a_quantized_unet(base, mark):
    change(base / "unet" / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


def a_quantized_text_encoder(base, mark):
    change(base / "text_encoder" / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


def a_pickle_for_the_weights(base, mark):
    (base / "unet" / WEIGHTS).unlink()
    torch.save({"x": Payload(mark)}, base / "unet" / "diffusion_pytorch_model.bin")


def a_pickle_in_the_text_encoder(base, mark):
    (base / "text_encoder" / "model.safetensors").unlink()
    torch.save({"x": Payload(mark)}, base / "text_encoder" / "pytorch_model.bin")


def a_pickle_with_the_name_of_safetensors(base, mark):
    (base / "unet" / WEIGHTS).write_bytes(pickle.dumps(Payload(mark)))


def a_header_of_2_62_bytes(base, mark):
    (base / "unet" / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 62) + b"{}")


def a_tensor_of_2_40_numbers(base, mark):
    text = b'{"conv_in.weight":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
    (base / "unet" / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))


def shards_outside(base, mark):
    (base / "unet" / WEIGHTS).rename(base.parent / "outside.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": {"conv_in.weight": "../../outside.safetensors"}}
    (base / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def shards_of_a_list(base, mark):
    (base / "unet" / f"{WEIGHTS}.index.json").write_text('{"weight_map": [1]}')


def a_scheduler_that_is_none(base, mark):
    change(base / "scheduler" / "scheduler_config.json", _class_name="UNet2DConditionModel")
    change(base / "model_index.json", scheduler=["diffusers", "UNet2DConditionModel"])


def a_scheduler_of_a_list(base, mark):
    change(base / "scheduler" / "scheduler_config.json", _class_name=["os", "system"])
    change(base / "model_index.json", scheduler=["os", "system"])


def a_scheduler_of_10_9_steps(base, mark):
    change(base / "scheduler" / "scheduler_config.json", num_train_timesteps=10**9)


def a_network_of_10_6_layers(base, mark):
    change(base / "unet" / "config.json", layers_per_block=10**6)


def an_encoder_of_10_6_layers(base, mark):
    change(base / "text_encoder" / "config.json", num_hidden_layers=10**6)


def blocks_that_do_not_exist(base, mark):
    change(base / "unet" / "config.json", down_block_types=["os.system", "__import__"])


def a_config_of_a_list(base, mark):
    (base / "unet" / "config.json").write_text("[1]")


def a_config_of_wrong_types(base, mark):
    change(base / "unet" / "config.json", block_out_channels={"a": 1}, in_channels="4")


def merges_without_an_end(base, mark):
    with (base / "tokenizer" / "merges.txt").open("w") as file:
        file.truncate(1 << 40)  # sparse


def a_pipe_for_a_vocabulary(base, mark):
    (base / "tokenizer" / "vocab.json").unlink()
    os.mkfifo(base / "tokenizer" / "vocab.json")


def a_pipe_for_weights(base, mark):
    (base / "unet" / WEIGHTS).unlink()
    os.mkfifo(base / "unet" / WEIGHTS)


def a_device_for_a_config(base, mark):
    (base / "unet" / "config.json").unlink()
    (base / "unet" / "config.json").symlink_to("/dev/zero")


def a_vocabulary_of_a_list(base, mark):
    (base / "tokenizer" / "vocab.json").write_text('["a"]')


def a_pipeline_inside(base, mark):
    write_code(base / "unet" / "pipeline.py", mark)
    change(base / "model_index.json", unet=["diffusers", "DiffusionPipeline"])
    (base / "unet" / "model_index.json").write_text(json.dumps({"_class_name": ["pipeline", "Evil"]}))


def a_link_to_a_secret(base, mark):
    """What was not trained is copied, and perhaps published."""
    secret = base.parent / "secret.json"
    secret.write_text('{"password": "x"}')
    (base / "tokenizer" / "special_tokens_map.json").unlink(missing_ok=True)
    (base / "tokenizer" / "special_tokens_map.json").symlink_to(secret)


def an_adapter_beside_the_weights(base, mark):
    write_code(base / "unet" / "evil_adapter.py", mark)
    auto = {"base_model_class": "Evil", "parent_library": "evil_adapter"}
    for part in ("unet", "text_encoder"):
        (base / part / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "auto_mapping": auto}))


def change_by(name, file, **values):
    """An attack that changes a config's values."""

    def attack(base, mark):
        change(base / file, **values)

    attack.__name__ = name
    return attack


NO_CODE = "code that a pipeline brings along is not run"
REFUSED = {
    code_beside_a_part: f"unet = ['evil', 'Evil'] must be [library, class] of diffusers or transformers; {NO_CODE}",
    a_module_on_the_path: "unet = ['evil_on_path', 'Evil'] must be [library, class] of diffusers or tr",
    a_function_of_a_library: "unet = ['os', 'system'] must be [library, class] of diffusers or transformers",
    a_module_that_diffusers_imports: "unet = ['sys', 'exit'] must be [library, class] of diffusers or transformers",
    a_pipeline_of_its_own: "_class_name = ['pipeline', 'Pipeline'] names code, which is not run",
    a_part_elsewhere: "../unet is no name of a part of a pipeline",
    a_part_of_three: "unet = ['diffusers', 'UNet2DConditionModel', 'x'] must be [library, class]",
    a_list_for_the_index: "model_index.json: must hold a JSON object, found list",
    a_nested_index: "model_index.json: cannot be read as JSON",
    a_text_encoder_with_code: "config.json: its auto_map names code, which is not run; take a model that needs none",
    a_tokenizer_with_code: "tokenizer_config.json: its auto_map names code, which is not run",
    a_unet_with_code: "config.json: its auto_map names code, which is not run",
    a_quantized_unet: "its quantization_config says that its weights are quantized; take those in full or half precision",
    a_quantized_text_encoder: "its quantization_config says that its weights are quantized",
    a_pickle_for_the_weights: "",
    a_pickle_in_the_text_encoder: "",
    a_pickle_with_the_name_of_safetensors: "in safetensors format could be read",
    a_header_of_2_62_bytes: "in safetensors format could be read",
    a_tensor_of_2_40_numbers: "in safetensors format could be read",
    shards_outside: "weight_map must name files beside it, found ../../outside.safetensors",
    shards_of_a_list: "weight_map must name files beside it, found none",
    a_scheduler_that_is_none: "",
    a_scheduler_of_a_list: "",
    a_scheduler_of_10_9_steps: "num_train_timesteps = 1000000000 must be from 1 to 100000",
    a_network_of_10_6_layers: "layers_per_block = 1000000 must be from 0 to 1000",
    an_encoder_of_10_6_layers: "num_hidden_layers = 1000000 must be from 0 to 1000",
    blocks_that_do_not_exist: "in safetensors format could be read",
    a_config_of_a_list: "config.json: must hold a JSON object, found list",
    a_config_of_wrong_types: "in safetensors format could be read",
    merges_without_an_end: "merges.txt: has 1,099,511,627,776 bytes, and at most 67,108,864 are read",
    a_pipe_for_a_vocabulary: "vocab.json: is a named pipe, not a regular file; remove it",
    a_pipe_for_weights: f"{WEIGHTS}: is a named pipe, not a regular file; remove it",
    a_device_for_a_config: "config.json: is a device, not a regular file; remove it",
    change_by("kernels_of_the_hub", "text_encoder/config.json", _attn_implementation="evil/kernel"): (
        "_attn_implementation = evil/kernel must be one of eager, sdpa"
    ),
    change_by("kernels_in_a_part", "text_encoder/config.json", text_config={"attn_implementation": "evil/kernel"}): (
        "attn_implementation = evil/kernel must be one of eager, sdpa"
    ),
    change_by("an_offset", "scheduler/scheduler_config.json", steps_offset=10**9): "must be from 0 to 1000",
    change_by("no_steps", "scheduler/scheduler_config.json", num_train_timesteps=0): "must be from 1 to 100000",
    change_by("a_spacing", "scheduler/scheduler_config.json", timestep_spacing="evil"): (
        "timestep_spacing = evil must be one of linspace, leading, trailing"
    ),
    change_by("a_text_to_divide_by", "vae/config.json", scaling_factor="x"): "scaling_factor = x must be from 1e-06 to",
    change_by("a_zero_to_divide_by", "vae/config.json", scaling_factor=0): "scaling_factor = 0 must be from 1e-06 to",
    change_by("no_number_to_divide_by", "vae/config.json", scaling_factor=float("nan")): "scaling_factor = nan must be",
    change_by("a_text_to_add", "vae/config.json", shift_factor="x"): "shift_factor = x must be from -1e+06 to 1e+06",
    change_by("a_number_for_a_list", "vae/config.json", block_out_channels="x"): "block_out_channels = x must be",
    change_by(
        "a_picture_of_10_6_pixels", "unet/config.json", sample_size=10**6
    ): "sample_size = 1000000 must be from 1",
    change_by("a_picture_of_a_text", "unet/config.json", sample_size="8"): "sample_size = 8 must be from 1 to 4096",
    change_by("captions_of_10_9_tokens", "tokenizer/tokenizer_config.json", model_max_length=10**9): (
        "text_encoder: reads 16 tokens, and its tokenizer has model_max_length = 1000000000"
    ),
    change_by("captions_of_a_text", "tokenizer/tokenizer_config.json", model_max_length="x"): "model_max_length = x",
    change_by(
        "a_token_beyond",
        "tokenizer/tokenizer_config.json",
        added_tokens_decoder={
            "999999": {
                "content": "cat",
                "special": False,
                "normalized": False,
                "lstrip": False,
                "rstrip": False,
                "single_word": False,
            }
        },
    ): "and its tokenizer has one of the number",
    change_by("a_dtype", "text_encoder/config.json", dtype="os.system"): "could be read",
    change_by("an_activation", "text_encoder/config.json", hidden_act="os.system"): "could be read",
    change_by("weights_that_are_missing", "unet/config.json", time_cond_proj_dim=5): (
        "the weights of UNet2DConditionModel lack time_embedding.cond_proj.weight"
    ),
    change_by("more_weights_than_bytes", "unet/config.json", cross_attention_dim=10**7): (
        "its config makes a network of 2,5"
    ),
    change_by("a_text_for_a_number", "unet/config.json", freq_shift="y"): (
        "freq_shift = y in the config of UNet2DConditionModel must be a number, or a list of numbers"
    ),
    change_by(
        "an_integer_for_a_list", "vae/config.json", block_out_channels=5
    ): "block_out_channels = 5 must be a list",
    change_by(
        "a_dropout_of_5", "text_encoder/config.json", attention_dropout=5
    ): "attention_dropout = 5 must be from 0",
    change_by("no_heads", "unet/config.json", attention_head_dim=0): "could be read",
    a_vocabulary_of_a_list: "could be read",
    a_pipeline_inside: "model_index.json: a pipeline inside of a pipeline is not read; remove the file",
    a_link_to_a_secret: "special_tokens_map.json: is a link that leads out of the model's folder; put the file there",
    an_adapter_beside_the_weights: "adapter_config.json: an adapter beside a model's weights is not read; remove the file",
}


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return tiny_models.lora_file(tmp_path_factory.mktemp("lora"))


COSTLY = {  # without the checks these would wait for ever, or fill the memory
    a_nested_index, a_tensor_of_2_40_numbers, a_scheduler_of_10_9_steps, a_network_of_10_6_layers,
    an_encoder_of_10_6_layers, merges_without_an_end, a_pipe_for_a_vocabulary, a_pipe_for_weights,
    a_device_for_a_config,
}  # fmt: skip


@pytest.fixture
def outcomes(base, lora, tiny_config, tmp_path, capsys):
    """outcomes(attack) -> (exit code, output) of training, sampling and merging with the base."""
    config = tiny_config("lora", **{"lora.pretrained_model_name_or_path": str(base), "base.max_train_steps": 1})
    calls = (
        lambda: main([str(config), "lora.valid_batch_size=1"]),
        lambda: run_script(sample, base, "--prompt", "a cat", "--steps", 1, "--output", tmp_path / "out"),
        lambda: run_script(merge_lora, base, tmp_path / "merged", "--lora", lora),
    )

    def call(function):
        try:
            code = function() or 0
        except SystemExit as end:
            print(end.code)
            code = 1
        said = capsys.readouterr()
        return code, said.out + said.err

    return lambda attack: [run_limited(each, seconds=30) if attack in COSTLY else call(each) for each in calls]


@pytest.mark.parametrize("attack", REFUSED, ids=lambda attack: attack.__name__)
def test_a_base_that_is_refused(base, mark, attack, outcomes, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    attack(base, mark)
    for code, said in outcomes(attack):
        assert code in (1, 2), said
        assert "error: " in said
        assert "Traceback" not in said
        assert REFUSED[attack] in said
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "merged").exists()


def test_how_to_convert_a_pickle(base, mark, tmp_path):
    a_pickle_for_the_weights(base, mark)
    with pytest.raises(SystemExit) as raised:
        run_script(make_class_images, base, "a cat", tmp_path / "pictures")
    found = (
        "unet/diffusion_pytorch_model.bin is not read, because such a file can run code; if you trust it, convert it:"
    )
    assert found in str(raised.value.code)
    assert "DiffusionPipeline.from_pretrained(FOLDER, use_safetensors=False).save_pretrained(NEW_FOLDER)" in str(
        raised.value
    )


# harmless ------------------------------------------------------------------------------------------------------------


def a_malicious_chat_template(base, mark):
    template = "{{ cycler.__init__.__globals__.os.system('touch " + str(mark) + "') }}"
    change(base / "tokenizer" / "tokenizer_config.json", chat_template=template)
    (base / "tokenizer" / "chat_template.jinja").write_text(template)


def pickles_beside_the_weights(base, mark):
    for part, name in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "pytorch_model"),
    ):
        for ending in (".bin", ".pt", ".ckpt"):
            torch.save({"x": Payload(mark)}, base / part / (name + ending))


def test_links_inside_of_a_folder_and_into_the_hubs_cache(base):
    file, blobs = base / "tokenizer" / "tokenizer_config.json", base.parent / "blobs"
    (base / "shared.json").write_bytes(file.read_bytes())
    blobs.mkdir()
    (blobs / "0a1b").write_bytes(file.read_bytes())
    for leads_to in (base / "shared.json", blobs / "0a1b"):
        file.unlink()
        file.symlink_to(leads_to)
        check_files(base)
        check_files(base / "tokenizer")  # alone


def test_what_nobody_looks_at(base, mark, outcomes):
    a_malicious_chat_template(base, mark)
    pickles_beside_the_weights(base, mark)
    for code, said in outcomes(pickles_beside_the_weights):
        assert code == 0, said


# autoencoders, classifiers, tokenizers ---------------------------------------------------------------------------------


def test_an_autoencoder_of_others(base, mark, tmp_path):
    vae, grid = base / "vae", Grid(3, 32)
    wide = {"block_out_channels": [8, 16, 16384], "norm_num_groups": 4}
    cases = (
        ({"block_out_channels": [10**9] * 3}, "must be from 1 to 100000"),
        ({"latent_channels": 10**9}, "could be read|weights, and its files have"),
        (wide, r"its config makes a network of [\d,]+ weights, and its files have [\d,]+ bytes; take a folder whose"),
        ({"layers_per_block": 10**9}, "layers_per_block = 1000000000 must be from 0 to 1000"),
        ({"quantization_config": {"quant_method": "x"}}, "its quantization_config says"),
        ({"down_block_types": ["a", "b", "c"]}, "could be read"),
        ({"_class_name": "Evil"}, "must be of class AutoencoderKL, found Evil"),
    )
    kept = (vae / "config.json").read_text()
    for values, message in cases:
        (vae / "config.json").write_text(json.dumps(json.loads(kept) | values))
        code, said = run_limited(_load_autoencoder, vae, grid, seconds=30, gigabytes=2)
        assert code == 1, (values, said)
        assert "Traceback" not in said
        assert re.search(message, said), said
    (vae / "config.json").write_text(kept)
    (vae / WEIGHTS).unlink()
    torch.save({"x": Payload(mark)}, vae / "diffusion_pytorch_model.bin")
    with pytest.raises(
        FileNotFoundError, match=r"diffusion_pytorch_model.bin is not read, because such a file can run"
    ):
        load_autoencoder("vae.x", str(vae), grid)


def _load_autoencoder(vae, grid):
    try:
        load_autoencoder("vae.x", str(vae), grid)
    except (ValueError, OSError) as error:
        print(error)
        return 1
    return 0


def test_configs_that_are_checked_before_anything_is_loaded(base, tiny_config, capsys):
    for text, message in (
        ("[]", "vae/config.json: must hold a JSON object, found list"),
        ("{", "vae/config.json: cannot be read as JSON"),
    ):
        (base / "vae" / "config.json").write_text(text)
        assert main([str(tiny_config("text_to_image", **{"text_to_image.vae": str(base)}))]) == 2
        assert message in capsys.readouterr().err
        assert main([str(tiny_config("ddpm", **{"ddpm.model_config": str(base / "vae")}))]) == 2
        assert message in capsys.readouterr().err


@pytest.fixture
def classifier(tmp_path):
    network = UNet2DModel(sample_size=8, in_channels=1, out_channels=10, block_out_channels=(32, 32),
                          down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    network.save_pretrained(tmp_path / "classifier-run" / "classifier")
    DDPMScheduler().save_pretrained(tmp_path / "classifier-run" / "scheduler")
    return tmp_path / "classifier-run"


def test_a_classifier_of_others(classifier, mark, tmp_path):
    weights, cpu = classifier / "classifier" / WEIGHTS, torch.device("cpu")
    assert load_classifier(str(classifier), cpu)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    change(classifier / "classifier" / "config.json", down_block_types=["os.system", "x"])
    with pytest.raises(FileNotFoundError, match="no UNet2DModel in safetensors format could be read"):
        load_classifier(str(classifier), cpu)
    weights.unlink()
    torch.save({"x": torch.ones(1)}, weights.with_suffix(".bin"))  # harmless, but a pickle
    for load in (
        lambda: load_classifier(str(classifier), cpu),
        lambda: ClassifierGuidance.load(str(classifier), 1.0, DDPMScheduler(), 10, cpu),
        lambda: read_model(UNet2DModel, classifier, subfolder="classifier"),
    ):
        with pytest.raises(
            FileNotFoundError, match=r"\.bin is not read, because such a file can run code; if you trust "
        ):
            load()
    (classifier / "classifier" / "config.json").write_text("[]")
    found = list(classifier_problems(str(classifier), BaseConfig(output_dir="x")))
    assert len(found) == 1
    assert "must hold a JSON object, found list" in found[0]


def test_a_tokenizer_of_others_in_inspect_data(base, mark, tiny_config):
    a_tokenizer_with_code(base, mark)
    with pytest.raises(SystemExit, match=r"holds no tokenizer \(.*its auto_map names code, which is not run"):
        run_script(inspect_data, tiny_config("text_to_image"), "--tokenizer", base / "tokenizer")


@pytest.mark.parametrize("task", ["vae", "noisy_classifier", "ddpm", "conditional_ddpm", "text_to_image"])
def test_a_finished_run_with_a_pickle(task, tmp_path, mark, base, classifier):
    """scripts/sample.py of a run whose pipeline somebody else has made."""
    kind = find_trainer(task, None)
    folder = {"vae": base / "vae", "noisy_classifier": classifier, "text_to_image": base}.get(task)
    if folder is None:
        folder = tmp_path / "pipeline"
        (folder / "unet").mkdir(parents=True)
        name = "DDPMPipeline" if task == "ddpm" else "ClassConditionalPipeline"
        index = {"_class_name": name, "unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
        (folder / "model_index.json").write_text(json.dumps(index))
        shutil.copytree(classifier / "scheduler", folder / "scheduler")
        shutil.copy(classifier / "classifier" / "config.json", folder / "unet")
    for path in folder.rglob("*.safetensors"):
        path.unlink()
        torch.save({"x": Payload(mark)}, path.with_suffix(".bin"))
    with pytest.raises(FileNotFoundError, match="in safetensors format could be read"):
        kind.load_pipeline(folder)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_a_machine_that_is_too_small(error):
    """The dry run tells it from a file that is broken."""
    message = r"x: no UNet2DModel in safetensors format could be read"
    with pytest.raises(FileNotFoundError, match=message) as raised, reading(UNet2DModel, "nowhere", "x"):
        raise error
    assert out_of_resources(raised.value).of == "host"
    with pytest.raises(FileNotFoundError, match=message) as raised, reading(UNet2DModel, "nowhere", "x"):
        raise KeyError("a\x1b[2J\nerror: fake")
    assert out_of_resources(raised.value) is None
    assert str(raised.value).isprintable()


def test_classes_may_have_any_names(tmp_path):
    config = {"label2id": {"layers of a cake": 21_000, "auto_map": 1}, "id2label": {"21000": "layers of a cake"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path / "config.json") == config
    (tmp_path / "config.json").write_text('{"a":' * 900 + "{}" + "}" * 900)
    assert read_config(tmp_path / "config.json").keys() == {"a"}


def test_parts_that_lead_back_to_the_whole_are_not_read(tmp_path):
    parts = {f"part_{number}": ["diffusers", "UNet2DModel"] for number in range(4)}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline", **parts}))
    for name in parts:
        (tmp_path / name).symlink_to(".")
    with pytest.raises(ValueError, match="a pipeline inside of a pipeline is not read"):
        check_files(tmp_path)  # it returned after 4 ** 40 calls


def test_an_index_may_hold_options_that_are_lists(tmp_path):
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "X", "safety_checker": [None, None], "a": [None, True]})
    )
    check_files(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"auto_map": {"AutoModel": "evil.Evil"}}, "auto_map names code"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantized"),
    ],
)
def test_a_single_network_of_the_hub_is_checked_before_it_is_read(tmp_path, monkeypatch, config, message):
    """Its configs are downloaded first; the network itself is not asked for."""
    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, allow_patterns))
        (tmp_path / "vae").mkdir()
        (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(UNet2DModel, "from_pretrained", lambda *arguments, **options: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=message):
        read_model(UNet2DModel, "somebody/network", subfolder="vae")
    assert asked == [("somebody/network", ["vae/*.json", "vae/*.txt"])]
