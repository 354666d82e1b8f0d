"""Captions of up to three chunks, and clip skip: against transformers' networks, diffusers' pipelines, and in runs."""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys

import numpy as np
import pytest
import tiny_models
import torch
from marks import slow
from PIL import Image
from processes import launch
from resuming import check_resume
from run_folders import losses
from safetensors import safe_open
from torch import nn

from scripts import convert_lora, sample
from train import main
from trainers.base import RunInfo
from trainers.common.lora import kohya_texts
from trainers.common.lora.files import save_lora
from trainers.common.lora.header import text_settings
from trainers.common.lora.tensors import FILE_NAME, read_about
from trainers.common.text_to_image.base_model import BaseModel
from trainers.common.text_to_image.prompts import EMBEDS, POOLED, Prompts, TextSettings, embed_texts, tokenize
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.encoders.cache import folder_of
from trainers.engine.run.randomness import SlotRandom
from trainers.engine.validation.sampling import evaluation_mode
from trainers.inference.lora_pipeline import load_pipeline
from trainers.inference.morphing import Morph
from trainers.inference.saved_run import load_trainer, open_run
from trainers.inference.text_embedding import embed_prompts, prompt_arguments, settings_of_loras
from trainers.sd_lora import LoRAConfig, LoRATrainer
from trainers.text_to_image import TextToImageConfig, TextToImageTrainer

CPU = torch.device("cpu")
CAT, DOG = "a photo of a cat", "a photo of a dog"
LONG = " ".join(["cat"] * 199 + ["dog"])  # 200 tokens
TEXTS = [LONG, CAT, ""]
FAMILIES = ["sd1-long", "sdxl-long"]
TASK = {"lora": (LoRATrainer, LoRAConfig), "text_to_image": (TextToImageTrainer, TextToImageConfig)}


def prompts_of(family, *settings):
    return Prompts(BaseModel("lora.base", str(tiny_models.model(family))), CPU, torch.float32, TextSettings(*settings))


@torch.no_grad()
def embedded(prompts, texts):
    encoder = prompts.encoder(None, (), "")
    return encoder.encode(encoder.build(), texts)


# --- embeddings


