"""Caches of what frozen encoders say: the same training, keys by content, nothing half-written, nothing stale."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import diffusers
import pytest
import tiny_models
import torch
from marks import slow
from PIL import Image
from processes import launch, start
from run_folders import losses, read_metrics
from safetensors import SafetensorError
from safetensors.torch import load_file

import datasets_lib
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.encoders import fill
from trainers.engine.encoders.cache import Cache, folder_of, text_key
from trainers.engine.encoders.stages import FrozenEncoders

WORDS = ["cat", "dog", "three", "photo"]


@pytest.fixture
def captioned(tmp_path):
    """Ten pictures of two sizes with one or three captions each, and a held-out one."""
    folder = tmp_path / "pictures"
    (folder / "held").mkdir(parents=True)
    rows = []
    for number in range(11):
        name = f"held/{number}.png" if number == 10 else f"{number}.png"
        pixels = torch.randint(256, (40, 32 + 8 * (number % 2), 3), dtype=torch.uint8, generator=_seeded(number))
        Image.fromarray(pixels.numpy()).save(folder / name)
        texts = [f"a {word} {number}" for word in WORDS[: 1 if number % 2 else 3]]
        rows.append({"file_name": name, "text": texts if len(texts) > 1 else texts[0]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _seeded(number):
    return torch.Generator().manual_seed(number)


@pytest.fixture
def options(captioned, tmp_path):
    """Flips, several captions and caption dropout on."""
    return {
        "base.dataset": None,
        "base.train_data_dir": str(captioned),
        "base.validation_split": "held",
        "base.caption": "",
        "base.center_crop": True,
        "base.random_flip": True,
        "text_to_image.caption_dropout": 0.3,
        "text_to_image.validation_prompts": ["a cat 1"],
    }


def cached(kind):
    return {"text_to_image.cache_latents": kind, "text_to_image.cache_text": kind}


def numbers(folder):
    """Losses of training and validation."""
    found = [float.fromhex(value) for value in losses(folder).values()]
    return found + [v for line in read_metrics(folder, prefix="valid") for k, v in line.items() if "loss" in k]


@pytest.mark.parametrize("family", ["sd1", slow("sdxl")])
def test_cached_and_uncached_training_are_the_same(run_in_process, options, family, tmp_path):
    options = {**options, "text_to_image.pretrained_model_name_or_path": str(tiny_models.model(family))}
    plain = run_in_process("plain", "text_to_image", **options)
    for kind in ("memory", "disk"):
        found = run_in_process(kind, "text_to_image", **options, **cached(kind))
        assert numbers(found) == pytest.approx(numbers(plain), rel=1e-5)
    files = list((tmp_path / "encoder-cache").glob("image-*/rows-*.safetensors"))
    rows = [name for file in files for name in load_file(file)]
    rows = [name for name in rows if name != "checksums"]
    assert len(rows) == 2 * (
        10 * 2 + 1
    )  # mean and logvar of ten pictures and their mirrored ones, and the held-out one


@pytest.mark.parametrize(("task", "family"), [("lora", "sd1"), slow("lora", "sdxl"), slow("text_to_image", "sdxl")])
def test_pictures_of_a_class_are_cached_too(run_in_process, options, captioned, task, family, tmp_path):
    (tmp_path / "class").mkdir()
    for number in range(3):
        pixels = torch.randint(256, (36, 36, 3), dtype=torch.uint8, generator=_seeded(50 + number))
        Image.fromarray(pixels.numpy()).save(tmp_path / "class" / f"{number}.png")
    prior = {"base.class_data_dir": str(tmp_path / "class"), "base.class_caption": "a photo of a dog"}
    options = {name.replace("text_to_image.", f"{task}."): value for name, value in options.items()} | prior
    options |= {f"{task}.pretrained_model_name_or_path": str(tiny_models.model(family)), "base.max_train_steps": 3}
    if task == "lora":
        options["lora.learning_rate"] = 1e-3
    plain = run_in_process("plain", task, **options)
    kept = {f"{task}.cache_latents": "disk"}
    found = run_in_process("cached", task, **options, **kept)
    assert numbers(found) == pytest.approx(numbers(plain), rel=1e-5)
    terms = read_metrics(found, prefix="prior_loss")
    assert len(terms) == 3
    for line in terms:
        assert line["loss"] == pytest.approx(line["instance_loss"] + line["prior_loss"], rel=1e-5)
    without = run_in_process("without", task, **{**options, **dict.fromkeys(prior)})
    assert numbers(without)[0] == pytest.approx(terms[0]["instance_loss"], rel=1e-5)  # the draws are the same


def test_with_workers_and_resumed(run_in_process, options):
    options = {**options, **cached("disk"), "base.checkpointing_steps": 3}
    whole = run_in_process("whole", "text_to_image", **options)
    options |= {"base.dataloader_num_workers": 2, "base.resume_from_checkpoint": str(whole / "checkpoint-3")}
    again = run_in_process("again", "text_to_image", **options)
    assert list(losses(again).items()) == list(losses(whole).items())[3:]


def test_encoders_are_not_loaded_where_everything_is_cached(run_in_process, options, monkeypatch):
    options = {**options, **cached("disk"), "text_to_image.validation_prompts": []}
    run_in_process("first", "text_to_image", **options)
    built = []
    run = FrozenEncoders.run
    monkeypatch.setattr(FrozenEncoders, "run", lambda self, name, values: built.append(name) or run(self, name, values))
    run_in_process("second", "text_to_image", **options)
    assert built == []


def encoded(capsys):
    """{encoder: how many values were encoded}, as the run printed it."""
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("cache ")]
    return {line[1].rstrip(":"): int(line[2]) for line in lines if "to encode, in /" in " ".join(line)}


def test_keys_are_the_content(run_in_process, options, captioned, capsys, tmp_path):
    options = {**options, **cached("disk"), "base.encoder_cache_dir": str(tmp_path / "shared")}
    options |= {"base.max_train_steps": 1}  # it encodes before the first

    def count(name, **changed):
        run_in_process(name, "text_to_image", **{**options, **changed})
        return encoded(capsys)

    texts = 5 + 5 * 3 + 3 + 1  # one or three of each picture, the held-out one's, the empty one; the prompt is known
    assert count("first") == {"latents": 21, "text": texts}
    assert count("again") == {"latents": 0, "text": 0}
    assert count("without_flips", **{"base.random_flip": False}) == {"latents": 0, "text": 0}
    shutil.copy(captioned / "0.png", captioned / "1.png")  # one file with other content: it is known already
    assert count("copied") == {"latents": 0, "text": 0}
    Image.new("RGB", (33, 40), "red").save(captioned / "2.png")
    assert count("repainted") == {"latents": 2, "text": 0}
    assert count("smaller", **{"base.resolution": 24}) == {"latents": 21 - 2, "text": 0}  # 0 and 1 are one file now
    assert count("bf16", **{"base.mixed_precision": "bf16"}) == {"latents": 19, "text": texts}

    other = tmp_path / "other"
    shutil.copytree(tiny_models.model("sd1"), other)
    config = json.loads((other / "vae" / "config.json").read_text())
    (other / "vae" / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.5}))
    run_in_process(
        "elsewhere", "text_to_image", **options, **{"text_to_image.pretrained_model_name_or_path": str(other)}
    )
    printed = capsys.readouterr().out
    assert "holds outputs of another encoder, precision or version" in printed
    assert "cache latents: 19 of 19 to encode" in printed
    assert "cache text: 0 of" in printed


def test_a_half_written_cache_is_completed_and_a_broken_file_replaced(run_in_process, options, capsys, tmp_path):
    options = {**options, **cached("disk")}
    plain = run_in_process("first", "text_to_image", **options)
    [folder] = (tmp_path / "encoder-cache").glob("image-*")
    [file] = folder.glob("rows-*")
    content = file.read_bytes()
    (folder / ".tmp-1234").write_bytes(content[: len(content) // 2])  # a run that was killed while it wrote
    file.unlink()
    capsys.readouterr()
    again = run_in_process("again", "text_to_image", **options)
    assert encoded(capsys) == {"latents": 21, "text": 0}
    assert numbers(again) == numbers(plain)
    [file] = folder.glob("rows-*")
    file.write_bytes(content[: len(content) // 2])
    run_in_process("broken", "text_to_image", **options)
    printed = capsys.readouterr().out
    assert "cannot be read" in printed
    assert "cache latents: 21 of 21 to encode" in printed


def test_an_interrupted_start_goes_on_where_it_was(run_in_process, options, monkeypatch, capsys):
    options = {**options, **cached("disk")}
    monkeypatch.setattr(fill, "FILE_BYTES", 1)  # a file after every batch
    run, calls = FrozenEncoders.run, []

    def interrupted(self, name, values):
        calls.append(name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return run(self, name, values)

    monkeypatch.setattr(FrozenEncoders, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_in_process("interrupted", "text_to_image", **options)
    capsys.readouterr()
    monkeypatch.setattr(FrozenEncoders, "run", run)
    run_in_process("again", "text_to_image", **options)
    assert encoded(capsys)["latents"] == 21 - 3 * 4


def test_a_signal_loses_no_row(run_in_process, options, monkeypatch, capsys, tmp_path):
    """What was encoded before the end is written, however little it is."""
    options, run, calls = {**options, **cached("disk")}, FrozenEncoders.run, []

    def interrupted(self, name, values):
        calls.append(name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(self, name, values)

    monkeypatch.setattr(FrozenEncoders, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_in_process("interrupted", "text_to_image", **options)
    [file] = (tmp_path / "encoder-cache").glob("image-*/rows-*")
    assert len(load_file(file)) == 2 * 2 * 4 + 1  # checksums, and mean and logvar of two batches


def test_a_cache_that_cannot_be_written_or_read(tmp_path, monkeypatch):
    key, rows = text_key("a"), [torch.ones(2)]
    folder, _ = folder_of(tmp_path, "caption", {"dtype": "x"})

    def full(*arguments, **options):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(
            OSError, match=r"a cache cannot be written \(.*No space left.*\); it needs 8 bytes, [\d,]+ are f"
        ):
            Cache(folder).add({key: rows})
    assert [path.name for path in folder.iterdir()] == ["source.json"]
    Cache(folder).add({key: rows})
    [file] = folder.glob("rows-*")
    assert file.stat().st_mode & 0o777 == 0o666 & ~_umask()

    def forbidden(*arguments):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", forbidden)
        with pytest.raises(OSError, match=r"a cache cannot be read \(.*Permission denied.*\); check its permissions"):
            Cache(folder).look()
    assert file.is_file()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_broken_picture_is_told_by_every_process(options, captioned, tmp_path, tiny_config):
    (captioned / "3.png").write_bytes(b"broken")
    config = tiny_config("text_to_image", **{**options, **cached("disk"), "base.train_batch_size": 2})
    done = launch(config, processes=2)
    assert done.returncode != 0
    assert "3.png" in done.stderr
    assert "Traceback" not in done.stderr.split("torch/distributed")[0]


def test_all_processes_write_their_share(options, tmp_path, tiny_config):
    options = {**options, **cached("disk"), "base.train_batch_size": 2, "base.max_train_steps": 3}
    plain = tiny_config("text_to_image", "config", **options)
    done = launch(plain, f"base.output_dir={tmp_path / 'two'}", processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cache latents: 21 of 21 to encode") == 1
    files = [load_file(file) for file in (tmp_path / "encoder-cache").glob("image-*/rows-*")]
    assert sorted(len(file) // 2 for file in files) == [10, 11]
    one = launch(plain, f"base.output_dir={tmp_path / 'one'}", "base.gradient_accumulation_steps=2")
    assert "cache latents: 0 of 21" in one.stdout
    assert losses(tmp_path / "one") == losses(tmp_path / "two")


@pytest.mark.slow  # the share of each process is tested by default
def test_a_cache_on_each_host_holds_all(options, tmp_path, tiny_config):
    options = {**options, **cached("disk"), "base.train_batch_size": 2, "base.max_train_steps": 3}
    config, names = tiny_config("text_to_image", "config", **options), ("one", "two")
    faults = {"hosts": names, "by_rank": [[f"base.output_dir={tmp_path}/{name}/run"] for name in names]}
    assert start(config, processes=2, faults=faults, out=tmp_path / "log").wait(300) == 0
    for name in names:
        rows = [load_file(file) for file in (tmp_path / name / "encoder-cache").glob("image-*/rows-*")]
        assert [len(file) // 2 for file in rows] == [21]
        place = f"cache latents: 21 of 21 to encode, in {name}:{tmp_path}/{name}/encoder-cache/image-"
        assert place in (tmp_path / "log").read_text()
    again = launch(config, f"base.output_dir={tmp_path}/one/again", "base.gradient_accumulation_steps=2")
    assert "cache latents: 0 of 21" in again.stdout
    assert numbers(tmp_path / "one" / "again") == pytest.approx(numbers(tmp_path / "one" / "run"))


class Encoded:
    """A data set of one's own: the latents of another one's pictures, with their captions."""

    options = ("center_crop", "random_flip")

    def __init__(self, pictures, autoencoder):
        self.pictures, self.fingerprint, self.captions = pictures, pictures.fingerprint, pictures.captions
        self.autoencoder = diffusers.AutoencoderKL.from_pretrained(autoencoder).requires_grad_(False)

    def __len__(self):
        return len(self.pictures)

    def get(self, index, generator):
        example = self.pictures.get(index, generator)
        posterior = self.autoencoder.encode(example.pop("image")[None]).latent_dist
        return {**example, "mean": posterior.mean[0], "logvar": posterior.logvar[0]}


def build_encoded(args, split, folder):
    pictures = BaseConfig(**{**vars(args), "dataset": None, "dataset_args": {}, "train_data_dir": folder})
    return Encoded(datasets_lib.build(pictures, split), tiny_models.model("sd1") / "vae")


def test_latents_of_a_data_set_with_cached_text(run_in_process, options, captioned):
    plain = {**options, "base.random_flip": False}
    first = run_in_process("plain", "text_to_image", **plain)
    own = {"base.dataset": f"{__name__}:build_encoded", "base.dataset_args": {"folder": str(captioned)}}
    options = {**plain, **own, "base.train_data_dir": None, "text_to_image.cache_text": "memory"}
    found = run_in_process("encoded", "text_to_image", **options)
    assert numbers(found) == pytest.approx(numbers(first), rel=1e-5)


def test_rows_of_a_cache(tmp_path):
    key, rows = text_key("a"), [torch.arange(3.0), torch.ones(2, dtype=torch.bfloat16)]
    (tmp_path / "cache").mkdir()
    for folder in (None, tmp_path / "cache"):
        cache = Cache(folder)
        cache.look()
        assert key not in cache
        cache.add({key: rows})
        cache.look()
        assert key in cache
        found = cache.rows([key, key], ("x", "y"), torch.device("cpu"))
        assert torch.equal(found["x"], torch.stack([rows[0]] * 2))
        assert found["y"].dtype == torch.bfloat16


def test_errors_of_caches(run_in_process, tmp_path, options, monkeypatch):
    from datasets_lib.images.image_dataset import ImageDataset

    monkeypatch.setattr(ImageDataset, "captions", lambda self: None)
    with pytest.raises(
        ValueError, match=r"encoder text cannot be cached: the data set does not list the values of column caption; set"
    ):
        run_in_process("run", "text_to_image", **options, **{"text_to_image.cache_text": "memory"})
