"""The text chunk `parameters` of pictures, read by the rules of AUTOMATIC1111 and of civitai, written anew here."""

from __future__ import annotations

import hashlib
import json
import re

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import save, save_file
from tiny_models import lora_file, model

from scripts import morph, sample
from trainers.common.lora.files import FILE_NAME
from trainers.inference.again import again
from trainers.inference.infotext import Infotext, NamedLora, lora_hash, named_lora, sampler_name
from trainers.inference.picture_files import save_picture

NAME = re.compile(r"\s*([^\W][\w /-]+):\s*")


def details_of(line):
    """AUTOMATIC1111's "Name: value" with commas: a value is JSON in quotes, or goes on to the next comma."""
    found, place = {}, 0
    while match := NAME.match(line, place):
        if quoted := re.compile(r'"(?:[^"\\]|\\.)+"(?=,|$)').match(line, match.end()):
            value, end = json.loads(quoted[0]), quoted.end()
        else:
            end = line.find(",", match.end()) if "," in line[match.end() :] else len(line)
            value = line[match.end() : end]
        found[match[1]], place = value, end + 1
    return found


def by_a1111(text):
    """Prompt, negative prompt and details: the last line holds the details if there are at least three."""
    *lines, last = text.strip().split("\n")
    details = details_of(last)
    if len(details) < 3:
        lines, details = [*lines, last], {}
    prompts = {False: [], True: []}
    negative = False
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            negative, line = True, line.removeprefix("Negative prompt:").strip()
        prompts[negative].append(line)
    return "\n".join(prompts[False]), "\n".join(prompts[True]), details


def by_civitai(text):
    """The details are in the first line that begins with "Steps: "; prompts end wherever the words stand."""
    lines = [line for line in text.split("\n") if line.strip()]
    for key in ("Template: ", "Negative Template: "):
        assert not any(line.startswith(key) for line in lines)  # it would leave them out
    line = next(line for line in lines if line.startswith("Steps: "))
    lines.remove(line)
    prompt, *negative = (part.strip() for part in "\n".join(lines).split("Negative prompt:"))
    details, quoted = {}, re.findall(r'([^,:"]+): "([^"]*)"', line)
    for name, value in quoted:
        details[name.strip()] = dict(part.strip().split(": ") for part in value.split(","))
        line = line.replace(f'{name}: "{value}"', "")
    details |= dict(part.strip().split(": ", 1) for part in line.split(",") if part.strip())
    found = re.findall(r"<lora:([a-zA-Z0-9_.-]+):([0-9.]+)>", prompt)
    return prompt, " ".join(negative), details, {name: float(weight) for name, weight in found}


def infotext(**changes):
    usual = {"model": "me/model", "sampler": "Euler", "steps": 20, "guidance": 7.0, "seed": 2**63}
    return Infotext(**usual | changes)


LORAS = (NamedLora("my_style-2.0", 0.8, "0123456789ab"), NamedLora("no file", 1.0), NamedLora("off", 0.0, "f" * 12))
PROMPTS = [
    "a cat",
    "",
    "a (cat:1.2), [dog], by: me, 7:30",
    "eine Katze für Ödön, 猫と犬, кот 🐈",
    "two\nlines",
    "windows\r\nlines, and\u2028another",
    "a cat\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1",
    "Steps: 20, Sampler: DDIM, CFG scale: 7",
    "Negative prompt: dog",
    "a sign that says Negative prompt: dog\n  Negative prompt: dog\nTemplate: x: y",
    "  Steps: 1, Size: 1x1, Seed: 5",
    '"quotes" and \\ a backslash',
    "cat, " * 5000,
]


