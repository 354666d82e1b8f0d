"""Pictures and folders that somebody sent: --again runs no code that they name, and scripts delete and replace only what they drew."""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib

import pytest
from foreign_runs import NAME, evil_copy
from PIL import Image
from repository import tiny
from script_calls import run_script

from scripts import evaluate, make_class_images, sample
from train import train
from trainers.engine.config.config import load_config
from trainers.inference.picture_files import MARK, read_settings, save_picture

CODE = f"{NAME}:T"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures") / "run"
    return train(load_config(tiny("conditional_ddpm"), [f"base.output_dir={folder}", "base.max_train_steps=2"]))


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    with evil_copy(trained, tmp_path, monkeypatch) as folder:
        yield folder


@pytest.fixture
def picture(run, tmp_path):
    """A picture drawn by scripts/sample.py; forge(**settings) changes what it says."""
    run_script(sample, run, "--number", 2, "--steps", 2, "--output-dir", tmp_path / "out")
    path = tmp_path / "out" / "samples.png"
    assert path.is_file()
    return path


def forge(path, **changed):
    settings = read_settings(path)
    for name, value in changed.items():
        settings[name] = settings[name] | value if isinstance(value, dict) else value
    save_picture(Image.open(path), path, settings)


def words(picture, *more):
    return [*read_settings(picture)["command"], *more]


@pytest.mark.parametrize(
    "word",
    [f"[base].trainer_class={CODE}", f"base.trainer_class={CODE}", f"base.dataset={CODE}", f"[base][dataset]={CODE}",
     "base.trainer_class=${base.run_name}", f"base.run_name={CODE}", f"base.sampler={CODE}", "--number=" + "9" * 400, "base.train_data_dir=/", "conditional_ddpm.vae=/x",
     "base.dataset_args={a: 1}", f"base={{trainer_class: '{CODE}'}}", "conditional_ddpm.model_config=/etc/passwd",
     "base.output_dir=/tmp/x", "--trust-code", "--number=100001", "--steps=1e9", "--steps=nan", "--batch-size=100000", "--again=x.png", "--unknown"],
)  # fmt: skip
def test_words_that_could_name_code_or_files_are_refused(picture, word):
    forge(picture, command=words(picture, word))
    with pytest.raises(SystemExit, match="its command (sets .*, which --again does not|cannot be read)"):
        run_script(sample, "--again", picture)


@pytest.mark.parametrize(
    "word", ["conditional_ddpm.guidance_scale=1.5", "conditional_ddpm.sampler=ddim", "base.train_batch_size=2"]
)
def test_words_that_set_numbers_are_drawn(run, tmp_path, word, capsys):
    run_script(sample, run, word, "--number", 2, "--steps", 2, "--output-dir", tmp_path / "out")
    run_script(sample, "--again", tmp_path / "out" / "samples.png")
    assert "the same pixels" in capsys.readouterr().out


def test_a_run_that_names_code_is_not_trusted_by_a_picture(run, picture, tmp_path):
    """The words are plain, and the run that they lead to is not."""
    text = (run / "config.yaml").read_text().replace("  trainer_class: null", f"  trainer_class: {CODE}")
    (tmp_path / "pipeline").mkdir()
    for name in ("unet", "scheduler", "model_index.json"):
        (run / name).rename(tmp_path / "pipeline" / name)
    (tmp_path / "pipeline" / "config.yaml").write_text(text)
    forge(picture, pinned={"path": str(tmp_path / "pipeline")}, files={})
    with pytest.raises(SystemExit, match="names code that is not diffloop's"):
        run_script(sample, "--again", picture)


@pytest.mark.parametrize(
    "changed",
    [{"threads": 10**8}, {"threads": True}, {"threads": "2"}, {"files": []}, {"versions": None}, {"file": "../x.png"},
     {"file": "/x.png"}, {"command": []}, {"command": ["sample", 3]}, {"command": ["os", "x"]}, {"pinned": {"path": 3}},
     {"pinned": {"only": "1"}}, {"pinned": {"overrides": [f"base.trainer_class={CODE}"]}}, {"device": 1},
     {"command": ["morph", "a", "b", "c"]}],
    ids=str,
)  # fmt: skip
def test_settings_that_no_script_wrote(picture, changed):
    forge(picture, **changed)
    with pytest.raises(SystemExit, match="has other settings than those of this version's"):
        run_script(sample, "--again", picture)


MORPH = {"lora_a": "a", "lora_b": "b", "weights": [0.0], "seed": None, "config": None, "overrides": []}
STYLE = {"pictures": ["a.png"], "names": ["a"], "only": 0}


@pytest.mark.parametrize(
    ("script", "pinned"),
    [("morph", MORPH | {"config": "evil.yaml"}), ("morph", MORPH | {"lora_a": None}), ("morph", MORPH | {"weights": ["0"]}),
     ("morph", MORPH | {"overrides": ["base.trainer_class=x:T"]}), ("style_transfer", STYLE | {"names": ["../a"]}),
     ("style_transfer", STYLE | {"names": ["/a"]}), ("style_transfer", STYLE | {"pictures": "a.png"})],
)  # fmt: skip
def test_pinned_arguments_that_no_script_wrote(picture, script, pinned):
    """A configuration of a morph's training could name code, and a name could lead out of the folder."""
    settings = read_settings(picture) | {"command": [script, "x"], "pinned": pinned}
    save_picture(Image.open(picture), picture, settings)
    with pytest.raises(SystemExit, match="has other settings than those of this version's"):
        run_script(sample, "--again", picture)


