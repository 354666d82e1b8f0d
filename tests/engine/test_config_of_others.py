"""Config files and command lines as people write them: taken as they are meant, or refused with the reason."""

from __future__ import annotations

import argparse
import json
import os
import threading
from pathlib import Path

import pytest
from test_config import ARTICLE, problems_of, write  # noqa: F401  # the second is a fixture

from datasets_lib.errors import MissingFileError
from trainers.engine.config.config import check_config, load_config
from trainers.engine.config.files import ConfigError
from trainers.inference.command import path_argument, seed

LORA = {
    "base": {"dataset": "digits", "max_train_steps": 2},
    "lora": {"pretrained_model_name_or_path": "somebody/base"},
}


def option(path, override, name=None):
    run = load_config(path, [override])
    section, _, key = (name or override.partition("=")[0]).partition(".")
    return getattr(run.base if section == "base" else run.config, key)


# --- texts of the command line

TYPED = (
    "a #1 cat", "#1", "a: b", "[a, b]", "{a: b}", "12:30", "1e-4", "true", "no", "~", "@home", "*x", "&y", "!z", "%",
    "a, b", 'say "x"', "it's", " two  blanks ", "- item", "? x", "| y", "> z", "'", "`", "0x10", "2026-01-01", "日本 #2",
    "a\tb", "a=b", "\\n",
)  # fmt: skip


@pytest.mark.parametrize("typed", TYPED)
def test_a_text_is_taken_as_it_was_typed(write, typed):  # noqa: F811
    assert option(write(LORA), f"base.trigger_word={typed}") == typed
    assert option(write(LORA), f"base.caption={typed}") == typed


@pytest.mark.parametrize("typed", ['"a #1: cat"', "'a #1: cat'"])
def test_quotes_around_a_whole_text_do_not_belong_to_it(write, typed):  # noqa: F811
    assert option(write(LORA), f"base.trigger_word={typed}") == "a #1: cat"


def test_null_of_an_option_that_may_be_null(write):  # noqa: F811
    document = LORA | {"base": LORA["base"] | {"trigger_word": "x"}}
    assert option(write(document), "base.trigger_word=null") is None
    assert option(write(document), "base.output_dir=null") == "null"  # which may not be null


def test_hashes_in_lists_and_numbers_beside_texts(write):  # noqa: F811
    path = write(LORA)
    assert option(path, "lora.validation_prompts=[a photo #1, 'b, #2']") == ["a photo #1", "b, #2"]
    assert option(path, "base.validation_split=0.5") == 0.5
    assert option(path, "base.validation_split=test #1") == "test #1"
    assert option(path, "base.resume_from_checkpoint=true") is True
    assert option(path, "base.resume_from_checkpoint=checkpoint-5") == "checkpoint-5"
    assert option(path, "lora.learning_rate.unet=1e-3", "lora.learning_rate") == {"unet": 1e-3}
    assert option(path, "base.output_dir=${base.dataset} #1") == "digits #1"


EMPTY = (
    "train_data_dir", "dataset_name", "output_dir", "resume_from_checkpoint", "validation_split", "seed", "valid_steps",
    "caption_column",
)  # fmt: skip


@pytest.mark.parametrize("name", EMPTY)
def test_an_unset_variable_of_the_shell_is_no_choice(write, name):  # noqa: F811
    found = problems_of(write(LORA), f"base.{name}=")
    null = "" if name in ("output_dir", "seed") else "; write null for none"
    assert found.endswith(f"base.{name} = : has no value (an unset variable of the shell?){null}")
    assert found.startswith("1 problem")


@pytest.mark.parametrize("name", ["train_data_dir", "output_dir", "class_data_dir"])
def test_a_blank_folder_in_a_file(write, name):  # noqa: F811
    base = {key: value for key, value in LORA["base"].items() if key != "dataset" or name != "train_data_dir"}
    found = problems_of(write(LORA | {"base": base | {name: " "}}))
    assert f'base.{name} = " ": must not be blank (an unset variable of the shell?)' in found


def test_the_empty_caption_is_a_value(write):  # noqa: F811
    assert option(write(LORA), "base.caption=") == ""
    assert option(write(LORA), "lora.negative_prompt=") == ""