@pytest.mark.parametrize("negative", [None, "dog", "two\nlines", "Negative prompt: x\nSteps: 1, Seed: 2, Size: 3x3"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_what_readers_find(prompt, negative):
    text = infotext(negative_prompt=negative, loras=LORAS, clip_skip=2, strength=0.75).of(prompt, (512, 768))
    details = {
        "Steps": "20", "Sampler": "Euler", "CFG scale": "7", "Seed": str(2**63), "Size": "512x768", "Model": "model",
        "Denoising strength": "0.75", "Clip skip": "2", "Lora hashes": "my_style-2.0: 0123456789ab",
        "Version": "diffloop 0.1.0",
    }  # fmt: skip

    def same(found, given):  # CLIP reads small letters, and any space as one
        return " ".join(found.lower().split()) == " ".join(given.lower().split())

    tags = "<lora:my_style-2.0:0.8> <lora:no file:1>"
    found_prompt, found_negative, found = by_a1111(text)
    assert found == details
    assert same(found_prompt, f"{prompt} {tags}")
    assert same(found_negative, negative or "")
    found_prompt, found_negative, found, loras = by_civitai(text)
    assert found == details | {"Lora hashes": {"my_style-2.0": "0123456789ab"}}
    assert same(found_prompt, f"{prompt} {tags}")
    assert same(found_negative, negative or "")
    assert loras == {"my_style-2.0": 0.8}


def test_only_words_of_readers_are_changed():
    text = infotext().of("A Cat (Best Quality:1.2), Steps: 3", (8, 8))
    assert text.startswith("A Cat (Best Quality:1.2), Steps: 3\nSteps: 20, Sampler: Euler, CFG scale: 7, ")


@pytest.mark.parametrize("prompt", ["a cat", "für 猫", "x" * 3_000_000])
def test_the_chunk_of_a_picture(tmp_path, prompt):
    text = infotext().of(prompt, (4, 4))
    save_picture(Image.new("RGB", (4, 4)), tmp_path / "a.png", {"command": ["a"]}, text)
    with Image.open(tmp_path / "a.png") as image:
        assert image.text["parameters"] == text == image.info["parameters"]
        assert json.loads(image.text["diffloop"]) == {"command": ["a"]}


def test_half_of_a_surrogate_pair(tmp_path):
    """As a command line that is not UTF-8 has it; a chunk could not hold it."""
    text = infotext(model="m\udcff").of("a \udcff", (4, 4))
    save_picture(Image.new("RGB", (4, 4)), tmp_path / "a.png", {}, text)
    assert by_a1111(text)[0] == "a ?"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("/home/me/private/sd-1.5", "sd-1.5"), ("me/model.safetensors", "model"), ("outputs/run/", "run"),
        ('a: "b", <c>\\\nd', "a b c d"), (":", "unnamed"),
    ],
)  # fmt: skip
def test_names_of_models_and_loras(tmp_path, name, found):
    text = infotext(model=name, loras=(NamedLora(name.rpartition("/")[2] or "run", 0.5, "0" * 12),)).of("x", (8, 8))
    prompt, _, details = by_a1111(text)
    assert details["Model"] == found
    tag = re.search(r"<lora:([^:]+):0.5>", prompt)[1]
    assert details["Lora hashes"] == f"{tag}: {'0' * 12}"  # the same name: so AUTOMATIC1111 finds a renamed file
    assert "private" not in text


def test_the_hash_of_a_model_is_that_of_its_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my model.safetensors").write_bytes(b"weights")
    details = by_a1111(infotext(model=str(tmp_path / "my model.safetensors")).of("x", (8, 8)))[2]
    assert (details["Model"], details["Model hash"]) == ("my model", hashlib.sha256(b"weights").hexdigest()[:10])
    assert "Model hash" not in by_a1111(infotext(model=str(tmp_path)).of("x", (8, 8)))[2]


def test_no_guidance_is_1():
    assert by_a1111(infotext(guidance=0.0).of("x", (8, 8)))[2]["CFG scale"] == "1"


def test_weights_of_a_column():
    text = infotext(loras=LORAS).of("x", (8, 8), 0.5)
    assert "<lora:my_style-2.0:0.4> <lora:no file:0.5>" in text
    off = infotext(loras=LORAS, plain_sampler="PLMS").of("x", (8, 8), 0.0)
    assert "lora" not in off.lower()
    assert by_a1111(off)[2]["Sampler"] == "PLMS"  # of the base alone


SAMPLERS = [
    ("DDIMScheduler", {}, "DDIM"), ("EulerDiscreteScheduler", {}, "Euler"), ("LCMScheduler", {}, "LCM"),
    ("EulerAncestralDiscreteScheduler", {}, "Euler a"), ("PNDMScheduler", {}, "PLMS"), ("DDPMScheduler", {}, "DDPM"),
    ("DPMSolverMultistepScheduler", {}, "DPM++ 2M"), ("UniPCMultistepScheduler", {}, "UniPC"),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "DPM++ 2M Karras"),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "DPM++ 2M SDE"),
    ("FlowMatchEulerDiscreteScheduler", {}, "Euler"), ("HeunDiscreteScheduler", {}, "Heun"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "settings", "name"), SAMPLERS)
def test_names_of_samplers(kind, settings, name):
    assert sampler_name(getattr(diffusers, kind)(**settings)) == name


def test_the_hash_of_a_lora_is_that_of_its_tensors(tmp_path):
    tensors = {"b": torch.ones(3), "a": torch.zeros(2, 2)}
    for name, header in (("x", {}), ("y", {"ss_output_name": "z"})):
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata=header)
    content = save(tensors)
    expected = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()[:12]
    assert {lora_hash(tmp_path / f"{name}.safetensors") for name in "xy"} == {expected}