@pytest.mark.parametrize("name", ["/proc/kmsg", "/dev/zero", "/proc/../proc/kcore"])
def test_files_of_the_kernel_are_not_hashed(picture, name):
    forge(picture, files={name: "0" * 64})
    with pytest.raises(SystemExit, match="has other settings than those"):
        run_script(sample, "--again", picture)


def test_a_picture_that_claims_to_be_huge(tmp_path):
    data = bytearray(b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", 60_000, 60_000, 8, 2, 0, 0, 0))
    data += struct.pack(">I", zlib.crc32(bytes(data[12:])))
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(SystemExit, match="does not say how it was made"):
        run_script(sample, "--again", tmp_path / "a.png")


def test_a_picture_of_pipes_and_devices_does_not_hang(picture, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    forge(picture, files={str(tmp_path / "pipe"): "0" * 64})
    with pytest.raises(SystemExit, match="pipe, which is not there"):
        run_script(sample, "--again", picture)
    with pytest.raises(SystemExit, match="there is no such picture"):
        run_script(sample, "--again", tmp_path / "pipe")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 50_000, "null", "[]", "9" * 6_000])
def test_a_text_that_is_no_settings(tmp_path, text):
    from PIL import PngImagePlugin

    chunk = PngImagePlugin.PngInfo()
    chunk.add_text("diffloop", text)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=chunk)
    with pytest.raises(SystemExit, match="does not say how it was made"):
        run_script(sample, "--again", tmp_path / "a.png")


def test_a_picture_in_another_format_is_not_opened(tmp_path):
    """An EPS would be handed to a PostScript interpreter."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n")
    with pytest.raises(SystemExit, match="does not say how it was made"):
        run_script(sample, "--again", tmp_path / "a.png")


@pytest.mark.parametrize("name", ["samples-again.png", "samples-again.json"])
@pytest.mark.parametrize("link", [False, True])
def test_again_replaces_only_what_it_drew(picture, tmp_path, name, link, capsys):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    place = picture.with_name(name)
    place.symlink_to(victim) if link else place.write_text("mine")
    with pytest.raises(SystemExit, match=f"{name}: exists, and was not drawn by --again; move it away"):
        run_script(sample, "--again", picture)
    assert place.read_text() == victim.read_text() == "mine"
    place.unlink()
    for _ in range(2):  # its own picture is replaced
        run_script(sample, "--again", picture)
    assert capsys.readouterr().out.count("the same pixels") == 2


# --- folders


@pytest.mark.parametrize("names", [["link/a.txt"], ["link/sub/c.txt"], ["a.txt"]])
def test_nothing_is_deleted_through_a_link(run, tmp_path, names):
    """A folder that says that it drew what its link leads to."""
    victim = tmp_path / "victim"
    (victim / "sub").mkdir(parents=True)
    for name in ("a.txt", "sub/c.txt"):
        (victim / name).write_text("mine")
    folder = run / "samples" / "seed-0"
    folder.mkdir()
    (folder / "link").symlink_to(victim)
    (folder / MARK).write_text(json.dumps({"drawn": names}))
    with pytest.raises(SystemExit, match="holds the link .*link; remove it, or choose a new folder"):
        run_script(sample, run, "--number", 2, "--steps", 2)
    assert sorted(path.name for path in victim.rglob("*.txt")) == ["a.txt", "c.txt"]


@pytest.mark.parametrize("name", ["samples", "samples/seed-0"])
def test_pictures_are_not_drawn_into_a_link(run, tmp_path, name):
    victim = tmp_path / "victim"
    victim.mkdir()
    shutil.rmtree(run / name, ignore_errors=True)
    (run / name).symlink_to(victim)
    with pytest.raises(SystemExit, match=f"{name}: is a link, and pictures are written into real folders; remove it"):
        run_script(sample, run, "--number", 2, "--steps", 2)
    assert not list(victim.iterdir())


@pytest.mark.parametrize("mark", ["[]", '{"drawn": 3}', '{"drawn": [3]}', "{", '{"drawn": ["../x", "/x", "sub"]}'])
def test_a_mark_that_no_script_wrote(run, tmp_path, mark):
    folder = run / "samples" / "seed-0"
    (folder / "sub").mkdir(parents=True)
    (folder / MARK).write_text(mark)
    (run / "samples" / "x").write_text("mine")
    if mark.endswith('"sub"]}'):
        run_script(sample, run, "--number", 2, "--steps", 2)
    else:
        with pytest.raises(SystemExit, match="holds other files; choose a new folder"):
            run_script(sample, run, "--number", 2, "--steps", 2)
    assert (run / "samples" / "x").read_text() == "mine"
    assert (folder / "sub").is_dir()


@pytest.mark.parametrize("name", ["metrics.json", "nearest.png"])
def test_an_evaluation_replaces_a_link_and_not_what_it_leads_to(run, tmp_path, name):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (run / "evaluation").mkdir()
    (run / "evaluation" / name).symlink_to(victim)
    run_script(evaluate, run, "--features", "none", "--number", 5, "--steps", 2)
    assert victim.read_text() == "mine"
    shutil.rmtree(run / "evaluation")
    (run / "evaluation").symlink_to(tmp_path)
    with pytest.raises(SystemExit, match="evaluation: is a link"):
        run_script(evaluate, run, "--features", "none", "--number", 5, "--steps", 2)


def test_settings_of_class_pictures_that_are_none(tmp_path):
    folder = tmp_path / "class"
    folder.mkdir()
    (folder / make_class_images.SETTINGS).write_text("[]")
    arguments = ["nowhere/base", "a cat", folder, "--number", 2]
    with pytest.raises(SystemExit, match="holds no settings of an earlier call; choose a new folder"):
        run_script(make_class_images, *arguments)