# --- what no file can be called


def test_the_home_folder(write, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HOME", "/somewhere")
    base = LORA["base"] | {
        "encoder_cache_dir": "~/cache",
        "output_dir": "~/run",
        "trigger_word": "~/x",
        "center_crop": True,
    }
    document = {
        "base": base,
        "lora": LORA["lora"] | {"cache_latents": "disk", "pretrained_model_name_or_path": "~/base"},
    }
    run = load_config(write(document))
    assert (run.base.encoder_cache_dir, run.base.output_dir) == ("/somewhere/cache", "/somewhere/run")
    assert (run.config.pretrained_model_name_or_path, run.base.trigger_word) == ("/somewhere/base", "~/x")


LONG = "x" * 300


@pytest.mark.parametrize(
    ("option_of", "value", "reason"),
    [
        ("base.train_data_dir", LONG, "has a name of more than 255 bytes, which no file can have; shorten it"),
        ("base.output_dir", f"a/{LONG}/b", "has a name of more than 255 bytes"),
        ("lora.pretrained_model_name_or_path", LONG, "has a name of more than 255 bytes"),
        ("base.eval_features", LONG, "has a name of more than 255 bytes"),
        ("base.resume_from_checkpoint", LONG, "has a name of more than 255 bytes"),
        ("base.output_dir", "a\0b", "has a null byte, which no name can have; remove it"),
        ("base.output_dir", "a\udcffb", "is not UTF-8 text; type it anew"),
        ("base.caption", "caf\udce9", "is not UTF-8 text; type it anew"),
    ],
)
def test_texts_that_no_file_can_be_called(write, option_of, value, reason):  # noqa: F811
    section, key = option_of.split(".")
    document = json.loads(json.dumps(LORA))
    document["base"] |= {"eval_steps": 5} if key == "eval_features" else {}
    if key == "train_data_dir":
        del document["base"]["dataset"]
    document[section][key] = value
    with pytest.raises(ConfigError) as caught:
        check_config(document)
    assert f"{option_of} = " in str(caught.value)
    assert reason in str(caught.value)


def test_long_texts_of_other_options(write):  # noqa: F811
    targets = "|".join(f".*to_{number}" for number in range(100))
    assert option(write(LORA), f"lora.target_modules={targets}") == targets
    assert option(write(LORA), f"base.caption={LONG}") == LONG


@pytest.mark.parametrize(
    ("text", "message"), [("", "is empty"), (" ", "is empty"), (LONG, "File name too long"), ("a\0", "null")]
)
def test_paths_of_scripts(text, message):
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("place", type=path_argument)
    with pytest.raises(argparse.ArgumentError, match=message):
        parser.parse_args([text])
    assert parser.parse_args(["not/there"]).place == Path("not/there")


@pytest.mark.parametrize("text", ["base", "base.", ".seed=1", "base..seed=1", "seed=1", "--seed=1", "base.seed 1"])
def test_what_is_no_override(write, text):  # noqa: F811
    assert f"{text}: an override reads section.key=value" in problems_of(write(LORA), text)


# --- bounds


@pytest.mark.parametrize(
    ("seed", "fits"), [(2**64 - 1, True), (2**63, True), (2**64, False), (10**26, False), (-1, False)]
)
def test_the_bounds_of_a_seed(write, seed, fits):  # noqa: F811
    if fits:
        assert option(write(LORA), f"base.seed={seed}") == seed
    else:
        assert f"base.seed = {seed}: must be an integer in [0, 18446744073709551615]" in problems_of(
            write(LORA), f"base.seed={seed}"
        )


# --- one problem for one mistake


@pytest.mark.parametrize("value", ["10k", "0", "-1", "2.5", "'2'"])
def test_a_wrong_number_of_steps_is_one_problem(write, value):  # noqa: F811
    found = problems_of(write(LORA), f"base.max_train_steps={value}")
    assert found.startswith("1 problem")
    assert "base.max_train_steps = " in found


def test_a_rule_on_a_wrong_option_is_not_told(write):  # noqa: F811
    found = problems_of(write(LORA), "base.streaming=perhaps", "base.shard_retries=5")
    assert found.startswith("1 problem")
    both = problems_of(write(LORA), "base.shard_retries=5", "base.seed=x")
    assert both.startswith("2 problems")


# --- the environment

HINT = "environment variables are not read, as a config is written to the run's folder; write the value"


@pytest.mark.parametrize("text", ["$HOME/x", "${HOME}/x", "${oc.env:HOME}/x", "a/$USER", "$HOME"])
def test_variables_of_the_environment_are_refused_by_one_rule(write, text):  # noqa: F811
    document = LORA | {"base": LORA["base"] | {"output_dir": text}}
    assert HINT in problems_of(write(document))
    assert HINT in problems_of(write(document, "config.yaml"))


@pytest.mark.parametrize("text", ["costs $5", "a $dollar sign", "$ign", "cash$"])
def test_a_caption_may_have_dollars(write, text):  # noqa: F811
    document = LORA | {"base": LORA["base"] | {"caption": text, "trigger_word": text}}
    assert load_config(write(document)).base.caption == text


# --- files


def test_a_mark_at_the_beginning_of_a_json(write, tmp_path):  # noqa: F811
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(LORA).encode())
    assert load_config(tmp_path / "config.json").task == "lora"