@torch.no_grad()
def by_hand(family, texts, tokens, clip_skip):
    """Each chunk alone through text encoders whose last layers are cut off, and joined."""
    pipeline = load_pipeline(tiny_models.model(family))
    rows, pooled = [], []
    for text in texts:
        chunks = [by_hand_chunk(pipeline, text, number, clip_skip) for number in range(tokens // 75)]
        rows.append(torch.cat([chunk for chunk, _ in chunks], dim=1))
        pooled.append(chunks[0][1])
    return torch.cat(rows), torch.cat(pooled)


def by_hand_chunk(pipeline, text, number, clip_skip):
    """The hidden states [1, 77, D] of a chunk, and the last encoder's first output."""
    found = []
    is_xl = hasattr(pipeline, "text_encoder_2")
    for name in ("", "_2") if is_xl else ("",):
        tokenizer, encoder = getattr(pipeline, f"tokenizer{name}"), getattr(pipeline, f"text_encoder{name}")
        whole = tokenizer(text, add_special_tokens=False).input_ids
        ids = [tokenizer.bos_token_id, *whole[75 * number : 75 * number + 75], tokenizer.eos_token_id]
        ids = torch.tensor([ids + [tokenizer.pad_token_id] * (77 - len(ids))])
        pooled, cut = encoder(ids)[0], copy.deepcopy(encoder)
        inner = getattr(cut, "text_model", cut)
        kept = len(inner.encoder.layers) - (clip_skip or 0) - is_xl
        inner.encoder.layers = inner.encoder.layers[:kept]
        if is_xl:
            inner.final_layer_norm = nn.Identity()
        found.append(cut(ids).last_hidden_state)
    return torch.cat(found, dim=-1), pooled


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("tokens", "clip_skip"), [(225, None), (150, 1), (75, 2)])
def test_embeddings_are_the_chunks_joined(family, tokens, clip_skip):
    found = embedded(prompts_of(family, tokens, clip_skip), TEXTS)
    hidden, pooled = by_hand(family, TEXTS, tokens, clip_skip)
    assert found[EMBEDS].shape == (3, tokens // 75 * 77, 64 if "xl" in family else 32)
    torch.testing.assert_close(found[EMBEDS], hidden, rtol=1e-5, atol=1e-5)
    assert (POOLED in found) == ("xl" in family)
    if POOLED in found:
        torch.testing.assert_close(found[POOLED], pooled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("clip_skip", [None, 1, 2])
def test_one_chunk_is_what_the_pipeline_embeds(family, clip_skip):
    """Bit for bit."""
    pipeline = load_pipeline(tiny_models.model(family))
    if "xl" not in family and not hasattr(pipeline.text_encoder, "text_model"):
        vars(pipeline.text_encoder)["text_model"] = pipeline.text_encoder  # diffusers reads it
    options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False, "clip_skip": clip_skip}
    with torch.no_grad():
        expected = pipeline.encode_prompt([CAT, DOG], device=CPU, **options)
    found = embedded(prompts_of(family, 75, clip_skip), [CAT, DOG])
    assert torch.equal(found[EMBEDS], expected[0])
    if POOLED in found:
        assert torch.equal(found[POOLED], expected[2])
    if clip_skip is not None:
        assert not torch.equal(found[EMBEDS], embedded(prompts_of(family), [CAT, DOG])[EMBEDS])


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])  # of Stable Diffusion 1, and of 2 and XL
def test_chunks_are_those_of_the_tokenizer(pad):
    """Which makes them itself, with all that is left over in rows of their own."""
    tokenizer = prompts_of("sd1-long").tokenizers[0]
    tokenizer.pad_token = pad
    options = {"truncation": True, "max_length": 77, "padding": "max_length", "return_overflowing_tokens": True}
    rows = tokenizer(LONG, return_tensors="pt", **options).input_ids
    assert torch.equal(tokenize(tokenizer, [LONG], 3), rows)
    assert torch.equal(tokenize(tokenizer, [LONG], 2), rows[:2])
    assert torch.equal(tokenize(tokenizer, [LONG], 1), rows[:1])
    empty = tokenize(tokenizer, [""], 1)
    assert empty[0, 2:].tolist() == [tokenizer.convert_tokens_to_ids(pad)] * 75
    assert torch.equal(tokenize(tokenizer, [CAT], 3), torch.cat([tokenize(tokenizer, [CAT], 1), empty, empty]))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_word_of_200_counts_if_225_are_read(family):
    other = LONG.removesuffix("dog") + "photo"
    for tokens, expected in ((225, False), (150, True)):
        first, second = embedded(prompts_of(family, tokens), [LONG, other])[EMBEDS]
        assert torch.equal(first, second) == expected
        assert torch.equal(first[:154], second[:154])


def test_captions_beyond_the_limit_are_counted():
    """Chunks of the tiny text encoder have 14 tokens beside their marks."""
    long = " ".join(["cat"] * 29)
    [note, reading] = prompts_of("sd1", 150).notes([long, CAT])
    assert note == "1 captions are longer than lora.max_caption_tokens = 150: the first loses 'cat'; " + (
        "lora.max_caption_tokens: 225 keeps more"
    )
    assert (
        reading
        == "captions are read in 2 chunks of 14 tokens, as ComfyUI, AUTOMATIC1111 and scripts/sample.py do; "
        + ("a call of diffusers' pipeline cuts prompts at 16 tokens")
    )
    [note, _] = prompts_of("sd1", 225).notes([" ".join(["cat"] * 43)])
    assert note == "1 captions are longer than lora.max_caption_tokens = 225: the first loses 'cat'"
    assert list(prompts_of("sd1").notes(["cat " * 14])) == []


# --- training


def trainer_of(task="lora", family="sdxl-long", **options):
    trainer_class, config = TASK[task]
    options = {"pretrained_model_name_or_path": str(tiny_models.model(family))} | options
    trainer = trainer_class(config(**options), BaseConfig(resolution=32, num_epochs=1, dataset="digits"))
    trainer.run = RunInfo(device=CPU, weight_dtype=torch.float32)
    trainer.setup()
    trainer.modules = trainer.unwrapped = trainer.init_modules()
    return trainer


