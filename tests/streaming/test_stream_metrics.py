"""What streams could not read is a metric, and what a run leaves out that goes on with other readers is said."""

from __future__ import annotations

import json

import pytest
from processes import launch
from run_folders import forget_after, read_metrics
from shard_files import broken, png, tar_members, write_shards, write_tar
from streams import numbers, run_options, stream_of

from train import main, train
from trainers.engine.config.config import load_config

SKIPPED = ("stream/skipped_shards", "stream/skipped_images")
OPTIONS = {"base.bad_images": "skip", "base.shard_retries": 0, "base.checkpointing_steps": 2}


@pytest.fixture
def folder(tmp_path):
    """Four shards of 6 examples; every one has a broken picture, and the second and third break off."""
    for shard in range(4):
        members = tar_members(range(6 * shard, 6 * shard + 6)) | {f"part/{6 * shard + 1:04}.png": b"nothing"}
        write_tar(tmp_path / "shards" / f"shard-{shard}.tar", members)
    broken(tmp_path / "shards", 1)
    broken(tmp_path / "shards", 2)
    return tmp_path / "shards"


def skipped(run):
    """{step: (shards, images)} as metrics.jsonl has them."""
    return {line["step"]: tuple(map(line.get, SKIPPED)) for line in read_metrics(run) if SKIPPED[0] in line}


def in_checkpoint(run, step):
    """The same of a checkpoint, over its readers."""
    saved = json.loads((run / f"checkpoint-{step}" / "state.json").read_text())["stream"]
    readers = [reader for part in saved for reader in part["readers"]]
    earlier = (sum(each) for each in zip(*(part["skipped_before"] for part in saved), strict=True))
    return tuple(
        n + sum(reader[name] for reader in readers)
        for n, name in zip(earlier, ("lost_shards", "bad_images"), strict=True)
    )


@pytest.mark.slow  # test_stream.py resumes two processes by default
def test_two_processes_log_the_sum_and_go_on_from_it(folder, tiny_config, capsys):
    config = tiny_config("ddpm", "run", **run_options(folder, **OPTIONS, **{"base.logging_steps": 2}))
    run = config.with_suffix("")
    result = launch(config, processes=2)
    assert result.returncode == 0, result.stderr
    whole = skipped(run)
    assert list(whole) == [2, 4, 6]
    assert whole == {step: in_checkpoint(run, step) for step in whole}
    assert whole[2] < whole[4] < whole[6]
    assert min(whole[6]) > 2
    shards, images = whole[6]
    assert f"NOTE: skipped as unreadable: {images} images, and the remainder of {shards} shards" in result.stdout
    saved = json.loads((run / "checkpoint-6" / "state.json").read_text())["stream"]
    assert all(part["readers"][0]["lost_shards"] for part in saved)  # so the sum is of both
    forget_after(run, 4)
    assert launch(config, "base.resume_from_checkpoint=latest", processes=2).returncode == 0
    assert skipped(run) == whole
    forget_after(run, 4)
    fewer = ["base.resume_from_checkpoint=latest", "base.gradient_accumulation_steps=2", "base.logging_steps=1"]
    assert main([str(config), *fewer, "base.allow_changes=[dataloader_num_workers,gradient_accumulation_steps]"]) == 0
    counts = skipped(run)
    assert counts[4] == whole[4] <= counts[5] <= counts[6] == in_checkpoint(run, 6)
    assert counts[5] != (0, 0)


def test_data_that_is_no_stream_has_no_such_metrics(run_in_process):
    assert not skipped(run_in_process())


# --- other readers


def left_out(stream, *done, processes):
    """What is said of readers that each gave so many examples."""
    saved = []
    for process, count in enumerate(done):
        reader = stream.shard_for_rank(process, processes, 1).open_reader(0, None)
        numbers(reader, count)
        saved.append({"turn": 0, "readers": [json.loads(json.dumps(reader.position())) if count else None]})
    return stream.left_out(saved)


def indexed(folder, sizes):
    records = [
        {"file": path.name, "bytes": path.stat().st_size, "examples": size}
        for path, size in zip(sorted(folder.iterdir()), sizes, strict=True)
    ]
    about = {"format": 1, "label_names": None, "shards": records, "highest_label": 9}
    (folder / "index.json").write_text(json.dumps(about))


def test_what_other_readers_leave_out_is_counted(tmp_path):
    folder = write_shards(tmp_path, "parquet", [8] * 6)
    unknown = left_out(stream_of(folder), 11, 12, processes=2)
    assert unknown == "2 shards and the rest of 2 (how many examples those shards hold is not known)"
    indexed(folder, [8] * 6)
    stream = stream_of(folder)
    assert left_out(stream, 11, 12, processes=2) == "2 shards and the rest of 2, about 25 examples"
    assert left_out(stream, 0, 12, processes=2) == "4 shards and the rest of 1, about 36 examples"
    later = left_out(stream, 20, 28, processes=2)  # the second is in its second epoch, the first is not
    assert later == "5 shards and the rest of 2, about 48 examples"
    buffered = stream_of(folder, shuffle_buffer_size=3)
    text = "2 shards and the rest of 2, and 4 examples in shuffle buffers, about 25 examples"
    assert left_out(buffered, 11, 12, processes=2) == text


def test_of_tar_files_that_is_an_estimate(tmp_path):
    folder = write_shards(tmp_path, "tar", [80] * 2)
    indexed(folder, [80] * 2)
    *_, about, _ = left_out(stream_of(folder), 50, 70, processes=2).split()
    assert 30 + 10 <= int(about) <= 30 + 10 + 2 * 10240 / 3072  # tar files end with up to 10 KiB of nothing


def test_shards_that_the_index_does_not_know(tmp_path):
    folder = write_shards(tmp_path, "tar", [2, 2])
    indexed(folder, [2, 2])
    assert stream_of(folder).notes == ["a stream of 2 shards, 4 examples; its epochs are not counted"]
    assert stream_of(folder).highest_label == 9
    write_tar(folder / "more" / "shard-000.tar", {"x.png": png(1)})
    stream = stream_of(folder)
    assert stream.notes == [
        "a stream of 3 shards; its epochs are not counted",
        "1 of them are not in index.json, and are read too: name a sub-folder to hold out in base.validation_split",
    ]
    assert stream.highest_label is None
    (folder / "shard-001.tar").unlink()
    held = stream_of(folder, validation_split="more")
    assert held.notes == ["a stream of 1 shards, 2 examples; its epochs are not counted"]


def test_the_refusal_says_what_would_be_left_out(tmp_path, tiny_config, capsys):
    folder = write_shards(tmp_path / "shards", "parquet", [8] * 4)
    indexed(folder, [8] * 4)
    options = run_options(folder, **{"base.checkpointing_steps": 2, "base.dataloader_num_workers": 2})
    forget_after(train(load_config(tiny_config("ddpm", "run", **options))), 4)
    fewer = {**options, "base.dataloader_num_workers": 1, "base.resume_from_checkpoint": "latest"}
    capsys.readouterr()
    assert main([str(tiny_config("ddpm", "run", **fewer))]) == 1
    rest = "2 shards and the rest of 2, about 16 examples"  # 4 steps of 4: each reader is at the end of its first
    assert f"they would all begin the next epoch, and leave out {rest}" in capsys.readouterr().err
    fewer["base.allow_changes"] = ["dataloader_num_workers"]
    assert main([str(tiny_config("ddpm", "run", **fewer))]) == 0
    assert f"stream: all readers begin epoch 1: {rest} are not read" in capsys.readouterr().out
