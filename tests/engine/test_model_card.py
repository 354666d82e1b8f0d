"""The model card: its header as the hub reads it, its pictures, and what a base model's own card may put into it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from features import Features
from huggingface_hub import ModelCard
from PIL import Image
from tiny_models import model

from trainers import TRAINERS
from trainers.common.lora.training import AdapterTrainer
from trainers.engine.config.config import find_trainer
from trainers.engine.export.base_card import BaseCard, hub_name, read_base_card
from trainers.engine.export.card_header import METRICS, card_header
from trainers.engine.tracking.gallery import MOST, Shown, read_gallery, write_gallery

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
PIPELINES = [task for task in TRAINERS if EXPECTED[task]["pipeline_tag"] == "text-to-image"]


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
    if task not in PIPELINES:
        assert "widget" not in header
        return
    assert header["instance_prompt"] == "a handwritten three"
    assert "<Gallery />" in text
    assert "Trained on `sd1-1`: its licence applies; see its page." in text
    assert [example["text"] for example in header["widget"]] == ["a handwritten three"] * 2
    for example in header["widget"]:
        with Image.open(folder / example["output"]["url"]) as image:
            assert image.size == (32, 32)
            assert image.text == {"Description": "a handwritten three"}


def test_the_tasks_are_all_here():
    assert set(EXPECTED) == set(TRAINERS)
    assert all(find_trainer(task).pipeline_tag == EXPECTED[task]["pipeline_tag"] for task in TRAINERS)


@pytest.mark.parametrize(("family", "dora"), [("sd2", False), ("sdxl", True)])
def test_tags_of_families(run_in_process, family, dora):
    options = {"pretrained_model_name_or_path": str(model(family)), "use_dora": dora, "train_text_encoder": False}
    options |= {"learning_rate": 1e-3, "validation_prompts": []}
    settings = {"base.max_train_steps": 1, "base.trigger_word": "sks", "base.caption": ""}
    folder = run_in_process("run", "lora", **settings, **{f"lora.{name}": value for name, value in options.items()})
    card, header = card_of(folder)
    name = "stable-diffusion-xl" if family == "sdxl" else "stable-diffusion"
    assert header["tags"][:2] == [name, f"{name}-diffusers"]
    assert ("dora" in header["tags"], "lora" in header["tags"][:-1]) == (dora, not dora)
    assert header["instance_prompt"] == "sks"
    assert "Use `sks` in a prompt." in card.text
    assert "widget" not in header
    assert "<Gallery />" not in card.text


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
    assert "model-index" not in header_of({}).to_dict()


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
def test_texts_come_back(run_in_process, tmp_path, text):
    """By YAML as the hub parses it."""
    from trainers.base import CardFacts

    gallery = [Shown("samples/prompt-00.png", text)]
    facts = CardFacts(instance_prompt=text, tags=("x",), pipeline_tag="text-to-image")
    header = header_of({"valid/loss": 1.0}, facts=facts, gallery=gallery)
    read = ModelCard(f"---\n{header.to_yaml()}\n---\n\n# Text\n").data
    assert (read.instance_prompt, read.widget) == (text, [{"text": text, "output": {"url": "samples/prompt-00.png"}}])
    assert read.to_dict() == header.to_dict()


def test_no_path_of_the_machine_in_any_field(run_in_process, tmp_path):
    shutil.copytree(model("sd1"), tmp_path / "my base")
    options = {"lora.pretrained_model_name_or_path": str(tmp_path / "my base"), "base.max_train_steps": 1}
    options |= {"lora.validation_prompts": [f"a cat of {tmp_path}/cats", "a dog"]}
    folder = run_in_process("run", "lora", **options)
    card, header = card_of(folder)
    assert str(tmp_path) not in card.content
    assert [example["text"] for example in header["widget"]] == ["a cat of cats", "a dog"]
    assert 'DiffusionPipeline.from_pretrained("my base")' in card.text


# --- the gallery


def test_a_gallery_holds_the_pictures_of_the_last_validation(tmp_path):
    requests = [{"prompt": f"{number}: für 猫 \udcff"} for number in range(MOST + 2)]
    images = torch.linspace(0, 1, MOST + 2)[:, None, None, None].expand(-1, 3, 4, 5)
    write_gallery(tmp_path, requests, images)
    found = read_gallery(tmp_path)
    assert found == [Shown(f"samples/prompt-{n:02d}.png", f"{n}: für 猫 ?") for n in range(MOST)]
    with Image.open(tmp_path / found[7].place) as image:
        assert (image.size, image.getpixel((0, 0))) == ((5, 4), (round(7 / 9 * 255),) * 3)
    write_gallery(tmp_path, requests[:2], images[:2])
    assert len(read_gallery(tmp_path)) == len(list((tmp_path / "samples").iterdir())) == 2


def test_pictures_of_others_in_a_gallery(tmp_path):
    write_gallery(tmp_path, [{"prompt": "a"}] * 5, torch.zeros(5, 1, 4, 4))
    samples = tmp_path / "samples"
    (samples / "prompt-00.png").write_bytes(b"")
    Image.new("RGB", (4, 4)).save(samples / "prompt-01.png")  # without a prompt
    (samples / "prompt-02.png").unlink()
    (samples / "prompt-02.png").symlink_to(samples / "prompt-03.png")
    (samples / "prompt-04.png").write_bytes((samples / "prompt-04.png").read_bytes()[:40])
    assert read_gallery(tmp_path) == [Shown("samples/prompt-03.png", "a")]


def test_a_gallery_is_published(run_in_process, monkeypatch):
    import huggingface_hub

    calls = {}

    class Api:
        def create_repo(self, name, exist_ok):
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, **arguments):
            calls.update(arguments)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    folder = run_in_process("run", "lora", **{"base.push_to_hub": True, "base.max_train_steps": 1})
    urls = [example["output"]["url"] for example in card_of(folder)[1]["widget"]]
    assert urls
    assert set(urls) <= set(calls["allow_patterns"])


# --- notes of a task


def test_a_task_adds_paragraphs_to_the_use(run_in_process, monkeypatch):
    monkeypatch.setattr(AdapterTrainer, "usage_notes", lambda self, location: [f"<a> is for {location}", f"At {tmp_path}/b"])
    folder = run_in_process("run", "lora", **{"base.max_train_steps": 1})
    text = (folder / "README.md").read_text()
    assert re.search(r"```\n\n`a.safetensors` is for \*\*A\*\*\.\n\nAnother\.\n\n## Final metrics\n", text)


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


@pytest.mark.parametrize("name", ["a", "a/b/c", "./b", "~/b", "a/..", "a/b--c", "a/b\n", "a/" + "b" * 96, "", None, 3])
def test_no_names_on_the_hub(name):
    assert hub_name(name) is None


@pytest.mark.parametrize(("task", "relation"), [("lora", "adapter"), ("text_to_image", "finetune")])
def test_the_licence_of_the_base_is_carried_over(run_in_process, tmp_path, task, relation):
    shutil.copytree(model("sd1"), tmp_path / "base")
    card = "---\nlicense: creativeml-openrail-m\nbase_model: runwayml/stable-diffusion-v1-5\n---\n"
    (tmp_path / "base" / "README.md").write_text(card)
    options = {f"{task}.pretrained_model_name_or_path": str(tmp_path / "base"), "base.max_train_steps": 1}
    folder = run_in_process("run", task, **options)
    card, header = card_of(folder)
    assert header["license"] == "creativeml-openrail-m"
    assert (header["base_model"], header["base_model_relation"]) == ("runwayml/stable-diffusion-v1-5", relation)
    assert "its licence, `creativeml-openrail-m`, applies." in card.text
    assert str(tmp_path) not in card.content
    if task == "lora":
        assert 'from_pretrained("runwayml/stable-diffusion-v1-5")' in card.text