@pytest.mark.parametrize(
    ("family", "clip_skip", "used"),
    [
        ("sd1-long", None, {"text_encoder": {0, 1, 2}}),
        ("sd1-long", 2, {"text_encoder": {0}}),
        ("sdxl-long", None, {"text_encoder": {0, 1}, "text_encoder_2": {0, 1, 2, 3}}),
        ("sdxl-long", 1, {"text_encoder": {0}, "text_encoder_2": {0, 1, 2, 3}}),
    ],
)
def test_adapters_are_where_gradients_are(family, clip_skip, used):
    """DDP would wait for the others."""
    trainer = trainer_of(family=family, clip_skip=clip_skip, max_caption_tokens=150, train_text_encoder=True)
    moments = {name: torch.zeros(2, 4, 8, 8) for name in ("mean", "logvar")}
    rng = SlotRandom(0, torch.arange(2))
    trainer.compute_loss(moments | {"caption": [LONG, CAT], "slot": torch.arange(2)}, rng, 0)[0].backward()
    for name, network in trainer.modules.items():
        trained = {key: p for key, p in network.named_parameters() if p.requires_grad}
        assert all(p.grad is not None for p in trained.values())
        assert all(p.grad.abs().sum() > 0 for key, p in trained.items() if "lora_B" in key)
        layers = {int(key.partition("layers.")[2].partition(".")[0]) for key in trained if "layers." in key}
        assert name == "unet" or layers == used[name]


def test_no_adapter_without_a_layer():
    with pytest.raises(ValueError, match=r"lora\.text_encoder_target_modules = .*: no adapter can be put there"):
        trainer_of(family="sdxl", clip_skip=1, train_text_encoder=True)


RUN = {
    "base.caption": " ".join(["cat"] * 20),
    "base.max_train_samples": 8,
    "lora.max_caption_tokens": 150,
    "lora.clip_skip": 1,
    "lora.train_text_encoder": False,
    "lora.learning_rate": 1e-2,
    "lora.validation_prompts": [RUN_PROMPT := " ".join(["cat"] * 20 + ["dog"])],
    "lora.valid_batch_size": 1,
}


def test_cached_and_uncached_runs_are_the_same_and_keep_apart(run_in_process, tmp_path, capsys):
    options = RUN | {"base.max_train_steps": 2}
    cache = {"base.encoder_cache_dir": str(tmp_path / "cache"), "lora.cache_text": "disk"}
    plain = run_in_process("plain", "lora", **options)
    capsys.readouterr()
    found, said = [], []
    changes = {"first": {}, "again": {}, "skip": {"lora.clip_skip": None}, "short": {"lora.max_caption_tokens": 75}}
    changes["usual"] = changes["skip"] | changes["short"]
    for name, change in changes.items():
        found.append(losses(run_in_process(name, "lora", **options | cache | change)))
        said.append(re.findall(r"cache text: (\d+) of 3 to encode, in /", capsys.readouterr().out))
    assert found[0] == found[1] == losses(plain)
    assert len({json.dumps(each) for each in found}) == 4
    assert said == [["3"], ["0"], ["3"], ["3"], ["3"]]
    assert len(list((tmp_path / "cache").glob("caption-*"))) == 4


def test_the_usual_key_is_that_of_earlier_versions(tmp_path):
    """As it was before there were these settings."""
    prompts = prompts_of("sd1")
    before = {"text encoders": prompts.base_model.digest("text_encoder", "tokenizer"), "variant": None}
    before["dtype"] = "torch.float32"
    now = prompts.encoder("disk", (), "").source()
    assert now == before
    assert folder_of(tmp_path, "caption", now) == folder_of(tmp_path, "caption", before)
    changed = prompts_of("sd1", 150, 1).encoder("disk", (), "").source()
    assert changed == before | {"max_caption_tokens": 150, "clip_skip": 1}