def test_a_lora_is_named_after_its_run(tmp_path):
    file = lora_file(tmp_path)
    (tmp_path / "b").mkdir()
    for path in (tmp_path, file, tmp_path / "b" / ".."):
        assert named_lora(path, 0.5) == (tmp_path.name, 0.5, lora_hash(file))
    save_file({"a": torch.ones(1)}, tmp_path / f"{tmp_path.name}.safetensors")  # as AUTOMATIC1111 reads it
    assert named_lora(file, 1.0).digest == lora_hash(tmp_path / f"{tmp_path.name}.safetensors") != lora_hash(file)
    file.rename(tmp_path / "style.v2.safetensors")
    assert named_lora(tmp_path / "style.v2.safetensors", 1.0).name == "style.v2"


# --- what scripts write


def drawn(folder, *arguments):
    words = [*map(str, arguments), "--output-dir", str(folder)]
    sample.run(sample.parse(words))
    return {str(path.relative_to(folder)): Image.open(path) for path in sorted(folder.rglob("*.png"))}


@pytest.mark.parametrize(("family", "skip"), [("sd1", "2"), ("sdxl", "3")])
def test_pictures_of_a_pipeline(tmp_path, family, skip):
    lora = lora_file(tmp_path, family)
    options = ["--steps", 2, "--sampler", "dpmsolver++", "--guidance", 3.5, "--seed", 7, "--clip-skip", 1]
    options += ["--lora", f"{lora}:0.5", "--lora-scales", "0,2", "--negative-prompt", "an ümlaut"]
    found = drawn(tmp_path / "out", model(family), "--prompt", "ein süßes 猫", "--number", 2, *options)
    prompt, negative, details = by_a1111(found["weight_1/00001.png"].text["parameters"])
    assert (prompt, negative) == (f"ein süßes 猫 <lora:{tmp_path.name}:1>", "an ümlaut")
    assert details == {
        "Steps": "2", "Sampler": "DPM++ 2M", "CFG scale": "3.5", "Seed": "7", "Size": "32x32", "Clip skip": skip,
        "Model": model(family).name, "Lora hashes": f"{tmp_path.name}: {lora_hash(lora)}", "Version": "diffloop 0.1.0",
    }  # fmt: skip
    assert by_a1111(found["weight_0/00000.png"].text["parameters"])[0] == "ein süßes 猫"
    assert found["weight_1.png"].text["parameters"] == found["weight_1/00001.png"].text["parameters"]
    assert "parameters" not in found["lora_scales.png"].text
    for image in found.values():
        assert str(tmp_path) not in image.text.get("parameters", "")
    redrawn = Image.open(again(tmp_path / "out" / "weight_1" / "00001.png"))
    assert redrawn.text["parameters"] == found["weight_1/00001.png"].text["parameters"]


def test_pictures_of_a_run(run_in_process, tmp_path):
    folder = run_in_process("run", "lora", **{"base.checkpointing_steps": 3})
    arguments = ["--prompt", "a cat", "--prompt", "a dog", "lora.lora_scale=0.5"]
    found = drawn(tmp_path / "out", folder, *arguments)
    assert "parameters" not in found["samples.png"].text  # of two prompts
    prompt, _, details = by_a1111(found["samples/00001.png"].text["parameters"])
    assert prompt == "a dog <lora:run:0.5>"
    assert details["Model"] == model("sd1").name
    assert details["Lora hashes"] == f"run: {named_lora(folder / FILE_NAME, 1.0).digest}"
    for other in ([folder / "checkpoint-3"], [folder, "--weights", "raw"]):  # the file may hold other weights
        found = drawn(tmp_path / "other", *other, *arguments[:2])
        assert "Lora hashes" not in by_a1111(found["samples/00000.png"].text["parameters"])[2]


def test_pictures_without_a_prompt(run_in_process, tmp_path):
    for task in ("ddpm", "conditional_ddpm"):
        found = drawn(tmp_path / "drawn" / task, run_in_process(task, task))
        assert all("parameters" not in image.text and "diffloop" in image.text for image in found.values())


def test_frames_of_a_morph():
    given = infotext(seed=None, sampler="DDIM", loras=(NamedLora("a", 1.0, "0" * 12), NamedLora("b", 1.0, "1" * 12)))
    texts = [morph.text_of_frame(given, ["a cat", "a dog"], weight, (8, 8)) for weight in (0.0, 0.25, 1.0)]
    prompts = [by_a1111(text)[0] for text in texts]
    assert prompts == [
        "a cat <lora:a:1>",
        "a cat :0.75 AND a dog :0.25 <lora:a:0.75> <lora:b:0.25>",
        "a dog <lora:b:1>",
    ]
    assert morph.text_of_frame(given, ["x", "x"], 0.5, (8, 8)).startswith("x <lora:a:0.5> <lora:b:0.5>\nSteps: 20, ")
    assert "Seed" not in by_a1111(texts[1])[2]
    assert by_a1111(texts[2])[2]["Lora hashes"] == f"b: {'1' * 12}"
