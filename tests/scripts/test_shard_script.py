"""scripts/shard.py: what a folder's shards hold is what the folder held; it goes on where it was left."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from marks import slow
from PIL import Image
from processes import environment
from repository import ROOT
from run_folders import losses
from script_calls import run_script
from shard_files import SIDE, caption, png
from streams import base_of

import datasets_lib
from datasets_lib.streaming.writing import example_of
from scripts import shard
from train import main, train
from trainers.engine.config.config import load_config

FORMATS = ("parquet", "webdataset")
COUNT = 11
TASK = "conditional_ddpm"
PROGRAMS = ("scripts/shard.py", "scripts/shard.py", "train.py")  # of the README's lines


@pytest.fixture
def folder(tmp_path):
    """Pictures of two classes with masks and captions, of which one has two texts."""
    rows = []
    for number in range(COUNT):
        name = f"{'cat' if number % 2 else 'dog'}/{number}.{'png' if number else 'jpg'}"
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number) if number else _jpeg())
        (tmp_path / "pictures" / f"mask-{number}.png").write_bytes(png(255 * (number % 3 == 0)))
        text = [caption(number), "another"] if number == 4 else caption(number)
        rows.append(
            {
                "file_name": name,
                "text": text,
                "label": "dog" if number % 2 == 0 else "cat",
                "mask": f"mask-{number}.png",
            }
        )
    (tmp_path / "pictures" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "pictures"


def _jpeg():
    data = io.BytesIO()
    Image.fromarray(np.zeros((SIDE, SIDE), dtype=np.uint8)).save(data, "JPEG")
    return data.getvalue()


def examples_of(output):
    stream = datasets_lib.build(base_of(output), "train")
    return stream, [stream.example(row, None) for row in stream.held().rows]


@pytest.mark.parametrize("kind", FORMATS)
def test_shards_hold_the_files_as_they_are(folder, tmp_path, kind):
    output = tmp_path / "shards"
    run_script(shard, folder, "--output-dir", output, "--format", kind, "--shard-size", 4)
    whole = datasets_lib.build(base_of(folder, streaming=False), "train")
    stream, examples = examples_of(output)
    assert len(stream.shards) == 3
    assert stream.notes == ["a stream of 3 shards, 11 examples; its epochs are not counted"]
    assert (stream.label_names, stream.highest_label) == (whole.label_names, 1)
    expected = [whole.get(number, None) for number in range(COUNT)]
    key = lambda example: (example["image"].sum().item(), example["caption"])  # noqa: E731
    examples, expected = sorted(examples, key=key), sorted(expected, key=key)
    for one, other in zip(examples, expected, strict=True):
        assert one.keys() == other.keys()
        assert (one["caption"], one["label"]) == (other["caption"], other["label"])
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["mask"], other["mask"])
    order = [row.columns["label"] for row in stream.held().rows]
    assert order != sorted(order)  # classes are mixed
    [texts] = [row.columns["text"] for row in stream.held().rows if len(row.columns["text"]) == 2]
    assert texts == [caption(4), "another"]
    names = {example_of(whole, number)["image"] for number in range(COUNT)}
    column = "image"
    files = [row.columns[column] for row in stream.held().rows]
    assert {data["bytes"] if isinstance(data, dict) else data for data in files} == names


def test_arrays_become_png_files_and_a_split_its_own_folder(tmp_path, capsys):
    output = tmp_path / "shards"
    options = ["base.validation_split=0.1", "base.max_train_samples=40"]
    run_script(shard, "configs/tests/ddpm.json", *options, "--output-dir", output, "--shard-size", 15)
    base = base_of(output, validation_split="validation", resolution=16)
    train_set, held = (datasets_lib.build(base, split) for split in ("train", "validation"))
    assert [shard.name for shard in train_set.shards] == [f"shard-0000{n}.parquet" for n in range(3)]
    assert len(held) == 180
    assert (train_set.label_names, held.highest_label) == ([str(n) for n in range(10)], 9)
    digits = datasets_lib.build(base_of(None, dataset="digits", streaming=False, validation_split=0.1), "validation")
    expected = sorted(digits.get(n, None)["image"].sum().item() for n in range(180))
    assert sorted(held.get(n, None)["image"].sum().item() for n in range(180)) == expected


def test_processes_write_their_own_shards(folder, tmp_path):
    dataset = datasets_lib.build(base_of(folder, streaming=False), "train")
    options = SimpleNamespace(format="parquet", shard_size=2)
    alone, both = tmp_path / "alone", tmp_path / "both"
    for output, world in ((alone, 1), (both, 3)):
        output.mkdir()
        for rank in range(world):
            before = {path.name for path in output.glob("shard-*")}
            process = SimpleNamespace(process_index=rank, num_processes=world)
            shard.write_shards(process, dataset, None, output, options, seed=0)
            written = {path.name for path in output.glob("shard-*")} - before
            assert written == {f"shard-{n:05}.parquet" for n in range(rank, 6, world)}
    names = sorted(path.name for path in alone.iterdir())
    assert names == sorted(path.name for path in both.iterdir())
    assert all((alone / name).read_bytes() == (both / name).read_bytes() for name in names)


@pytest.mark.slow
def test_two_processes_as_users_launch_them(folder, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "scripts/shard.py",
    ]
    command += [str(folder), "--output-dir", str(tmp_path / "shards"), "--shard-size", "4"]
    subprocess.run(command, cwd=ROOT, env=environment(None), check=True, capture_output=True)
    assert len(examples_of(tmp_path / "shards")[1]) == COUNT


def test_what_was_interrupted_goes_on(folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "shards"
    arguments = [folder, "--output-dir", output, "--shard-size", 4]
    run_script(shard, *arguments)
    whole = {path.name: path.read_bytes() for path in output.iterdir()}
    (output / "index.json").unlink()
    (output / ".shard-00001.parquet.json").write_text('{"by')
    (output / "shard-00002.parquet").write_bytes(whole["shard-00002.parquet"][:100])
    (output / ".tmp-shard-00001.parquet").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"scripts/shard.py has not finished it; run it again"):
        datasets_lib.build(base_of(output), "train")
    before = (output / "shard-00000.parquet").stat().st_mtime_ns
    capsys.readouterr()
    run_script(shard, *arguments)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == whole
    assert (output / "shard-00000.parquet").stat().st_mtime_ns == before
    assert capsys.readouterr().out.count(": 4 examples") == 1


def test_a_second_call_is_refused_and_a_dead_one_is_not_in_the_way(folder, tmp_path):
    """The first is a process of its own: within one the kernel gives a lock again."""
    output = tmp_path / "shards"
    output.mkdir()
    code = "import time\nfrom pathlib import Path\nfrom trainers.engine.run.run_folder import lock_folder\n"
    code += f"held = lock_folder(Path({str(output)!r}))\nprint('held', flush=True)\ntime.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        arguments = [folder, "--output-dir", output, "--shard-size", 4]
        with pytest.raises(
            SystemExit, match=f"error: --output-dir = {output}: in use by pid {holder.pid} on .*; wait for"
        ):
            run_script(shard, *arguments)
        assert [path.name for path in output.iterdir()] == [".lock"]
    finally:
        holder.kill()
        holder.communicate()
    run_script(shard, *arguments)
    assert len(examples_of(output)[1]) == COUNT


def test_refusals(folder, tmp_path, capsys):
    output = tmp_path / "shards"
    run_script(shard, folder, "--output-dir", output, "--shard-size", 4)

    def refusal(*arguments):
        with pytest.raises(SystemExit) as exit:
            run_script(shard, *arguments)
        return str(exit.value)

    text = refusal(folder, "--output-dir", output, "--shard-size", 5)
    assert f"error: {output}: was made with other settings (shard_size: 4 -> 5); choose a new folder" in text
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    text = refusal(folder, "--output-dir", tmp_path / "other")
    assert "is not empty, and scripts/shard.py did not write it; choose a new folder" in text
    text = refusal(folder, "base.seed=1", "--output-dir", tmp_path / "new")
    assert f"base.seed=1: overrides go with a configuration, and {folder} is data" in text
    config = "configs/tests/ddpm.json"
    text = refusal(
        config,
        "--output-dir",
        tmp_path / "new",
        "base.train_data_dir=x",
        "base.streaming=true",
        "base.max_train_samples=null",
    )
    assert "base.streaming = True: cannot be put into shards; unset it" in text
    text = refusal(config, "--output-dir", tmp_path / "new", "--latents", "configs")
    assert "--latents = configs: must be a finished vae run: a folder with config.json" in text
    text = refusal(config, "--output-dir", tmp_path / "new", "--latents", "configs/tests", "base.random_flip=true")
    assert "error: --latents" in text
    text = refusal(
        config,
        "--output-dir",
        tmp_path / "new",
        "base.dataset=test_data_dataset:Own.build",
        "base.max_train_samples=null",
    )
    assert "cannot be imported" in text


def test_what_is_not_there_is_neither_a_folder_nor_a_configuration(tmp_path):
    for name in ("pictures", "config.yaml"):
        with pytest.raises(SystemExit) as exit:
            run_script(shard, tmp_path / name, "--output-dir", tmp_path / "shards")
        assert (
            exit.value.code == f"error: {tmp_path / name}: there is neither a folder nor a configuration of this name"
        )
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize(
    ("count", "size"), [(1, 1), (3, 1), (9, 1), (40, 5), (41, 5), (80_000, 10_000), (10**7, 10_000)]
)
def test_small_data_has_shards_for_several_readers(count, size):
    assert shard.shard_size(range(count), SimpleNamespace(shard_size=None)) == size
    assert shard.shard_size(range(count), SimpleNamespace(shard_size=7)) == 7


def test_the_readmes_lines_one_after_the_other(tmp_path, vae, monkeypatch):
    """On forty pictures, too: there are shards for both readers of the config that they train with."""
    block = (ROOT / "README.md").read_text().partition("### Shards")[2].partition("```bash\n")[2].partition("```")[0]
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    [write, encode, learn] = [line[1 + line.index(name) :] for name, line in zip(PROGRAMS, lines, strict=True)]
    (tmp_path / "my/pictures").mkdir(parents=True)
    for number in range(40):
        (tmp_path / f"my/pictures/{number}.png").write_bytes(png(number))
    shutil.copytree(ROOT / "configs/tests", tmp_path / "configs/tests")
    shutil.copy(ROOT / "configs/streamed_digits.yaml", tmp_path / "configs")
    shutil.copytree(vae, tmp_path / "outputs/vae")
    monkeypatch.chdir(tmp_path)
    run_script(shard, *write)
    assert len(list((tmp_path / "my/shards").glob("*.parquet"))) == 8
    run_script(shard, *["configs/tests/ddpm.json" if word == "CONFIG" else word for word in encode])
    assert len(list((tmp_path / "my/latents").glob("*.parquet"))) == 8
    quick = ["base.max_train_steps=2", "ddpm.ddpm_num_inference_steps=2", "base.logger=none", "base.logging_steps=1"]
    assert main([*learn, *quick, "ddpm.model_config=configs/tests/models/unet2d.json", "ddpm.valid_batch_size=2"]) == 0
    assert len(losses(tmp_path / "outputs/streamed_digits")) == 2


# --- latents


@pytest.mark.parametrize("kind", ["webdataset", slow("parquet")])
def test_a_task_trains_from_shards_of_latents_without_the_pictures(vae, tmp_path, tiny_config, kind, capsys):
    output = tmp_path / "shards"
    config = f"configs/tests/{TASK}.json"
    run_script(
        shard,
        config,
        "base.max_train_samples=50",
        "base.center_crop=true",
        "--output-dir",
        output,
        "--latents",
        vae,
        "--format",
        kind,
        "--shard-size",
        20,
    )
    stream, examples = examples_of(output)
    assert stream.encoded_by is not None
    digits = datasets_lib.build(
        base_of(None, dataset="digits", streaming=False, max_train_samples=50, resolution=16), "train"
    )
    network = diffusers.AutoencoderKL.from_pretrained(vae)
    with torch.no_grad():
        posteriors = [network.encode(digits.get(n, None)["image"][None]).latent_dist for n in range(50)]
    expected = sorted(posterior.mean.sum().item() for posterior in posteriors)
    assert sorted(example["mean"].sum().item() for example in examples) == pytest.approx(expected, abs=1e-3)
    assert examples[0].keys() == {"mean", "logvar", "caption", "label"}
    options = {
        "base.dataset": None, "base.train_data_dir": str(output), "base.streaming": True, "base.max_train_samples": None,
        f"{TASK}.vae": str(vae), f"{TASK}.model_config": None,
    }  # fmt: skip
    run = train(load_config(tiny_config(TASK, "latent", **options)))
    assert len(losses(run)) == 6
    capsys.readouterr()
    other = tmp_path / "other"
    shutil.copytree(vae, other)
    weights = diffusers.AutoencoderKL.from_pretrained(other)
    with torch.no_grad():
        weights.decoder.conv_out.bias += 1
    weights.save_pretrained(other)
    assert main([str(tiny_config(TASK, "latent2", **options | {f"{TASK}.vae": str(other)}))]) == 1
    assert "the data set was encoded by another network; encode it with this one" in capsys.readouterr().err
    for option, value, text in (
        ("random_flip", True, "latents cannot be mirrored"),
        ("resolution", 32, "latents of pictures with resolution 16"),
    ):
        with pytest.raises(ValueError, match=text):
            datasets_lib.build(base_of(output, **{option: value}), "train")