def test_a_run_resumes_exactly(tiny_config):
    """With trained text encoders, whose last layer has no adapter."""
    options = {**RUN, "lora.train_text_encoder": True, "lora.learning_rate": {"unet": 1e-2, "text_encoder": 1e-3}}
    whole, _ = check_resume(tiny_config, options | {"lora.validation_prompts": []}, task="lora")
    with safe_open(whole / FILE_NAME, "pt") as file:
        layers = {key.partition("layers.")[2][:1] for key in file.keys() if key.startswith("text_encoder")}  # noqa: SIM118
    assert layers == {"0"}


@pytest.mark.slow
def test_two_processes_are_two_micro_batches(tiny_config, tmp_path):
    """DDP waits for no adapter without a gradient."""
    rates = dict.fromkeys(("unet", "text_encoder", "text_encoder_2"), 0.001)
    options = {"lora.validation_prompts": [], "lora.train_text_encoder": True, "lora.learning_rate": rates}
    options |= {"lora.pretrained_model_name_or_path": str(tiny_models.model("sdxl-long")), "base.train_batch_size": 2}
    config = tiny_config("lora", **RUN | options | {"base.max_train_steps": 4})
    two = launch(config, f"base.output_dir={tmp_path / 'two'}", processes=2)
    assert two.returncode == 0, two.stderr
    one = launch(config, f"base.output_dir={tmp_path / 'one'}", "base.gradient_accumulation_steps=2")
    assert one.returncode == 0, one.stderr
    assert losses(tmp_path / "one") == losses(tmp_path / "two")


# --- pictures


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with text encoders that are trained, and its validation's picture."""
    tiny_models.model("sd1")
    folder = tmp_path_factory.mktemp("trained") / "run"
    options = RUN | {"lora.train_text_encoder": True, "lora.learning_rate": {"unet": 1e-2, "text_encoder": 1e-2}}
    options |= {"base.output_dir": str(folder), "base.max_train_steps": 2}
    assert main(["configs/tests/lora.json", *(f"{key}={json.dumps(value)}" for key, value in options.items())]) == 0
    return folder


@pytest.fixture
def call(monkeypatch, tmp_path):
    """call(*arguments, to="out") draws, and returns the first picture."""

    def draw(*arguments, to="out"):
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments), "--output-dir", str(tmp_path / to)])
        sample.main()
        path = tmp_path / to / "samples" / "00000.png"
        return np.asarray(Image.open(path)).astype(int), json.loads(Image.open(path).text["diffloop"])

    return draw


def drawn(trainer, prompt=RUN_PROMPT):
    """What a validation draws, [32, 32, 3] of 0 to 255."""
    with evaluation_mode(trainer):
        picture = trainer.sample([{"prompt": prompt}], SlotRandom(0, torch.arange(1), "sample"))["samples"][0]
    return (picture * 255).round().permute(1, 2, 0).int().numpy()


def close(found, expected):
    return np.abs(found - expected).max() <= 1


def test_a_run_is_drawn_as_in_its_validations(trained, call):
    for prompt in ([], ["lora.negative_prompt=a photo of a dog"]):
        expected = drawn(load_trainer(open_run(trained), prompt))
        found, _ = call(trained, *prompt)
        assert close(found, expected)
    assert not close(found, call(trained, *prompt, "lora.max_caption_tokens=75")[0])
    assert not close(found, call(trained, *prompt, "--clip-skip", 0)[0])


def test_a_base_with_the_file_is_drawn_in_the_same_way(trained, call):
    asked = ["--prompt", RUN_PROMPT, "--steps", 2]
    found, settings = call(tiny_models.model("sd1"), *asked, "--lora", trained)
    assert close(found, drawn(load_trainer(open_run(trained))))
    assert settings["options"]["max_caption_tokens"] == 150
    assert settings["options"]["clip_skip"] == 1
    other, settings = call(tiny_models.model("sd1"), *asked, "--lora", trained, "--clip-skip", 0)
    assert settings["options"]["clip_skip"] is None
    assert not close(found, other)
    assert close(call(trained, "--clip-skip", 0)[0], other)


