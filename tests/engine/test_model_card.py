"""The model card: its header as the hub reads it, its pictures, and what a base model's own card may put into it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from features import Features
from huggingface_hub import ModelCard
from PIL import Image
from repository import tiny
from tiny_models import model

from trainers import TRAINERS
from trainers.common.lora.training import AdapterTrainer
from trainers.engine.config.config import find_trainer, load_config
from trainers.engine.export.base_card import BaseCard, read_base_card
from trainers.engine.export.card_header import METRICS, card_header
from trainers.engine.tracking.gallery import MOST, Shown, read_gallery, write_gallery
from trainers.pretrained import hub_name

CLASSES = {"pipeline_tag": "unconditional-image-generation", "tags": ["class-conditional-image-generation"]}
PROMPTED = ["stable-diffusion", "stable-diffusion-diffusers", "text-to-image", "diffusers-training"]
LORA = {"pipeline_tag": "text-to-image", "tags": [*PROMPTED, "lora", "template:sd-lora"]}
EXPECTED = {
    "ddpm": {"pipeline_tag": "unconditional-image-generation", "tags": []},
    "conditional_ddpm": CLASSES,
    "dit": CLASSES,
    "vae": {"pipeline_tag": "image-to-image", "tags": ["autoencoder"]},
    "noisy_classifier": {"pipeline_tag": "image-classification", "tags": []},
    "text_to_image": {"pipeline_tag": "text-to-image", "tags": PROMPTED},
    "lora": LORA,
    "lcm_lora": LORA,
}
# of huggingface.js, in which the hub looks them up
HUB_TASKS = {"text-to-image", "unconditional-image-generation", "image-to-image", "image-classification"}
PROMPTED_TASKS = [task for task, words in EXPECTED.items() if words["pipeline_tag"] == "text-to-image"]


def card_of(folder):
    card = ModelCard.load(folder / "README.md")
    return card, card.data.to_dict()


def results_of(card):
    return {(result.dataset_split, result.metric_name): result for result in card.data.eval_results or []}


@pytest.mark.parametrize("task", TRAINERS)
def test_the_header_of_every_task(run_in_process, tmp_path, task):
    options = {"base.validation_split": 0.004, "base.max_train_steps": 2}
    options |= {"vae.adversarial_start_step": 1} if task == "vae" else {}
    folder = run_in_process(f"my-{task}", task, **options)
    card, header = card_of(folder)
    expected = EXPECTED[task]
    assert header["pipeline_tag"] == expected["pipeline_tag"]
    assert header["pipeline_tag"] in HUB_TASKS
    assert header["tags"] == list(dict.fromkeys([*expected["tags"], "diffusers", "diffloop", task]))
    assert header["library_name"] == "diffusers"
    for absent in ("license", "base_model", "base_model_relation", "datasets"):  # nothing of it is known
        assert absent not in header
    [index] = header["model-index"]
    assert index["name"] == f"my-{task}"
    results = results_of(card)
    last = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        last |= json.loads(line)
    part = "valid_ema" if "valid_ema/loss" in last else "valid"
    names = {METRICS[name][1]: f"{part}/{name}" for name in METRICS if f"{part}/{name}" in last}
    assert {name for _, name in results} == set(names)
    for (split, name), result in results.items():
        assert (split, result.task_type, result.dataset_type) == ("validation", header["pipeline_tag"], "digits")
        assert result.metric_value == pytest.approx(last[names[name]], rel=1e-5)
    assert str(tmp_path) not in card.content
    assert "outputs/tests" not in card.data.to_yaml() + card.text.partition("## Configuration")[0]
    text = card.text
    if task in ("vae", "noisy_classifier"):  # their lines need no picture of the user's
        names: dict = {}
        code = text.partition("```python\n")[2].partition("```")[0]
        exec(code.replace(f'"my-{task}"', f'"{folder}"'), names)
        assert names["latents" if task == "vae" else "logits"].isfinite().all()
    if task not in PROMPTED_TASKS:
        assert "widget" not in header
        return
    assert header["instance_prompt"] == "a handwritten three"
    assert "<Gallery />" in text
    assert "Left: the weights of the last step. Right: their moving average, which this pipeline holds." in text
    assert "Trained on `sd1-2`: its licence applies." in text
    assert [example["text"] for example in header["widget"]] == ["a handwritten three"] * 2
    for example in header["widget"]:
        with Image.open(folder / example["output"]["url"]) as image:
            assert image.size == (32, 32)
            assert image.text == {"Description": "a handwritten three"}


def test_the_tasks_are_all_here():
    assert set(EXPECTED) == set(TRAINERS)
    assert all(find_trainer(task).pipeline_tag == EXPECTED[task]["pipeline_tag"] for task in TRAINERS)


def facts_of(task, family="sd1", **options):
    """What a trainer says that has not been set up, but for its base model."""
    words = [f"{name}={json.dumps(value)}" for name, value in options.items()]
    run = load_config(tiny(task), [*words, f"{task}.pretrained_model_name_or_path={model(family)}"])
    trainer = find_trainer(task)(run.config, run.base)
    trainer.base_model = SimpleNamespace(is_xl=family == "sdxl")
    return trainer.card_facts()


@pytest.mark.parametrize(
    ("family", "name"), [("sd1", "stable-diffusion"), ("sd2", "stable-diffusion"), ("sdxl", "stable-diffusion-xl")]
)
def test_tags_of_families(family, name):
    for task in ("lora", "lcm_lora", "text_to_image"):
        assert facts_of(task, family).tags[:2] == (name, f"{name}-diffusers")


def test_relations_to_the_base():
    for task, relation in (("lora", "adapter"), ("lcm_lora", "adapter"), ("text_to_image", "finetune")):
        assert facts_of(task).base_model_relation == relation
        assert facts_of(task).base_model == str(model("sd1"))
    new_unet = {"text_to_image.model_config": str(model("sd1") / "unet")}
    assert facts_of("text_to_image", **new_unet).base_model_relation is None
    dora = facts_of("lora", **{"lora.use_dora": True}).tags
    assert ("dora" in dora, "lora" in dora, "template:sd-lora" in dora) == (True, False, True)


@pytest.mark.parametrize(
    ("word", "caption", "prompt"),
    [
        ("sks", "a dog", "sks, a dog"),
        ("sks", "", "sks"),
        (None, "a photo of a fox", "a photo of a fox"),
        (None, "", None),
    ],
)
def test_words_that_ask_for_what_was_learned(word, caption, prompt):
    assert facts_of("lora", **{"base.trigger_word": word, "base.caption": caption}).instance_prompt == prompt


def test_metrics_of_drawn_pictures(run_in_process, tmp_path):
    torch.jit.script(Features()).save(tmp_path / "features.pt")
    options = {"base.eval_steps": 6, "base.eval_num_samples": 8, "base.eval_features": str(tmp_path / "features.pt")}
    folder = run_in_process("run", "conditional_ddpm", **options)
    results = results_of(card_of(folder)[0])
    assert {name for split, name in results if split == "train"} >= {"FID", "KID", "Improved precision"}
    fid = results["train", "FID"]
    assert fid.metric_args == {"features": "features.pt", "pictures": 8}
    assert fid.metric_type == "fid"


def header_of(metrics, base=None, facts=None, gallery=(), **options):
    from trainers.base import CardFacts

    base_options = {
        "dataset_name": None,
        "data_name": "my/data",
        "dataset_config_name": None,
        "eval_features": "/a/f.pt",
    }
    run = SimpleNamespace(base=SimpleNamespace(**base_options | {"eval_num_samples": 9} | options), task="ddpm")
    return card_header(run, "m", facts or CardFacts(), base or BaseCard(), metrics, list(gallery))


def test_only_finite_metrics_of_evaluation():
    metrics = {
        "loss": 1.0,
        "grad_norm/unet": 1.0,
        "valid/loss": 0.123456789,
        "valid/seconds": 1.0,
        "eval/fid": float("nan"),
    }
    found = header_of(metrics).eval_results
    assert [(result.metric_type, result.metric_value) for result in found] == [("loss", 0.123457)]
    assert (found[0].task_type, found[0].dataset_name) == ("other", "data")
    both = header_of({"valid/loss": 1.0, "valid_ema/loss": 2.0, "valid/psnr": 3.0}).eval_results
    assert [result.metric_value for result in both] == [2.0]  # of the weights that the pipeline holds
    assert header_of({}).eval_results is None
    assert not {"model-index", "model_name"} & header_of({}).to_dict().keys()


def test_data_of_the_hub():
    header = header_of({"valid/loss": 1.0}, dataset_name="me/digits", dataset_config_name="small")
    assert header.datasets == ["me/digits"]
    assert (header.eval_results[0].dataset_type, header.eval_results[0].dataset_config) == ("me/digits", "small")


def test_reconstructions_are_held_out():
    header = header_of({"eval/rfid": 3.0})
    assert (header.eval_results[0].dataset_split, header.eval_results[0].metric_type) == ("validation", "fid")


# --- prompts and words of users

TEXTS = [
    "a: b",
    "- x",
    "# no comment",
    '"',
    "'",
    "a\nb\n---\n# c",
    "<b>`x`</b>",
    "猫 für 🐈",
    "null",
    "{a}",
    "*",
    "&x",
    "\u2028",
    "x" * 500,
]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_come_back(text):
    """By YAML as the hub parses it."""
    from trainers.base import CardFacts

    gallery = [Shown("samples/prompt-00.png", text)]
    facts = CardFacts(instance_prompt=text, tags=("x",), pipeline_tag="text-to-image")
    header = header_of({"valid/loss": 1.0}, facts=facts, gallery=gallery)
    read = ModelCard(f"---\n{header.to_yaml()}\n---\n\n# Text\n").data
    assert (read.instance_prompt, read.widget) == (text, [{"text": text, "output": {"url": "samples/prompt-00.png"}}])
    assert read.to_dict() == header.to_dict()


# --- the gallery


def test_a_gallery_holds_the_pictures_of_the_last_validation(tmp_path):
    requests = [{"prompt": f"{number}: für 猫 \udcff"} for number in range(MOST + 2)]
    images = torch.linspace(0, 1, MOST + 2)[:, None, None, None].expand(-1, 3, 4, 5)
    write_gallery(tmp_path, requests, images)
    found = read_gallery(tmp_path)
    assert found == [Shown(f"samples/prompt-{n:02d}.png", f"{n}: für 猫 ?") for n in range(MOST)]
    with Image.open(tmp_path / found[7].place) as image:
        assert (image.size, image.getpixel((0, 0))) == ((5, 4), (round(7 / 9 * 255),) * 3)
    (tmp_path / "samples" / "prompt-mine.png").touch()
    write_gallery(tmp_path, requests[:2], images[:2])
    assert len(read_gallery(tmp_path)) == 2
    assert len(list((tmp_path / "samples").iterdir())) == 3


def test_pictures_of_others_in_a_gallery(tmp_path):
    write_gallery(tmp_path, [{"prompt": "a"}] * 5, torch.zeros(5, 1, 4, 4))
    samples = tmp_path / "samples"
    (samples / "prompt-00.png").write_bytes(b"")
    Image.new("RGB", (4, 4)).save(samples / "prompt-01.png")  # without a prompt
    (samples / "prompt-02.png").unlink()
    (samples / "prompt-02.png").symlink_to(samples / "prompt-03.png")
    (samples / "prompt-04.png").write_bytes((samples / "prompt-04.png").read_bytes()[:40])
    assert read_gallery(tmp_path) == [Shown("samples/prompt-03.png", "a")]


# --- the base model's card


def folder_with(tmp_path, card=None, index=None):
    folder = tmp_path / "base"
    folder.mkdir()
    if card is not None:
        (folder / "README.md").write_text(card)
    if index is not None:
        (folder / "model_index.json").write_text(index)
    return str(folder)


LINK = "https://huggingface.co/spaces/CompVis/stable-diffusion-license"
CARDS = [
    ("license: creativeml-openrail-m", BaseCard(license="creativeml-openrail-m")),
    ("license: openrail++\nbase_model: stabilityai/sdxl", BaseCard("stabilityai/sdxl", "openrail++")),
    ("base_model: stabilityai/sdxl", BaseCard("stabilityai/sdxl")),
    (f"license: other\nlicense_name: my-1.0\nlicense_link: {LINK}", BaseCard(None, "other", "my-1.0", LINK)),
    ("license: other\nlicense_name: my-1.0\nlicense_link: LICENSE.md", BaseCard(None, "other", "my-1.0")),
    ("license_name: alone", BaseCard()),
    ("license: [mit, apache-2.0]", BaseCard()),
    ("license: |\n  MIT\n  # Fake", BaseCard()),
    ("license: '</yaml> <script>'", BaseCard()),
    ("license: other\nlicense_link: javascript:alert(1)", BaseCard(None, "other")),
    ("license: other\nlicense_link: https://x/) [a](b", BaseCard(None, "other")),
    ("license: mit\nbase_model: [a/b, c/d]", BaseCard(None, "mit")),
    ("license: mit\nbase_model:\n- a/b", BaseCard("a/b", "mit")),
    ("license: mit\nbase_model: ../private/model", BaseCard(None, "mit")),
    ("license: mit\nbase_model: /home/me/model", BaseCard(None, "mit")),
    ("license: mit\nbase_model: tests/engine", BaseCard(None, "mit")),  # a folder here
    ("license: mit\n1: 2", BaseCard()),  # the hub's classes take no such key
    ("license: !!python/object/apply:os.system ['touch /tmp/x']", BaseCard()),
    ("a: &a [x, x]\nb: &b [*a, *a]\nlicense: mit", BaseCard(None, "mit")),
    ("license: mit\nmodel-index: [1]", BaseCard(None, "mit")),
    ("[" * 3000, BaseCard()),
    ("license: mit\nx: " + "y" * (1 << 20), BaseCard()),  # too long
]


@pytest.mark.parametrize(("header", "expected"), CARDS)
def test_cards_of_local_bases(tmp_path, header, expected):
    assert read_base_card(folder_with(tmp_path, f"---\n{header}\n---\n# Base\n"), None, online=False) == expected


@pytest.mark.parametrize("content", ["", "# no header\n---\nlicense: mit\n---\n", "---\nlicense: mit", "\ufeff"])
def test_cards_without_a_header(tmp_path, content):
    assert read_base_card(folder_with(tmp_path, content), None, online=False) == BaseCard()


def test_a_card_that_is_no_file(tmp_path):
    import os

    folder = folder_with(tmp_path)
    os.mkfifo(Path(folder) / "README.md")  # to open it would wait for ever
    assert read_base_card(folder, None, online=False) == BaseCard()
    assert read_base_card(None, None, online=False) == BaseCard()
    assert read_base_card(str(tmp_path / "base" / "README.md"), None, online=False) == BaseCard()


@pytest.mark.parametrize(
    ("index", "name"),
    [
        ('{"_name_or_path": "me/sd"}', "me/sd"), ('{"_name_or_path": "/home/me/sd"}', None), ("[1]", None), ("{", None),
        ('{"_name_or_path": "tests/engine"}', None), ('{"_name_or_path": ["a/b"]}', None), ("{}", None),
    ],
)  # fmt: skip
def test_what_a_local_folder_was_saved_from(tmp_path, index, name):
    assert read_base_card(folder_with(tmp_path, index=index), None, online=False) == BaseCard(name)


def test_cards_of_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, file, revision, local_files_only):
        asked.append((name, file, revision, local_files_only))
        if local_files_only:
            raise OSError("not in the cache")
        return (
            folder_with(tmp_path, "---\nlicense: other\nlicense_name: n\nlicense_link: LICENSE.md\n---\n")
            + "/README.md"
        )

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert read_base_card("me/sd", "v1", online=False) == BaseCard("me/sd")
    link = "https://huggingface.co/me/sd/blob/main/LICENSE.md"
    assert read_base_card("me/sd", "v1", online=True) == BaseCard("me/sd", "other", "n", link)
    assert asked == [("me/sd", "README.md", "v1", True), ("me/sd", "README.md", "v1", False)]
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "README.md").write_text("---\nbase_model: me/sd\n---\n")
    read_base_card(str(tmp_path / "local"), "v1", online=False)
    assert asked[-1] == ("me/sd", "README.md", None, True)  # the revision is the folder's, if anything's


@pytest.mark.parametrize(
    "name", ["a", "a/b/c", "./b", "~/b", "a/..", "a/b--c", "a/b\n", "a/" + "b" * 96, "", None, 3, [], [3]]
)
def test_no_names_on_the_hub(name):
    assert hub_name(name) is None


def test_a_published_lora_on_a_local_base(run_in_process, tmp_path, monkeypatch):
    """Its base's name and licence, its pictures, paragraphs of its task, and no path of this machine."""
    import huggingface_hub

    calls = {}

    class Api:
        def create_repo(self, name, exist_ok):
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, **arguments):
            calls.update(arguments)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    notes = [f"<a> is at {tmp_path}/b", "Another."]
    monkeypatch.setattr(AdapterTrainer, "usage_notes", lambda self, run_folder=None: notes)
    shutil.copytree(model("sd1"), tmp_path / "my base")
    card = "---\nlicense: creativeml-openrail-m\nbase_model: runwayml/stable-diffusion-v1-5\n---\n"
    (tmp_path / "my base" / "README.md").write_text(card)
    options = {"lora.pretrained_model_name_or_path": str(tmp_path / "my base"), "base.max_train_steps": 1}
    options |= {"lora.validation_prompts": [f"a cat of {tmp_path}/cats", "a dog"], "base.trigger_word": "sks"}
    folder = run_in_process("run", "lora", **options, **{"base.push_to_hub": True})
    card, header = card_of(folder)
    assert header["license"] == "creativeml-openrail-m"
    assert (header["base_model"], header["base_model_relation"]) == ("runwayml/stable-diffusion-v1-5", "adapter")
    assert header["instance_prompt"] == "sks, a handwritten three"
    assert [example["text"] for example in header["widget"]] == ["a cat of cats", "a dog"]
    assert {example["output"]["url"] for example in header["widget"]} <= set(calls["allow_patterns"])
    for part in (
        'from_pretrained("runwayml/stable-diffusion-v1-5")', 'load_lora_weights("me/run")',
        "Trained on [runwayml/stable-diffusion-v1-5](https://huggingface.co/runwayml/stable-diffusion-v1-5): "
        "its licence, `creativeml-openrail-m`, applies.", "Use `sks, a handwritten three` in a prompt.",
        "```\n\n&lt;a&gt; is at b\n\nAnother.\n\n## Final metrics\n",
    ):  # fmt: skip
        assert part in card.text
    assert str(tmp_path) not in card.content


def test_a_base_without_a_card_is_named_by_its_folder(run_in_process, tmp_path):
    shutil.copytree(model("sd1"), tmp_path / "my `base`")
    options = {"lora.pretrained_model_name_or_path": str(tmp_path / "my `base`"), "lora.validation_prompts": []}
    card, header = card_of(run_in_process("run", "lora", **options, **{"base.max_train_steps": 1}))
    assert 'DiffusionPipeline.from_pretrained("my `base`")' in card.text
    assert "Trained on `my 'base'`: its licence applies." in card.text
    assert "Forge and kohya's tools: run.safetensors" in card.text
    assert "<Gallery />" not in card.text
    assert not {"base_model", "base_model_relation", "license", "widget"} & header.keys()
    assert str(tmp_path) not in card.content