@pytest.mark.parametrize("name", ["config.JSON", "config.YAML", "config.yml"])
def test_endings_in_any_case(write, name):  # noqa: F811
    assert load_config(write(json.dumps(LORA), name)).task == "lora"


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("c.jsonc", "; write it without comments as .json, or as .yaml"),
        ("c.toml", "; scripts/import_config.py makes a config of one of kohya's"),
        ("c.py", "; a config is data, not a program"),
        ("c.txt", ""),
        ("c.yaml.bak", ""),
    ],
)
def test_other_endings_are_refused(write, name, advice):  # noqa: F811
    assert problems_of(write("base: {}", name)).endswith(f"a config's name ends in .json, .yaml, .yml{advice}")


def test_a_folder_in_the_place_of_a_config(write, tmp_path):  # noqa: F811
    write(LORA)
    assert f"{tmp_path} is a folder; give a config file (in it: config.json)" in problems_of(tmp_path)


def test_a_pipe_is_read(tmp_path):
    """As the shell's <(command) gives it: of no size, and without an ending."""
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("base: {dataset: digits}\nddpm: {}\n"))
    writer.start()
    assert "exactly one of num_epochs and max_train_steps" in problems_of(tmp_path / "pipe")
    writer.join()


def test_a_config_in_another_encoding(write, tmp_path):  # noqa: F811
    (tmp_path / "config.json").write_bytes(json.dumps(LORA).encode("utf-16"))
    assert "is not UTF-8 text" in problems_of(tmp_path / "config.json")


def test_a_missing_config_is_told_in_full(tmp_path):
    with pytest.raises(MissingFileError, match=r"config file .*none.json does not exist .*see configs/ for examples"):
        load_config(tmp_path / "none.json")


def test_a_text_that_yaml_reads_as_a_number(write):  # noqa: F811
    found = problems_of(
        write("base: {run_name: 12:30, dataset: digits, max_train_steps: 2, logger: wandb}\nddpm: {}", "c.yaml")
    )
    assert (
        "base.run_name = 750: must be text, or null; a text that reads like a number or word of YAML needs quotes"
        in found
    )


@pytest.mark.parametrize(
    ("name", "meant"), [("SEED", "seed"), ("Output_Dir", "output_dir"), ("TRAIN_BATCH_SIZE", "train_batch_size")]
)
def test_the_nearest_name_whatever_the_case(write, name, meant):  # noqa: F811
    assert f"unknown option; did you mean base.{meant}?" in problems_of(write(LORA), f"base.{name}=1")


def test_the_article_still_loads(write):  # noqa: F811
    assert load_config(write(ARTICLE)).base.caption is None


@pytest.mark.parametrize("text", ["-1", str(2**64), "1e3", "x"])
def test_seeds_of_scripts_have_the_same_bounds(text):
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--seed", type=seed)
    with pytest.raises(argparse.ArgumentError, match=r"must be from 0 to 18446744073709551615|invalid seed value"):
        parser.parse_args([f"--seed={text}"])
    assert parser.parse_args([f"--seed={2**64 - 1}"]).seed == 2**64 - 1