@pytest.mark.parametrize("family", ["sd1-long", "sdxl-long"])
def test_the_pictures_are_those_of_the_pipeline_with_these_embeddings(family, tmp_path):
    """Zeros for the empty text, as Stable Diffusion XL has it."""
    pipeline, settings = load_pipeline(tiny_models.model(family)), TextSettings(150, 1)
    hidden, pooled = by_hand(family, [LONG], 150, 1)
    empty, empty_pooled = by_hand(family, [""], 150, 1)
    if "xl" in family:
        empty, empty_pooled = torch.zeros_like(empty), torch.zeros_like(empty_pooled)
    found = prompt_arguments(pipeline, [LONG], None, True, settings)
    expected = {"prompt_embeds": hidden, "negative_prompt_embeds": empty}
    if "xl" in family:
        expected |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": empty_pooled}
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    dog = prompt_arguments(pipeline, [CAT], DOG, True, settings)["negative_prompt_embeds"]
    torch.testing.assert_close(dog, by_hand(family, [DOG], 150, 1)[0], rtol=1e-5, atol=1e-5)
    assert prompt_arguments(pipeline, [CAT], None, False, settings).keys() <= {EMBEDS, POOLED}
    assert prompt_arguments(pipeline, [CAT], DOG, True, None) == {"prompt": [CAT], "negative_prompt": [DOG]}
    assert pipeline(**found, num_inference_steps=1, output_type="pt").images.isfinite().all()


@pytest.mark.parametrize("task", ["lora", "lcm_lora", slow("text_to_image")])
def test_the_lines_that_a_run_ends_with_draw(task, run_in_process, monkeypatch, tmp_path):
    changed = {"clip_skip": 1, "max_caption_tokens": 150, "validation_prompts": []}
    options = {f"{task}.{name}": value for name, value in changed.items()}
    folder = run_in_process("run", task, **options, **{"base.max_train_steps": 1})
    lines = load_trainer(open_run(folder)).usage_of(folder).replace("outputs/tests", str(tiny_models.FOLDER))
    assert 'pipeline("a prompt", clip_skip=1' in lines
    assert lines.partition("pipeline(")[2] in (folder / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    assert (tmp_path / "sample.png").is_file()


def test_the_usual_lines_are_as_before():
    assert 'pipeline("a prompt").images[0]' in trainer_of(family="sd1").usage_of("x")
    lines = trainer_of("text_to_image", family="sdxl-long", clip_skip=1).usage_of("x")
    assert lines.splitlines()[2] == 'pipeline("a prompt", clip_skip=1).images[0].save("sample.png")'


# --- headers


def lora_with(folder, family="sd1", **about):
    """A LoRA whose header says how texts were embedded."""
    from peft import LoraConfig

    unet = load_pipeline(tiny_models.model(family)).unet
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name="default")
    folder.mkdir(exist_ok=True)
    return save_lora(folder, {"unet": unet}, {name: str(value) for name, value in about.items()})


def test_the_header_says_it_and_in_kohyas_words(trained, tmp_path):
    about = read_about(trained)
    assert about["max_caption_tokens"] == "150"
    assert about["clip_skip"] == "1"
    convert_lora.convert(trained, tmp_path / "kohya.safetensors", "kohya")
    found = read_about(tmp_path / "kohya.safetensors")
    assert found["ss_clip_skip"] == "2"
    assert found["ss_max_token_length"] == "150"
    texts = {"max_caption_tokens": "225", "clip_skip": "1"}
    assert kohya_texts._of_captions(texts, "sd1") == {"ss_clip_skip": "2", "ss_max_token_length": "225"}
    assert kohya_texts._of_captions(texts, "sdxl") == {"ss_max_token_length": "225"}  # kohya's XL knows no clip skip
    plain = tiny_models.lora_file(tmp_path)
    convert_lora.convert(plain, tmp_path / "plain.safetensors", "kohya")
    assert not {"ss_clip_skip", "ss_max_token_length"} & read_about(tmp_path / "plain.safetensors").keys()


