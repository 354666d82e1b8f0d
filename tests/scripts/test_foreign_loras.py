"""LoRA files of others: what their headers say never reaches peft unchecked, and nothing broken is merged or exported."""

from __future__ import annotations

import json
import re
import struct

import pytest
import tiny_models
import torch
from limited import run_limited
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from script_calls import run_script

from scripts import convert_lora, merge_lora, sample
from trainers.common.lora import files, header
from trainers.common.lora.header import SETTINGS_KEY
from trainers.common.text_to_image.stable_diffusion import StableDiffusionTrainer
from trainers.sd_lora import LoRATrainer

NAME = "x.safetensors"
EVIL = "(([a-z_0-9.]+)+)+!"  # never ends on a long name
PAIR = {"unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3), "unet.conv_in.lora_B.weight": torch.ones(16, 2, 1, 1)}
DORA = PAIR | {"unet.conv_in.lora_magnitude_vector": torch.ones(1, 16, 1, 1)}


def write(folder, options=None, tensors=PAIR, **about):
    """A LoRA file with these options in its header, as they are or, as a text, instead of JSON."""
    text = options if isinstance(options, str) else json.dumps(options)
    if options is not None:
        about[SETTINGS_KEY] = text
    save_file(tensors, folder / NAME, metadata={"format": "pt"} | about)
    return folder / NAME


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return tiny_models.lora_file(tmp_path_factory.mktemp("good"), r=4, lora_alpha=2)


def changed(good, folder, tensors=None, **options):
    """A good file with other options for the UNet, or other tensors."""
    with safe_open(good, "pt") as opened:
        about = opened.metadata()
    settings = json.loads(about[SETTINGS_KEY]) | {f"unet.{name}": value for name, value in options.items()}
    save_file(load_file(good) | (tensors or {}), folder / NAME, metadata=about | {SETTINGS_KEY: json.dumps(settings)})
    return folder / NAME


# options -------------------------------------------------------------------------------------------------------------

NO_NAME = "is no name of a module (letters, digits, _ and dots; regular expressions are not read)"
ALPHA, RANK = "an alpha must be positive and finite", "a rank must be an integer of at least 1"
REFUSED = [
    ({"unet.rank_pattern": {EVIL: 4}}, NO_NAME),
    ({"unet.alpha_pattern": {".*to_q": 4}}, NO_NAME),
    ({"unet.alpha_pattern": {"a|b": 4}}, NO_NAME),
    ({"unet.alpha_pattern": {"": 4}}, NO_NAME),
    ({"unet.alpha_pattern": {"conv_in\x1b]0;PWN\x07": 4}}, r"'conv_in\x1b]0;PWN\x07' is no name of a module"),
    ({"unet.alpha_pattern": {"ünet": 4}}, NO_NAME),
    ({"unet.alpha_pattern": {"conv_in\n": 4}}, NO_NAME),
    ({"unet.alpha_pattern": ["conv_in"]}, "must be an object of modules and numbers"),
    ({"unet.rank_pattern": None}, "must be an object of modules and numbers"),
    ({"unet.alpha_pattern": {"conv_in": 0}}, ALPHA),
    ({"unet.lora_alpha": float("nan")}, ALPHA),
    ({"unet.lora_alpha": float("inf")}, ALPHA),
    ('{"unet.lora_alpha": 1e999}', ALPHA),
    ('{"unet.lora_alpha": 1' + "0" * 400 + "}", ALPHA),
    ({"unet.lora_alpha": -1}, ALPHA),
    ({"unet.lora_alpha": "8"}, ALPHA),
    ({"unet.lora_alpha": True}, ALPHA),
    ({"unet.lora_alpha": [8]}, ALPHA),
    ({"unet.r": 0}, RANK),
    ({"unet.r": 2.0}, RANK),
    ({"unet.r": "2"}, RANK),
    ({"unet.r": True}, RANK),
    ({"unet.r": 10**9}, "is of rank 2, and its header says 1000000000"),
    ({"unet.rank_pattern": {"conv_in": 3}}, "unet.conv_in: is of rank 2, and its header says 3"),
    ({"unet.use_rslora": "yes"}, "must be true or false"),
    ({"unet.use_dora": 1}, "must be true or false"),
    ({"unet.use_dora": True}, "use_dora = True in its header, and 0 modules are DoRAs"),
    ({"unet.use_qalora": True}, "unet.use_qalora = True in its header changes what the LoRA does"),
    ({"unet.lora_bias": True}, "unet.lora_bias = True in its header changes"),
    ({"unet.bias": "all"}, "unet.bias = all in its header changes"),
    ({"unet.modules_to_save": ["conv_out"]}, "unet.modules_to_save"),
    ({"unet.layer_replication": [[0, 2]]}, "unet.layer_replication"),
    ({"unet.fan_in_fan_out": True}, "unet.fan_in_fan_out"),
    ({"unet.init_lora_weights": "pissa"}, "unet.init_lora_weights = pissa"),
    ({"unet.init_lora_weights": ["pissa"]}, "unet.init_lora_weights = ['pissa']"),
    ({"unet.peft_type": "LOHA"}, "unet.peft_type = LOHA"),
    ({"unet.made_up\x1b[2J": {"a": 1}}, r"unet.made_up\x1b[2J = {'a': 1} in its header changes"),
    ("{", "is no JSON"),
    ("[" * 100_000, "is no JSON"),
    ("[]", "must be a JSON object, found []"),
    ('"text"', "must be a JSON object, found text"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda value: str(value)[:50])
def test_an_option_of_the_header_that_is_refused(tmp_path, options, message):
    file = write(tmp_path, options)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        files.read_lora(file)
    assert str(file) in str(raised.value)
    assert str(raised.value).isprintable()


def test_a_header_with_all_options_at_their_defaults_is_read(tmp_path):
    """As diffusers writes it, and with options that another version of peft has."""
    options = {f"unet.{name}": value for name, value in LoraConfig(r=2, lora_alpha=3).to_dict().items()}
    options |= {"unet.target_modules": ["conv_in"], "unet.peft_type": "LORA", "unet.of_tomorrow": None}
    options |= {"unet.another": False, "unet.third": {}, "unet.fourth": ""}
    options = {name: sorted(value) if isinstance(value, set) else value for name, value in options.items()}
    lora = files.read_lora(write(tmp_path, json.dumps(options, default=str)))
    assert lora.scalings("unet") == {"conv_in": 1.5}


@pytest.mark.parametrize(
    "options",
    [
        {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil_library"}},
        {"megatron_config": {"a": 1}, "megatron_core": "evil_library"},
        {"target_modules": EVIL},
        {"exclude_modules": EVIL},
        {"layers_pattern": EVIL, "layers_to_transform": [0]},
        {"base_model_name_or_path": "../../somewhere", "revision": "x"},
        {"task_type": "EVIL", "loftq_config": {"a": 1}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_never_reach_peft(good, tmp_path, monkeypatch, options):
    """They choose modules, which the tensors show, or belong to training: the file draws as without them."""
    (tmp_path / "evil_library.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    lora, plain = files.read_lora(changed(good, tmp_path, **options)), files.read_lora(good)
    assert lora.settings == plain.settings
    assert set(lora.settings["unet"]) == {*header.READ, "target_modules"}
    assert isinstance(lora.settings["unet"]["target_modules"], list)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("option", ["rank_pattern", "target_modules"])
def test_an_endless_regular_expression_does_not_hang_a_merge(good, tmp_path, option):
    """Today's peft would match it against each name of a module."""
    file = changed(good, tmp_path, **{option: {EVIL: 4} if option == "rank_pattern" else EVIL})
    arguments = tiny_models.model("sd1"), tmp_path / "merged", "--lora", file
    code, said = run_limited(run_script, merge_lora, *arguments, seconds=30)
    assert (code, "Traceback" in said) == (0 if option == "target_modules" else 1, False), said
    assert (NO_NAME in said) == (option == "rank_pattern")


def test_names_and_ends_of_names_choose_an_alpha(tmp_path):
    tensors = {f"unet.{module}.lora_{letter}.weight": torch.ones(2, 2) for letter in "AB" for module in (
        "a.to_q", "b.to_q", "to_q", "xto_q")}  # fmt: skip
    for patterns, wanted in (
        ({"to_q": 4}, {"a.to_q": 2.0, "b.to_q": 2.0, "to_q": 2.0, "xto_q": 1.0}),
        ({"^to_q": 4}, {"a.to_q": 1.0, "b.to_q": 1.0, "to_q": 2.0, "xto_q": 1.0}),
        ({"a.to_q": 6, "to_q": 4}, {"a.to_q": 3.0, "b.to_q": 2.0, "to_q": 2.0, "xto_q": 1.0}),
        ({"to_q": 4, "a.to_q": 6}, {"a.to_q": 2.0, "b.to_q": 2.0, "to_q": 2.0, "xto_q": 1.0}),
    ):
        lora = files.read_lora(write(tmp_path, {"unet.lora_alpha": 2, "unet.alpha_pattern": patterns}, tensors))
        assert lora.scalings("unet") == wanted, patterns


def test_many_patterns_take_no_time(tmp_path):
    tensors = {f"unet.a.m{n}.lora_{letter}.weight": torch.ones(1, 1) for letter in "AB" for n in range(2000)}
    options = {"unet.alpha_pattern": {f"m{n}": 1 + n for n in range(20_000)}}
    code, said = run_limited(files.read_lora, write(tmp_path, options, tensors), seconds=20)
    assert code is not None, "it hangs"
    assert "Traceback" not in said


# tensors -------------------------------------------------------------------------------------------------------------

BROKEN = [
    (PAIR | {"unet.conv_in.lora_A.weight": torch.full((2, 4, 3, 3), float("nan"))}, "numbers that are not finite"),
    (PAIR | {"unet.conv_in.lora_B.weight": torch.full((16, 2, 1, 1), float("-inf")).half()}, "not finite"),
    (DORA | {"unet.conv_in.lora_magnitude_vector": torch.full((1, 16, 1, 1), float("nan"))}, "not finite"),
    (PAIR | {"unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3, dtype=torch.int64)}, "numbers of type int64"),
    (PAIR | {"unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3, dtype=torch.bool)}, "numbers of type bool"),
    (PAIR | {"unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3, dtype=torch.complex64)}, "numbers of type complex64"),
    ({name: value[:0] if "_A" in name else value[:, :0] for name, value in PAIR.items()}, "are none of a LoRA"),
    (PAIR | {"unet.conv_in.lora_A.weight": torch.tensor(1.0)}, "needs lora_A and lora_B (lora_down and lora_up) of one rank"),
    (PAIR | {"unet.conv_in.lora_B.weight": torch.ones(16, 2)}, "needs lora_A and lora_B (lora_down and lora_up) of one rank"),
    (PAIR | {"unet.conv_in.lora_B.weight": torch.ones(16, 2, 3, 3)}, "[16, 2, 3, 3] are none of a LoRA"),
    (DORA | {"unet.conv_in.lora_magnitude_vector": torch.ones(3)}, "lora_magnitude_vector has the shape [3], and lora_B 16 outputs"),
    (DORA | {name.replace("conv_in", "conv_out"): value.clone() for name, value in PAIR.items()}, "1 of 2 modules are DoRAs"),
    (PAIR | {"unet.\x1b]0;PWN\x07.alpha": torch.ones(1)}, r"unet.\x1b]0;PWN\x07 needs lora_A and lora_B"),
    (PAIR | {"unet.\x1b]0;PWN\x07.omega": torch.ones(1)}, r"unet.\x1b]0;PWN\x07.omega is no tensor of a LoRA"),
    ({name.replace("conv_in", "a\nerror: fake"): value for name, value in list(PAIR.items())[:1]}, r"a\nerror: fake"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "message"), BROKEN, ids=lambda value: value[:40] if isinstance(value, str) else "")
def test_tensors_that_are_refused(tmp_path, tensors, message):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        files.read_lora(write(tmp_path, tensors=tensors))
    assert str(raised.value).isprintable()


def test_a_negative_magnitude_is_a_number_like_others(tmp_path):
    assert files.read_lora(write(tmp_path, tensors=DORA | {"unet.conv_in.lora_magnitude_vector": -torch.ones(16)}))


def raw(path, text, data=b""):
    """A safetensors file with any header."""
    text = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(name, *offsets):
    return f'"{name}":{{"dtype":"F32","shape":[1],"data_offsets":{list(offsets)}}}'


@pytest.mark.parametrize(
    "text",
    [
        f"{{{entry('a', 0, 4)},{entry('a', 4, 8)}}}",
        f"{{{entry('a', 0, 4)},{entry('b', 2, 6)}}}",
        f"{{{entry('a', 0, 4_000_000)}}}",
        '{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}',
        '{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,8]}}',
        '{"__metadata__":{"lora_adapter_metadata":{"unet.r":4}}}',
        "[" * 200_000,
        b"\xff\xfe",
    ],
    ids=["twice", "overlapping", "beyond", "2^40", "negative", "no_text", "nested", "no_utf8"],
)
def test_headers_that_lie(tmp_path, text):
    code, said = run_limited(read_or_refuse, raw(tmp_path / NAME, text, bytes(8)), seconds=20)
    assert code == 0, said
    assert "cannot be read as safetensors" in said


def read_or_refuse(file):
    try:
        files.read_lora(file)
    except ValueError as error:
        print(error)
        return 0
    return 1


def test_the_length_of_a_header(tmp_path):
    file = tmp_path / NAME
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", 99 << 20))
        opened.truncate(100 << 20)  # sparse
    with pytest.raises(ValueError, match=r"its header has 103,809,024 bytes, and at most 33,554,432 are read"):
        files.read_lora(file)
    file.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        files.read_lora(file)


def test_a_folder_or_a_pipe_for_a_file(tmp_path):
    import os

    (tmp_path / NAME).mkdir()
    with pytest.raises(FileNotFoundError, match="no file"):
        files.read_lora(tmp_path / NAME)
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert run_limited(read_or_missing, tmp_path / "pipe.safetensors", seconds=10)[0] == 0


def read_or_missing(file):
    try:
        files.read_lora(file)
    except FileNotFoundError:
        return 0
    return 1


# merging and sampling ------------------------------------------------------------------------------------------------


def refused_merge(folder, lora, *options):
    """The message of a merge that must leave nothing behind."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as raised:
        run_script(merge_lora, tiny_models.model("sd1"), folder / "merged", "--lora", lora, *options)
    assert sorted(folder.rglob("*")) == before
    return str(raised.value.code)


def test_nothing_broken_is_merged(good, tmp_path):
    first = next(iter(load_file(good)))
    nan = changed(good, tmp_path, {first: torch.full_like(load_file(good)[first], float("nan"))})
    assert f"{first} holds numbers that are not finite; take a LoRA that is not broken" in refused_merge(tmp_path, nan)
    for value in (float("nan"), float("inf"), -1):
        assert ALPHA in refused_merge(tmp_path, changed(good, tmp_path, lora_alpha=value))
    message = refused_merge(tmp_path, changed(good, tmp_path, lora_alpha=1e300))
    assert re.search(r"unet\..* holds numbers that are not finite; lower the LoRAs' weights", message)
    message = refused_merge(tmp_path, changed(good, tmp_path, lora_alpha=1e8), "--dtype", "float16")
    assert re.search(r"unet\..* holds numbers that are not finite; .*--dtype float32, or check the base", message)
    assert "holds numbers that are not finite" in refused_merge(tmp_path, f"{good}:1e38", "--dtype", "float16")


def test_a_text_encoder_that_the_base_lacks(tmp_path):
    tensors = {f"text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    assert "changes text_encoder_2, and the base has none" in refused_merge(tmp_path, write(tmp_path, tensors=tensors))


def test_modules_with_foreign_names(tmp_path):
    tensors = {name.replace("conv_in", "\x1b[2Jconv"): value for name, value in PAIR.items()}
    message = refused_merge(tmp_path, write(tmp_path, tensors=tensors))
    assert r"changes unet.\x1b[2Jconv [16, 4, 3, 3], which in the base is missing" in message


def test_sampling_takes_what_was_checked(good, tmp_path, monkeypatch):
    """Both readings of a file are the same, so that nobody can exchange it in between; and none is diffusers' own."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Mixin

    monkeypatch.setattr(Mixin, "load_lora_weights", None)
    out = tmp_path / "out"
    options = (
        "--prompt",
        "a cat",
        "--steps",
        "1",
        "--output",
        out,
        "--lora",
        changed(good, tmp_path, target_modules=EVIL),
    )
    run_script(sample, tiny_models.model("sd1"), *options)
    assert list(out.rglob("*.png"))
    with pytest.raises(SystemExit, match=re.escape(NO_NAME)):
        run_script(sample, tiny_models.model("sd1"), *options[:-1], changed(good, tmp_path, alpha_pattern={EVIL: 1}))


@pytest.mark.parametrize("steps", ["many", "-1", "0", "1e3", "1" * 5000, "٣"])
def test_ddim_timesteps_of_a_header(tmp_path, steps):
    with pytest.raises(ValueError, match=r"num_ddim_timesteps = .* in its header must be an integer from 1 to 9999"):
        files.ddim_timesteps(write(tmp_path, num_ddim_timesteps=steps))


def test_a_run_whose_lora_is_broken(good, tmp_path):
    """What scripts load of a finished run of task lora."""
    changed(good, tmp_path, rank_pattern={EVIL: 4}).rename(tmp_path / files.FILE_NAME)
    with pytest.raises(ValueError, match=re.escape(NO_NAME)):
        LoRATrainer.load_pipeline(tmp_path)
    with pytest.raises(
        ValueError, match=r"neither a config.yaml nor the LoRA's header names its base model; give a run's"
    ):
        LoRATrainer.load_pipeline(good.parent)
    assert issubclass(LoRATrainer, StableDiffusionTrainer)


def test_a_run_writes_names_for_a_pattern(tmp_path):
    file = tiny_models.lora_file(tmp_path, target_modules=r".*attn1\.to_(q|k)", exclude_modules=r"down.*")
    lora = files.read_lora(file)
    with safe_open(file, "pt") as opened:
        settings = json.loads(opened.metadata()[SETTINGS_KEY])
    assert settings["unet.target_modules"] == lora.settings["unet"]["target_modules"] == sorted(lora.ranks("unet"))
    assert not any("exclude" in name for name in settings)


# converting ----------------------------------------------------------------------------------------------------------

UP, DOWN = "lora_unet_conv_in.lora_up.weight", "lora_unet_conv_in.lora_down.weight"
KOHYA = {DOWN: torch.ones(2, 4, 3, 3), UP: torch.ones(16, 2, 1, 1)}


def kohya_alpha(value):
    return KOHYA | {"lora_unet_conv_in.alpha": torch.as_tensor(value)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (kohya_alpha(float("nan")), "alpha holds numbers that are not finite"),
        (kohya_alpha(float("inf")), "alpha holds numbers that are not finite"),
        (kohya_alpha(-1.0), "unet.conv_in.alpha is -1.0; one positive number is wanted"),
        (kohya_alpha(0), "unet.conv_in.alpha is 0; one positive number is wanted"),
        (kohya_alpha([1.0, 2.0]), "unet.conv_in.alpha is [2]; one positive number"),
        (kohya_alpha(torch.ones(0)), "unet.conv_in.alpha is []; one positive number"),
        (KOHYA | {UP: torch.full((16, 2, 1, 1), float("nan"))}, "lora_up.weight holds numbers that are not finite"),
        (KOHYA | {DOWN: torch.tensor(1.0)}, "unet.conv_in needs lora_A and lora_B (lora_down and lora_up) of one rank"),
        (
            KOHYA | {DOWN: torch.ones(100_000, 4, 1, 1)},
            "unet.conv_in needs lora_A and lora_B (lora_down and lora_up) of one rank",
        ),
        (KOHYA | {DOWN: torch.ones(0, 4, 1, 1), UP: torch.ones(16, 0, 1, 1)}, "are none of a LoRA"),
        (
            KOHYA | {"lora_unet_conv_in.dora_scale": torch.tensor(1.0)},
            "dora_scale has the shape [], and lora_B 16 outputs; one number for each",
        ),
        (KOHYA | {"lora_unet_\x1b[2J.alpha": torch.ones(1)}, r"lora_unet_\x1b[2J.alpha is no tensor of a LoRA"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_kohya_files_that_are_not_converted(tmp_path, tensors, message):
    file, out = write(tmp_path, tensors=tensors), tmp_path / "out" / "y.safetensors"
    with pytest.raises(SystemExit) as raised:
        run_script(convert_lora, file, out, "--to", "diffusers")
    assert message in str(raised.value.code)
    assert not out.parent.exists()


def test_texts_of_a_kohya_header_are_only_texts(tmp_path):
    texts = {
        "ss_tag_frequency": "{" * 100_000,
        "ss_network_dim": "1e999",
        "ss_network_alpha": "NaN",
        "a\x1b": "\x1b[2J",
    }
    file = write(tmp_path, tensors=kohya_alpha(1), **texts, **{SETTINGS_KEY: "no JSON"})
    run_script(convert_lora, file, tmp_path / "y.safetensors", "--to", "diffusers")
    lora = files.read_lora(tmp_path / "y.safetensors")
    assert lora.scalings("unet") == {"conv_in": 1.0}  # 0.5 is in B
    assert torch.equal(
        lora.tensors["unet"]["conv_in.lora_B.weight"], kohya_alpha(1)["lora_unet_conv_in.lora_up.weight"] / 2
    )
    assert lora.about.items() >= texts.items()


def test_a_link_for_an_output_is_not_followed(good, tmp_path):
    """Nothing appears where it leads."""
    for name in ("y.safetensors", "merged"):
        (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SystemExit, match="y.safetensors: is there already; choose another place, or remove it"):
        run_script(convert_lora, write(tmp_path, tensors=KOHYA), tmp_path / "y.safetensors", "--to", "diffusers")
    assert (tmp_path / "y.safetensors").is_symlink()
    with pytest.raises((SystemExit, OSError)):
        run_script(merge_lora, tiny_models.model("sd1"), tmp_path / "merged", "--lora", good)
    assert not (tmp_path / "elsewhere").exists()


def test_an_alpha_that_the_kohya_format_cannot_hold(tmp_path):
    file, out = write(tmp_path, {"unet.r": 2, "unet.lora_alpha": 1e300}), tmp_path / "out" / "y.safetensors"
    with pytest.raises(SystemExit, match=r"unet.conv_in: its alpha, 1e\+300, is too large for the kohya format"):
        run_script(convert_lora, file, out, "--to", "kohya")
    with pytest.raises(SystemExit, match=r"unet.conv_in: times its scale alpha / rank, 5e\+299, its B is not finite"):
        run_script(convert_lora, file, out, "--to", "diffusers")
    for value in (float("nan"), "8"):
        with pytest.raises(SystemExit, match=ALPHA):
            run_script(convert_lora, write(tmp_path, {"unet.lora_alpha": value}), out, "--to", "kohya")
    assert not list(out.parent.iterdir())
