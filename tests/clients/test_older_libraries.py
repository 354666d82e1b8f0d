"""Finished pipelines and LoRA files in transformers 4 with diffusers 0.35 and 0.30: they draw what today's libraries draw.

The environments are made here by pip, without what the present one has already, above all torch; where pip reaches no
index, these tests are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from repository import ROOT, tiny
from safetensors.torch import load_file, save_file
from script_calls import run_script
from tiny_models import model

from scripts import convert_lora, merge_lora
from train import train
from trainers.engine.config.config import load_config

pytestmark = pytest.mark.slow
SHARED = ["transformers==4.57.6", "huggingface_hub<1", "tokenizers<0.23"]
VERSIONS = {
    "0.35": [*SHARED, "diffusers==0.35.2"],
    "0.30": [*SHARED, "diffusers==0.30.3", "peft==0.15.2"],
}
CONV = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "proj_in", "ff.net.0.proj", "time_emb_proj"]
RATES = {"unet": 1e-2, "text_encoder": 1e-3, "text_encoder_2": 1e-3}
PIPELINES = {
    "ddpm": ("ddpm", None, {}),
    "conditional_ddpm": ("conditional_ddpm", None, {}),
    "dit": ("dit", None, {}),
    "vae": ("vae", None, {}),
    "text_to_image": ("text_to_image", "sd1", {}),
    "text_to_image_sdxl": ("text_to_image", "sdxl", {}),
}
LORAS = {
    "lora": ("lora", "sd1", {}),
    "lora_rslora": ("lora", "sd2", {"use_rslora": True}),
    "lora_dora": ("lora", "sd1", {"use_dora": True}),
    "lora_conv": ("lora", "sdxl", {"target_modules": CONV, "use_rslora": True, "learning_rate": RATES}),
    "lcm_lora": ("lcm_lora", "sd1", {}),
}
FORMATS = ("diffusers", "kohya")
MERGED = ("lora", "lora_conv")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """{name: arguments of older_client.opened} of everything that was trained, merged and converted."""
    folder = tmp_path_factory.mktemp("written")
    bases = {family: hub_base(family, folder) for family in ("sd1", "sd2", "sdxl")}
    found = {}
    for name, run in (PIPELINES | LORAS).items():
        trained(folder / name, bases, *run)
        if name in PIPELINES:
            found[name] = {"folder": str(folder / name)}
    for name, (_, family, _) in LORAS.items():
        kohya = folder / name / f"{name}.safetensors"
        if name == "lora_dora":  # which a run does not write
            convert_lora.convert(folder / name, kohya, dora=True)
        files = {"diffusers": folder / name / "pytorch_lora_weights.safetensors", "kohya": kohya}
        found |= {f"{name}-{form}": {"folder": str(bases[family]), "lora": str(files[form])} for form in FORMATS}
    for name in MERGED:
        run_script(merge_lora, bases[LORAS[name][1]], folder / f"merged_{name}", "--lora", folder / name)
        found[f"merged_{name}"] = {"folder": str(folder / f"merged_{name}")}
    return found


def hub_base(family, folder):
    """A copy of the tiny pipeline whose text encoders' tensors have the hub's names, which transformers 4 wants."""
    import shutil

    base = shutil.copytree(model(family), folder / f"base-{family}")
    for file in base.glob("text_encoder*/model.safetensors"):
        tensors = load_file(file)
        names = {key: key if key.startswith("text_") else f"text_model.{key}" for key in tensors}
        save_file({names[key]: value for key, value in tensors.items()}, file, metadata={"format": "pt"})
    return base


def trained(folder, bases, task, family, options):
    document = json.loads(tiny(task).read_text())
    document["base"]["output_dir"] = str(folder)
    base = {"pretrained_model_name_or_path": str(bases[family])} if family else {}
    document[task] |= base | options
    path = folder.with_suffix(".json")
    path.write_text(json.dumps(document))
    train(load_config(path, trust_code=True))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def results(jobs, tmp_path_factory):
    """results(version) -> (tensors, errors) of the jobs; "" are the present versions."""
    folder, made = tmp_path_factory.mktemp("environments"), {}
    (folder / "jobs.json").write_text(json.dumps(jobs))

    def of(version):
        if version not in made:
            python = environment(folder / f"diffusers-{version}", version) if version else Path(sys.executable)
            out = folder / f"out-{version}"
            settings = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
            settings |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / f"hub-{version}"), "OMP_NUM_THREADS": "1"}
            script = [ROOT / "tests/helpers/older_client.py", folder / "jobs.json", out]
            subprocess.run([python, *script], check=True, cwd=folder, env=settings)
            about = json.loads(out.with_name(f"{out.name}.json").read_text())
            assert about["diffusers"].startswith(version)
            assert about["transformers"].startswith("4." if version else "5.")
            assert not version or not about["diffloop"]
            made[version] = load_file(f"{out}.safetensors"), about["errors"]
        return made[version]

    return of


def environment(folder, version):
    """The Python of a new environment with older libraries in front of the present ones."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin/python", "install", "--quiet", "--no-deps"]
    done = subprocess.run([*pip, *VERSIONS[version]], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot install {', '.join(VERSIONS[version])}: {done.stderr.strip().splitlines()[-1]}")
    [own] = folder.glob("lib/python*/site-packages")
    (own / "present.pth").write_text(sysconfig.get_paths()["purelib"])
    return folder / "bin/python"


def compare(results, version, name, parts=""):
    (new, now), (old, before) = results(""), results(version)
    assert now.get(name) is None
    assert before.get(name) is None
    wanted = {key: value for key, value in new.items() if key.startswith(f"{name}|{parts}")}
    assert {key for key in old if key.startswith(f"{name}|{parts}")} == wanted.keys()
    assert wanted
    for key, value in wanted.items():
        torch.testing.assert_close(old[key], value, rtol=0, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", [*PIPELINES, *(f"merged_{name}" for name in MERGED)])
def test_pipelines_draw_the_same_in_transformers_4(results, name):
    compare(results, "0.35", name)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", [f"{name}-{form}" for name in LORAS for form in FORMATS])
def test_loras_change_the_same_in_older_diffusers(results, version, name):
    if (name, version) == ("lora_dora-kohya", "0.30"):
        pytest.skip("diffusers 0.30 refuses kohya's scale of DoRA, by the shape of it")
    compare(results, version, name)