def test_several_loras(tmp_path):
    plain = lora_with(tmp_path / "a")
    long, skip = lora_with(tmp_path / "b", max_caption_tokens=225), lora_with(tmp_path / "c", clip_skip=1)
    assert settings_of_loras([plain]) is None
    assert settings_of_loras([plain, long]) == TextSettings(225, None)
    assert settings_of_loras([plain, skip]) == TextSettings(75, 1)
    assert settings_of_loras([plain, skip], 2) == TextSettings(75, 2)
    assert settings_of_loras([long, skip], 0) == TextSettings(225, None)
    with pytest.raises(ValueError, match="the LoRAs were trained with different clip_skip: null .*, 1 .*; give sample"):
        settings_of_loras([long, skip])


def test_headers_that_say_nonsense():
    for name, value in (("clip_skip", "-1"), ("clip_skip", "1e3"), ("max_caption_tokens", "x")):
        with pytest.raises(
            ValueError, match=f"a.safetensors: {name} = {value} in its header must be an integer from 1"
        ):
            text_settings("a.safetensors", {name: value})
    with pytest.raises(ValueError, match="max_caption_tokens = 100 in its header must be one of 75, 150, 225"):
        text_settings("a.safetensors", {"max_caption_tokens": "100"})
    message = "clip_skip = 9, which a LoRA was trained with: the text encoder has 3 layers; give at most 2"
    with pytest.raises(ValueError, match=message):
        embed_prompts(load_pipeline(tiny_models.model("sd1-long")), [CAT], TextSettings(75, 9))


def test_morphing_embeds_as_the_loras_were_trained(tmp_path):
    pipeline = load_pipeline(tiny_models.model("sdxl-long"))
    loras = [lora_with(tmp_path / name, "sdxl-long", clip_skip=1) for name in "ab"]
    morph = Morph(pipeline, loras, [CAT, DOG], 4, 0.0, False)
    hidden, pooled = by_hand("sdxl-long", [CAT, DOG], 75, 1)
    for number, asked in enumerate(morph.asked):
        torch.testing.assert_close(asked[EMBEDS][0], hidden[number], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(asked[POOLED][0], pooled[number], rtol=1e-5, atol=1e-5)


# --- mistakes


def test_mistakes(tiny_config, tmp_path, capsys):
    for option, value, message in (
        ("max_caption_tokens", 100, "lora.max_caption_tokens = 100: must be one of 75, 150, 225"),
        ("clip_skip", 0, "lora.clip_skip = 0: must be an integer of at least 1, or null"),
        ("clip_skip", 2, "lora.clip_skip = 2: the text encoder has 2 layers; give at most 1"),
    ):
        assert main([str(tiny_config("lora", **{f"lora.{option}": value})), "--print-config"]) == 2
        assert message in capsys.readouterr().err
    folder = tmp_path / "silent"  # its config does not say how many: 12 is usual
    shutil.copytree(tiny_models.model("sd1"), folder)
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "num_hidden_layers"}))
    options = {"lora.pretrained_model_name_or_path": str(folder), "lora.clip_skip": 12}
    assert main([str(tiny_config("lora", **options))]) == 1
    assert "lora.clip_skip = 12: the text encoder has 12 layers; give at most 11" in capsys.readouterr().err


def test_a_negative_clip_skip(call, capsys):
    with pytest.raises(SystemExit):
        call("run", "--clip-skip", -1)
    assert "argument --clip-skip: -1: must be at least 0" in capsys.readouterr().err


def test_a_half_precision_text_encoder_behind_accelerate():
    """Whose outputs are float32, and whose weights are not."""
    prompts = prompts_of("sd1-long", 75, 1)
    encoder = prompts.base_model.text_encoder("text_encoder", torch.bfloat16)

    class Converted(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = encoder

        def forward(self, *args, **options):
            found = self.module(*args, **options)
            return type("Output", (), {"hidden_states": [each.float() for each in found.hidden_states]})()

    with torch.no_grad():
        found = embed_texts(prompts.tokenizers, [Converted()], [CAT], prompts.settings, CPU)[EMBEDS]
        expected = embed_texts(prompts.tokenizers, [encoder], [CAT], prompts.settings, CPU)[EMBEDS]
    assert torch.equal(found, expected)
