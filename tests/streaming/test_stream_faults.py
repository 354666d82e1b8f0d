"""Streams that cannot be had as asked for, shards that cannot be read, and what is said of it."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from types import SimpleNamespace

import pytest
from marks import slow
from processes import start
from run_folders import final_state, forget_after, losses
from script_calls import run_script
from shard_files import broken, png, write_shards, write_tar
from streams import COUNT, SIZES, base_of, number_of, numbers, run_options, stream_of

import datasets_lib
from datasets_lib.streaming import reader as stream_reader
from datasets_lib.streaming import rows as shard_rows
from datasets_lib.streaming.example_reader import ShuffleBuffer
from datasets_lib.streaming.reader import StreamReader
from datasets_lib.streaming.stream import Stream
from scripts import inspect_data
from train import main, train
from trainers.engine.config.config import load_config
from trainers.engine.data import batches
from trainers.engine.optim.nonfinite import NonFiniteSteps


@pytest.fixture
def error_of(tiny_config, capsys):
    """error_of(**options) -> what the command says of a run that it refuses."""

    def run(*arguments, task="ddpm", **values):
        assert main([str(tiny_config(task, **values)), *arguments]) in (1, 2)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return captured.err

    return run


# --- what cannot be had

PROBLEMS = {
    "base.num_epochs": (2, "a stream's examples are not counted; set max_train_steps"),
    "base.valid_epochs": (1, "a stream's examples are not counted; set valid_steps"),
    "base.save_model_epochs": (1, "a stream's examples are not counted; set save_model_steps"),
    "base.max_train_samples": (9, "a stream has no random subset; give it fewer shards"),
    "base.buckets": (True, "a stream's pictures come as they are"),
    "base.eval_steps": (5, "compares with the training set's pictures; measure with scripts/evaluate.py"),
    "base.validation_split": (0.1, "must name a sub-folder or a split: no fraction can be held out"),
    "base.image_cache_mb": (100, "has no effect with streaming: true"),
}


@pytest.mark.parametrize("option", PROBLEMS)
def test_what_a_stream_cannot_have_is_a_problem_of_the_configuration(option, error_of, tmp_path):
    value, reason = PROBLEMS[option]
    length = {"base.max_train_steps": None} if option == "base.num_epochs" else {}
    text = error_of(**run_options(tmp_path) | {option: value} | length)
    assert f"{option} = {json.dumps(value)}:" in text
    assert reason in text


def test_problems_with_other_tasks_and_sources(error_of, tmp_path):
    text = error_of(**run_options(tmp_path) | {"base.dataset": "digits", "base.train_data_dir": None})
    assert 'base.dataset = "digits": with streaming: true a stream is read from train_data_dir or dataset_name' in text
    text = error_of(task="lora", **{
        "base.streaming": True, "base.dataset": None, "base.max_train_samples": None, "base.train_data_dir": str(tmp_path),
        "base.center_crop": True, "base.class_data_dir": str(tmp_path), "base.class_caption": "a dog",
        "lora.cache_latents": "memory", "lora.cache_text": "memory",
    })  # fmt: skip
    assert "base.class_data_dir" in text
    assert "with streaming: true a stream cannot be paired with pictures of a class" in text
    for option in ("cache_latents", "cache_text"):
        assert f'lora.{option} = "memory": keeps what is known before the first step, and with base.streaming' in text


def test_options_of_streams_need_one(error_of):
    text = error_of(**{"base.shuffle_buffer_size": 5, "base.shard_retries": 1})
    assert "base.shuffle_buffer_size = 5: has an effect with streaming: true only" in text
    assert "base.shard_retries = 1: has an effect with streaming: true only" in text
    text = error_of(**{"base.shuffle_buffer_resume": "reshuffle"})
    assert 'base.shuffle_buffer_resume = "reshuffle": has an effect with shuffle_buffer_size only' in text


def test_sources_that_are_no_stream(tmp_path):
    def fails(kind, message, folder=tmp_path, **changed):
        with pytest.raises(kind, match=message):
            stream_of(folder, **changed)

    fails(
        FileNotFoundError,
        "base.train_data_dir: there is no folder .*/nothing; with base.streaming give",
        tmp_path / "nothing",
    )
    (tmp_path / "a.png").write_bytes(png(1))
    fails(ValueError, r"there are no .parquet or .tar files in .*, and base.streaming: true reads such shards; check")
    (tmp_path / "outside.tar").write_bytes(b"")
    inside = tmp_path / "in"
    inside.mkdir()
    (inside / "link.tar").symlink_to(tmp_path / "outside.tar")
    fails(ValueError, "leads out of", inside)
    (inside / "link.tar").unlink()
    write_tar(inside / "a.tar", {"x.png": png(1)})
    fails(ValueError, "base.validation_split .* is 'held'; it must be one of:", inside, validation_split="held")
    (inside / ".settings.json").write_text("{}")
    fails(ValueError, "scripts/shard.py has not finished it; run it again with the same options", inside)
    (inside / "index.json").write_text('{"format": 99}')
    fails(ValueError, "index.json: written by another version of diffloop; make the shards again", inside)


def test_what_needs_numbers_says_so(tmp_path):
    stream = stream_of(write_shards(tmp_path, "tar", [2]))
    with pytest.raises(ValueError, match="base.streaming = true: the examples of .* are not counted, and this needs"):
        len(stream)
    with pytest.raises(ValueError, match="base.streaming = true: the examples of .* have no numbers, and this asks"):
        stream.get(0, None)


def test_validation_is_a_folder_of_shards_in_memory(tmp_path, run_in_process, capsys):
    folder = write_shards(tmp_path / "shards", "tar", SIZES)
    write_shards(folder / "held", "parquet", (3, 2))
    base = base_of(folder, validation_split="held")
    assert sorted(number_of(Stream.first_example(datasets_lib.build(base, "train"))) for _ in range(2))
    assert len(datasets_lib.build(base, "train").shards) == len(SIZES)
    held = datasets_lib.build(base, "validation")
    assert sorted(number_of(held.get(index, None)) for index in range(len(held))) == [0, 1, 2, 3, 4]
    assert held.highest_label == 4
    assert held.name(0) in ("row 0 of shard-000.parquet", "row 0 of shard-001.parquet")
    run_in_process(**run_options(folder), **{"base.validation_split": "held", "base.valid_steps": 3})
    assert "a stream of 5 shards; its epochs are not counted" in capsys.readouterr().out


def test_a_task_that_measures_its_training_set_trains_from_a_stream(tmp_path, run_in_process):
    folder = write_shards(tmp_path / "shards", "tar", SIZES)
    run = run_in_process(task="vae", **{**run_options(folder), "base.resolution": 16})
    assert json.loads((run / "config.json").read_text())["scaling_factor"] != 0.18215


@pytest.mark.parametrize("task", ["text_to_image", "conditional_ddpm"])
def test_tasks_with_texts_or_classes_train_from_a_stream(tmp_path, tiny_config, task, capsys):
    folder = write_shards(tmp_path / "shards", "tar", SIZES)
    size = json.loads(tiny_config(task).read_text())["base"]
    own = {f"base.{name}": size[name] for name in ("resolution", "channels") if name in size}
    if task == "conditional_ddpm":
        assert main([str(tiny_config(task, **run_options(folder) | own))]) == 1
        assert "classes" in capsys.readouterr().err
        own["conditional_ddpm.num_classes"] = 9  # as many as the label that says "no class"
        assert main([str(tiny_config(task, "few", **run_options(folder) | own))]) == 1
        assert "has the label 9 in column 'label', and there are 9 classes, numbered" in capsys.readouterr().err
        own["conditional_ddpm.num_classes"] = 10
    own["base.caption"] = ""
    run = train(load_config(tiny_config(task, **run_options(folder) | own)))
    assert len(losses(run)) == json.loads(tiny_config(task).read_text())["base"]["max_train_steps"]


@pytest.mark.parametrize("folder", ["tar", slow("parquet")], indirect=True)
def test_a_dry_run_of_a_stream(folder, tiny_config, capsys):
    path = tiny_config(**run_options(folder, **{"base.dataloader_num_workers": 2}))
    assert main([str(path), "--dry-run"]) == 0
    assert "It fits." in capsys.readouterr().out


def test_a_diverged_stream_is_not_sent_to_a_script_that_needs_numbers(folder, tiny_config, capsys, monkeypatch):
    monkeypatch.setattr(NonFiniteSteps, "poison_if_nonfinite", lambda self, loss: loss * math.nan)
    path = tiny_config(**run_options(folder, **{"base.max_skipped_steps": 2}))
    assert main([str(path)]) == 1
    error = capsys.readouterr().err
    assert "not finite in 2 steps in a row, up to step 2" in error
    assert "replay.py" not in error


def test_inspecting_a_stream(folder, tmp_path, capsys):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "base": {"train_data_dir": str(folder), "streaming": True, "channels": 1, "max_train_steps": 1},
                "ddpm": {},
            }
        )
    )
    run_script(inspect_data, tmp_path / "config.json", "--output", tmp_path / "sheet.png")
    out = capsys.readouterr().out
    assert f"examples       {COUNT}" in out
    assert "a stream of 5 shards" in out
    assert (tmp_path / "sheet.png").is_file()


# --- shards that cannot be read


def test_a_broken_shard_is_tried_again_then_skipped_and_counted(folder, capsys, monkeypatch):
    path = broken(folder, 1)
    waits = []
    monkeypatch.setattr(stream_reader.time, "sleep", waits.append)
    stream = stream_of(folder, shard_retries=2)
    reader = stream.open_reader(0, None)
    seen = []
    for _ in range(2 * COUNT):
        seen.append(number_of(reader.next(None)))
        if reader.position()["lost_shards"] == 2:
            break
    of_broken = set(range(SIZES[0], SIZES[0] + SIZES[1]))
    others = set(range(COUNT)) - of_broken
    assert set(seen[: len(others)]) - of_broken <= others
    assert others <= set(seen)
    assert not of_broken <= set(seen)
    assert reader.position()["lost_shards"] == 2  # once in each epoch
    assert waits == [stream_reader.RETRY_SECONDS, 2 * stream_reader.RETRY_SECONDS] * 2
    out = capsys.readouterr().out
    assert out.count(f"WARNING: {path.name}: ") == 2
    whole = "as a whole" if path.suffix == ".parquet" else "from byte "
    assert f": the shard is skipped {whole}" in out


def test_a_shard_that_is_there_again_loses_nothing(folder, monkeypatch, capsys):
    """A fault that passes: the row where it happened is read once."""
    original, failures = shard_rows.read_rows, iter([True, False, True, True] + 100 * [False])

    def failing(shard, place, columns):
        for count, row in enumerate(original(shard, place, columns)):
            if count == 2 and next(failures):
                raise OSError("the disk is away")
            yield row

    monkeypatch.setattr(stream_reader, "read_rows", failing)
    assert sorted(numbers(stream_of(folder).open_reader(0, None), COUNT)) == list(range(COUNT))
    assert "WARNING" not in capsys.readouterr().out


def test_all_shards_broken(folder):
    stream = stream_of(folder)
    reader = stream.open_reader(0, None)
    for number in range(len(SIZES)):
        broken(folder, number, keep=0)
    with pytest.raises(ValueError, match="none of the 5 shards of reader 0 of .* gave an example; shard-00"):
        numbers(reader, 2 * COUNT)
    with pytest.raises(ValueError, match="none of the first 5 shards of .* can be read; the last: shard-004"):
        stream_of(folder)


def test_the_first_shard_may_be_broken(folder):
    broken(folder, 0, keep=0)
    assert len(set(numbers(stream_of(folder).open_reader(0, None), COUNT))) == COUNT - SIZES[0]


def test_broken_pictures_are_passed_over_and_counted(tmp_path, capsys):
    members = {f"{n:03}.png": b"nothing" if n % 20 == 7 else png(n) for n in range(100)}
    write_tar(tmp_path / "a.tar", members)
    reader = stream_of(tmp_path, bad_images="skip").open_reader(0, None)
    seen = [round((reader.next(None)["image"].mean().item() + 1) * 127.5) for _ in range(95)]
    assert seen == [n for n in range(100) if n % 20 != 7]
    assert reader.position()["bad_images"] == 5
    assert "WARNING: cannot use image 007 of a.tar: it is empty or in no known image format" in capsys.readouterr().out
    write_tar(tmp_path / "a.tar", {f"{n:03}.png": png(n) if n == 0 else b"nothing" for n in range(30)})
    reader = stream_of(tmp_path, bad_images="skip").open_reader(0, None)
    reader.next(None)
    with pytest.raises(ValueError, match="11 of 12 images cannot be read, and base.bad_images=skip allows 10 % at"):
        reader.next(None)


def test_the_end_of_a_run_says_what_was_passed_over(tmp_path, run_in_process, capsys):
    folder = write_shards(tmp_path / "shards", "tar", SIZES)
    broken(folder, 2)
    run_in_process(**run_options(folder), **{"base.dataloader_num_workers": 1, "base.train_batch_size": 8})
    out = capsys.readouterr().out
    assert "NOTE: skipped as unreadable: 0 images, and the remainder of 2 shards" in out


def test_validation_examples_are_read_as_a_whole(tmp_path):
    """Every process reads its own, and each must have as many."""
    folder = write_shards(tmp_path / "shards", "tar", SIZES)
    write_shards(folder / "held", "tar", (3, 2))
    broken(folder / "held", 1)
    with pytest.raises(ValueError, match="held: these shards are read as a whole; mend or remove shard-001.tar: "):
        datasets_lib.build(base_of(folder, validation_split="held"), "validation")


def test_processes_that_see_other_shards(folder, monkeypatch):
    stream, accelerator = stream_of(folder), SimpleNamespace(process_index=0, num_processes=2)
    monkeypatch.setattr(batches, "gather_object", lambda mine: [*mine, "another"])
    with pytest.raises(
        ValueError, match="the processes see 2 different lists of shards of .*; give each the same files"
    ):
        batches.shard_for_rank(accelerator, base_of(folder), stream)


def test_messages_of_workers_end_the_run_without_a_traceback(tmp_path, error_of):
    folder = write_shards(tmp_path / "shards", "tar", SIZES)
    write_tar(folder / "z.tar", {"x.png": png(1)})
    text = error_of(**run_options(folder), **{"base.dataloader_num_workers": 2, "base.train_batch_size": 20})
    assert "x of z.tar, column 'text' (base.caption_column), has no caption" in text


def test_data_workers_that_are_killed(tmp_path):
    """As of data that is indexed: the step is finished by this process, from the places where the workers were."""
    folder, options = write_shards(tmp_path / "shards", "tar", SIZES), ["base.random_flip=true", "base.resolution=24"]
    options += ["base.streaming=true", f"base.train_data_dir={folder}", "base.max_train_samples=null"]
    options += ["base.dataloader_num_workers=2"]
    arguments = ["configs/tests/ddpm.json", *options, f"base.output_dir={tmp_path}/run"]
    process = start(*arguments, faults={"kill_workers_at": 2}, out=tmp_path / "log")
    assert process.wait(300) == 1
    text = (tmp_path / "log").read_text()
    assert "Traceback" not in text
    assert "a data worker of process 0 died (pid " in text
    assert main([*arguments, "base.resume_from_checkpoint=latest"]) == 0
    assert main(["configs/tests/ddpm.json", *options, f"base.output_dir={tmp_path}/whole"]) == 0
    assert final_state(tmp_path / "run") == final_state(tmp_path / "whole")


# --- going on with something else


@pytest.fixture
def begun(tmp_path, tiny_config):
    """A run with a shuffle buffer and 2 workers that was left at step 4."""
    folder = write_shards(tmp_path / "shards", "tar", SIZES)
    options = run_options(
        folder, **{"base.dataloader_num_workers": 2, "base.shuffle_buffer_size": 3, "base.checkpointing_steps": 2}
    )
    forget_after(train(load_config(tiny_config("ddpm", "run", **options))), 4)
    return {**options, "base.resume_from_checkpoint": "latest"}


def test_other_readers_are_refused_or_begin_an_epoch(begun, tiny_config, capsys):
    capsys.readouterr()
    fewer = {**begun, "base.dataloader_num_workers": 0}
    assert main([str(tiny_config("ddpm", "run", **fewer))]) == 1
    text = "readers of the stream: 1 processes with 2 -> 1 processes with 1; they would all begin the next epoch, and leave"
    assert text in capsys.readouterr().err
    run = train(load_config(tiny_config("ddpm", "run", **fewer, **{"base.allow_changes": ["dataloader_num_workers"]})))
    out = capsys.readouterr().out
    assert text in out
    assert "(how many examples those shards hold is not known) (allowed)" in out
    assert "stream: all readers begin epoch 1: " in out
    [part] = json.loads((run / "checkpoint-6" / "state.json").read_text())["stream"]
    assert [reader["place"][0] for reader in part["readers"]] == [1]


def test_a_buffer_is_read_again_or_left_out_and_that_is_said(begun, tiny_config, capsys):
    state = json.loads(
        (tiny_config("ddpm", "run", **begun).with_suffix("") / "checkpoint-4" / "state.json").read_text()
    )
    buffers = [reader["buffer"] for reader in state["stream"][0]["readers"]]
    run = tiny_config("ddpm", "run", **begun).with_suffix("")
    shutil.copytree(run, run.with_name("other"))
    capsys.readouterr()
    train(load_config(tiny_config("ddpm", "run", **begun)))
    rows = sum(buffer["rows"] for buffer in buffers)
    said = rf"stream: {rows} examples are read again for the shuffle buffers, about \d+\.\d s"  # a busy machine's, too
    assert re.search(said, capsys.readouterr().out)
    other = tiny_config("ddpm", "other", **begun, **{"base.shuffle_buffer_resume": "reshuffle"})
    train(load_config(other))
    text = "stream: the shuffle buffers begin empty: 4 examples that were read and not trained on are left out of this"
    assert text in capsys.readouterr().out
    assert losses(run) != losses(run.with_name("other"))


def test_a_reshuffled_buffer_repeats_nothing(tmp_path):
    folder = write_shards(tmp_path, "tar", SIZES)
    stream = stream_of(folder, shuffle_buffer_size=5, shuffle_buffer_resume="reshuffle")
    reader = stream.open_reader(0, None)
    before = numbers(reader, 12)
    position = json.loads(json.dumps(reader.position()))
    after = numbers(stream.open_reader(0, position), COUNT - 12 - 4 - 4)  # 4 are left out, and the last 4 wait
    assert not set(before) & set(after)
    assert len(set(before) | set(after)) == COUNT - 8


@pytest.mark.parametrize("then", ["broken", "whole"])
def test_a_buffer_that_reads_otherwise_begins_empty(tmp_path, monkeypatch, capsys, then):
    """A shard can break, or be there again, between a checkpoint and the run that goes on from it."""
    folder = write_shards(tmp_path, "tar", [6] * 4)
    stream = stream_of(folder, shuffle_buffer_size=5, shard_retries=0)
    original, second = stream_reader.read_rows, stream.order.of_epoch(0)[1].name

    def failing(shard, place, columns):
        for count, row in enumerate(original(shard, place, columns)):
            if shard.name == second and count == 2:
                raise OSError("the disk is away")
            yield row

    monkeypatch.setattr(stream_reader, "read_rows", original if then == "broken" else failing)
    reader = stream.open_reader(0, None)
    before = numbers(reader, 8)
    position = json.loads(json.dumps(reader.position()))
    monkeypatch.setattr(stream_reader, "read_rows", failing if then == "broken" else original)
    again = stream.open_reader(0, position)
    found = again.position()
    assert "WARNING: the rows in the shuffle buffer of reader 0 have changed: it begins empty, and 4 exam" in (
        capsys.readouterr().out
    )
    assert list(found.pop("place")) == position["place"]
    assert all(found[name] == position[name] for name in ("rows_read", "lost_shards", "bad_images"))
    assert not set(before) & set(numbers(again, 4))


def test_a_shard_that_is_lost_again_in_a_replay_is_counted_once(tmp_path, monkeypatch):
    stream = stream_of(write_shards(tmp_path, "tar", [6] * 4), shuffle_buffer_size=5, shard_retries=0)
    original, second = stream_reader.read_rows, stream.order.of_epoch(0)[1].name

    def failing(shard, place, columns):
        if shard.name == second:
            raise OSError("the disk is away")
        return original(shard, place, columns)

    monkeypatch.setattr(stream_reader, "read_rows", failing)
    reader = stream.open_reader(0, None)
    numbers(reader, 3)
    position = json.loads(json.dumps(reader.position()))
    again = stream.open_reader(0, position)
    assert position["lost_shards"] == 1
    assert position["buffer"]["since"] < [0, 1, 0] < position["place"]  # the replay comes past it
    assert json.loads(json.dumps(again.position())) == {**position, "seconds": again.position()["seconds"]}
    assert numbers(again, 12) == numbers(reader, 12)


def test_a_refilled_buffer_draws_as_before(tmp_path):
    stream = stream_of(write_shards(tmp_path, "parquet", [20]), shuffle_buffer_size=4)
    buffer = stream.open_reader(0, None).buffer
    drawn = iter(buffer)
    before = [next(drawn).name for _ in range(6)]
    state = buffer.state()
    assert state["since"].offset + state["rows"] == 9
    reader = StreamReader(stream.order, stream.columns.names, 0, "", 0, 1, {"place": (0, 0, 9), "rows_read": 9})
    again = ShuffleBuffer(reader, size=4, seed=stream.args.seed, drawn=state["drawn"])
    again.refill(state)
    assert again.state() == state
    rest, others = ([row.name for row in itertools.islice(each, 8)] for each in (drawn, iter(again)))
    assert rest == others
    assert not set(rest) & set(before)


def test_a_shuffle_buffer_mixes(tmp_path):
    folder = write_shards(tmp_path, "tar", [60])
    seen = numbers(stream_of(folder, shuffle_buffer_size=20).open_reader(0, None), 40)
    assert len(set(seen)) == 40
    assert seen != sorted(seen)
    assert all(number < place + 20 for place, number in enumerate(seen))
    assert seen != numbers(stream_of(folder, shuffle_buffer_size=20, seed=1).open_reader(0, None), 40)


def test_a_run_of_pictures_in_memory_goes_on_as_a_stream(tmp_path, tiny_config, capsys):
    folder = write_shards(tmp_path / "shards", "tar", SIZES)
    digits = {"base.resolution": 24, "base.random_flip": True}
    forget_after(train(load_config(tiny_config("ddpm", "run", **digits, **{"base.checkpointing_steps": 4}))), 4)
    options = {**run_options(folder), "base.resume_from_checkpoint": "latest"}
    assert main([str(tiny_config("ddpm", "run", **options))]) == 1
    text = capsys.readouterr().err
    assert "base.streaming: false -> true" in text
    assert "data set: 40 examples (" in text
    assert ") -> a stream (" in text
    run = train(load_config(tiny_config("ddpm", "run", **options, **{"base.allow_changes": ["streaming", "dataset"]})))
    assert list(losses(run)) == [1, 2, 3, 4, 5, 6]
