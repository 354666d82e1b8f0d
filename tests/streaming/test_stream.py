"""Streams: what examples are, which reader gets which, and that a run goes on at the example where it was left."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import tarfile
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from marks import slow
from processes import launch
from run_folders import final_state, forget_after, losses
from shard_files import caption, png, write_parquet, write_shards, write_tar
from streams import COUNT, KINDS, number_of, numbers, run_options, stream_of

from datasets_lib.images.image_dataset import ImageDataset
from datasets_lib.images.source import Source
from datasets_lib.streaming import tar_rows
from datasets_lib.streaming.rows import read_rows
from datasets_lib.streaming.shards import Shard
from datasets_lib.streaming.stream import Stream
from train import train
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.config.config import load_config
from trainers.engine.run.randomness import example_generator

# --- what an example is


def test_examples_are_those_of_a_data_set(folder):
    """Against the data set of the same files: the same crops, flips and columns from the same generator."""
    args = {"resolution": 12, "random_flip": True, "trigger_word": "sks"}
    reader = stream_of(folder, **args).open_reader(0, None)
    source = Source(
        [png(n) for n in range(COUNT)], "", "", [n % 10 for n in range(COUNT)], None, [caption(n) for n in range(COUNT)]
    )
    whole = ImageDataset(source, BaseConfig(channels=1, dataset="digits", **args), "train")
    for slot in range(COUNT):
        example = reader.next(example_generator(0, slot))
        number = round((example["image"].mean().item() + 1) * 127.5)
        expected = whole.get(number, example_generator(0, slot))
        assert example.keys() == expected.keys()
        assert example["caption"] == expected["caption"] == f"sks, picture {number}"
        assert all(torch.equal(example[key], expected[key]) for key in ("image", "original_size", "crop_top_left"))


def test_columns_are_found_or_named(tmp_path):
    import datasets

    masks = [{"bytes": png(255 * n), "path": None} for n in (0, 1)]
    more = {"mask": (datasets.Image(), masks), "kind": (datasets.ClassLabel(names=["cat", "dog"]), [1, 0])}
    write_parquet(tmp_path / "a.parquet", [0, 1], **more)
    stream = stream_of(tmp_path)
    assert stream.label_names == ["cat", "dog"]
    assert stream.columns.names == ["image", "mask", "text", "kind"]
    example = stream.first_example()
    assert example["label"] == 1
    assert example["mask"].unique().tolist() == [0.0]
    named = stream_of(tmp_path, label_column="label", caption_column="text", mask_column="mask", image_column="image")
    assert named.first_example()["label"] == 0
    with pytest.raises(ValueError, match="base.label_column is 'lable'; it must be one of: image, label, text"):
        stream_of(tmp_path, label_column="lable")


def test_webdataset_members(tmp_path):
    members = {"a.b/x.jpg": png(3), "a.b/x.mask.png": png(255), "a.b/x.txt": b" one \n", "a.b/x.cls": b"4"}
    write_tar(
        tmp_path / "a.tar",
        members | {"a.b/y.webp": png(5), "a.b/y.mask.png": png(0), "a.b/y.txt": b"two", "a.b/y.cls": b"1"},
    )
    stream = stream_of(tmp_path)
    reader = stream.open_reader(0, None)
    one, two = reader.next(None), reader.next(None)
    assert [(each["caption"], each["label"], each["mask"].mean().item()) for each in (one, two)] == [
        ("one", 4, 1),
        ("two", 1, 0),
    ]
    assert stream.caption_note is None


def test_captions_are_optional(tmp_path):
    write_tar(tmp_path / "a.tar", {"x.png": png(1)})
    stream = stream_of(tmp_path, caption="a picture")
    example = stream.first_example()
    assert example["caption"] == "a picture"
    assert "label" not in example
    assert "no captions found" in stream.caption_note


def test_members_of_other_kinds_are_never_read(tmp_path, monkeypatch):
    """Above all none that could hold code; and names cannot lead anywhere, as nothing is extracted."""
    others = {
        f"x.{end}": b"cos\nsystem\n(S'false'\ntR." for end in ("pkl", "pickle", "pyd", "pth", "npy", "npz", "bin")
    }
    write_tar(tmp_path / "a.tar", {**others, "x.png": png(7), "../../y.png": png(8), "../../y.pkl": b"1"})
    before = sorted(path.name for path in tmp_path.parent.iterdir())
    seen = []
    monkeypatch.setattr(tar_rows, "_columns", lambda parts, own=tar_rows._columns: seen.append([*parts]) or own(parts))
    rows = list(read_rows(Shard(str(tmp_path / "a.tar"), "a.tar"), 0))
    assert [set(row.columns) for row in rows] == [{"image"}, {"image"}]
    assert seen == [["image"], ["image"]]
    assert sorted(path.name for path in tmp_path.parent.iterdir()) == before


ROWS_THAT_STOP = {
    "no caption": ({"x.png": png(0), "x.txt": b"a", "y.png": png(1)}, "y of a.tar, column 'text' .* has no caption"),
    "no label": ({"x.png": png(0), "x.cls": b"1", "y.png": png(1)}, "y of a.tar has the label None in column 'label'; labels are"),
    "a label that is text": ({"x.png": png(0), "x.cls": b"1", "y.png": png(1), "y.cls": b"cat"}, "y of a.tar has the label 'cat'"),
    "a broken JSON file": ({"x.png": png(0), "x.json": b'{"text": "a"}', "y.png": png(1), "y.json": b"{"}, "y of a.tar, .* has no caption"),
    "a JSON file without an object": ({"x.png": png(0), "x.json": b'{"text": "a"}', "y.png": png(1), "y.json": b"[]"}, "has no caption"),
    "no picture": ({"x.png": png(0), "x.cls": b"1", "y.cls": b"1"}, "cannot use image y of a.tar: it is empty"),
    "a broken picture": ({"x.png": png(0), "y.png": b"nothing"}, "cannot use image y of a.tar: .* or set base.bad_images=skip"),
    "a label beyond int64": ({"x.png": png(0), "x.cls": b"1", "y.png": png(1), "y.cls": b"9" * 5000}, "y of a.tar has the label '9"),
    "a label of JSON beyond int64": ({"x.png": png(0), "x.json": b'{"label": 36893488147419103232}'}, "labels are integers of at"),
    "a name with more dots": ({"x.png": png(0), "y.v2.png": png(1)}, "cannot use image y of a.tar: it is empty"),
    "JSON without an end": ({"x.png": png(0), "x.txt": b"a", "y.png": png(1), "y.json": b"[" * 99999}, "y of a.tar, .* has no caption"),
    "another encoding's name": ({"x.png": png(0), "\udce9.png": b""}, r"cannot use image \\xe9 of a.tar: it is empty"),
    "broken latents": ({"x.safetensors": b"nothing"}, "x of a.tar: its latents cannot be read .*; make the shards again"),
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS_THAT_STOP)
def test_rows_that_stop_a_run_are_named(case, tmp_path):
    members, message = ROWS_THAT_STOP[case]
    write_tar(tmp_path / "a.tar", members)
    reader = stream_of(tmp_path).open_reader(0, None)
    with pytest.raises(ValueError, match=message):
        [reader.next(None) for _ in range(2)]


def test_members_that_are_links_are_missed(tmp_path):
    """Tar writes a second name of a file as a link to the first; what it leads to is not read."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in (("x.png", tarfile.REGTYPE), ("y.png", tarfile.LNKTYPE), ("z.png", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(png(3)) if kind == tarfile.REGTYPE else 0
            info.linkname = "x.png" if kind == tarfile.LNKTYPE else "/etc/hostname"
            archive.addfile(info, io.BytesIO(png(3)))
    rows = list(read_rows(Shard(str(tmp_path / "a.tar"), "a.tar"), 0))
    assert [row.columns["image"] for row in rows] == [png(3), None, None]
    reader = stream_of(tmp_path).open_reader(0, None)
    reader.next(None)
    with pytest.raises(ValueError, match="cannot use image y of a.tar: it is empty"):
        reader.next(None)


def test_tar_files_that_are_skipped_from_a_member_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tar_rows, "TEXT_BYTES", 1000)
    for name, member, message in (
        ("twice", {"y.jpg": png(1)}, "its member y.jpg is the second image of its example"),
        ("large", {"y.json": bytes(1001)}, "its member y.json has 1,001 bytes, more than 1,000"),
    ):
        write_tar(tmp_path / name / "a.tar", {"x.png": png(0), "y.png": png(1), **member, "z.png": png(2)})
        reader = stream_of(tmp_path / name).open_reader(0, None)
        assert [round((reader.next(None)["image"].mean().item() + 1) * 127.5) for _ in range(2)] == [0, 0]
        assert f"WARNING: a.tar: {message}: the shard is skipped from byte 1,024 on" in capsys.readouterr().out
        assert reader.position()["lost_shards"] == 1
    write_tar(tmp_path / "none" / "a.tar", {"x.pkl": b"1"})
    with pytest.raises(ValueError, match="the last: a.tar: it has no members such as key.jpg"):
        stream_of(tmp_path / "none")


def test_labels_beyond_the_names(tmp_path):
    import datasets

    write_parquet(tmp_path / "a.parquet", [0], kind=(datasets.ClassLabel(names=["cat", "dog"]), [1]))
    write_parquet(tmp_path / "b.parquet", [1], kind=(datasets.Value("int64"), [2]))
    reader = stream_of(tmp_path).open_reader(0, None)
    with pytest.raises(
        ValueError, match="row 0 of b.parquet has the label 2 in column 'kind', and there are 2 classes"
    ):
        [reader.next(None) for _ in range(2)]


def test_parquet_that_names_files_or_has_no_pictures(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"image": [{"bytes": None, "path": "a.png"}]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="row 0 of a.parquet names the file 'a.png' and does not hold it"):
        stream_of(tmp_path, image_column="image").first_example()
    (tmp_path / "b").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"number": [1]}), tmp_path / "b" / "b.parquet")
    with pytest.raises(ValueError, match="row 0 of b.parquet has no picture but int; name its column in base.image"):
        stream_of(tmp_path / "b", image_column="number").first_example()


# --- readers


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (2, 0), (1, 2), (2, 2), (5, 1)])
def test_readers_share_an_epoch_without_overlap(folder, processes, workers):
    stream = stream_of(folder)
    for epoch in range(2):
        seen = []
        for process, worker in itertools.product(range(processes), range(max(workers, 1))):
            part = stream.shard_for_rank(process, processes, workers)
            reader = part.open_reader(worker, {"place": (epoch, 0, 0)})
            while _epoch_of_next(part, worker, reader) == epoch:
                seen.append(number_of(reader.next(None)))
        assert sorted(seen) == list(range(COUNT))


def _epoch_of_next(stream, number, reader):
    """The epoch of the row after the last that a reader read."""
    place, _ = next(stream.open_reader(number, reader.position()).reader)
    return place.epoch


def test_epochs_have_orders_of_their_own(folder):
    stream = stream_of(folder)
    orders = [tuple(shard.name for shard in stream.order.of_epoch(epoch)) for epoch in range(6)]
    assert len(set(orders)) > 1
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert orders == [tuple(shard.name for shard in stream_of(folder).order.of_epoch(epoch)) for epoch in range(6)]
    assert orders != [
        tuple(shard.name for shard in stream_of(folder, seed=1).order.of_epoch(epoch)) for epoch in range(6)
    ]
    reader = stream.open_reader(0, None)
    epochs = [numbers(reader, COUNT) for _ in range(3)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)


@pytest.mark.parametrize(
    ("folder", "buffer"),
    [
        *(("parquet", None), ("tar", 1), ("tar", 4), ("parquet", 50)),
        *(slow("tar", None), slow("parquet", 1), slow("parquet", 4), slow("tar", 50)),
    ],
    indirect=["folder"],
)
def test_a_reader_goes_on_from_every_position(folder, buffer):
    """Through JSON, as a checkpoint keeps it; with a buffer by reading again what was in it."""
    stream = stream_of(folder, shuffle_buffer_size=buffer).shard_for_rank(1, 2, 1)
    reader = stream.open_reader(0, None)
    whole, positions = [], [None]
    for _ in range(40):
        whole += numbers(reader, 1)
        positions.append(json.loads(json.dumps(reader.position())))
    for done, position in enumerate(positions):
        assert numbers(stream.open_reader(0, position), 40 - done) == whole[done:]


def test_a_place_is_reached_without_reading_what_is_before(tmp_path, monkeypatch):
    """Of parquet no row group, of tar no byte."""
    write_shards(tmp_path, "parquet", [40])
    path = tmp_path / "shard-000.parquet"
    data = bytearray(path.read_bytes())
    second = pyarrow.parquet.ParquetFile(path).metadata.row_group(9).column(0)
    data[4 : second.data_page_offset - 100] = bytes(second.data_page_offset - 104)
    path.write_bytes(data)
    assert [row.columns["label"] for row in read_rows(Shard(str(path), "a.parquet"), 37)] == [7, 8, 9]
    write_shards(tmp_path, "tar", [40])
    path = tmp_path / "shard-000.tar"
    rows = list(read_rows(Shard(str(path), "a.tar"), 0))
    path.write_bytes(bytes(rows[36].following) + path.read_bytes()[rows[36].following :])
    assert [row.columns["label"] for row in read_rows(Shard(str(path), "a.tar"), rows[36].following)] == [7, 8, 9]


def test_fewer_shards_than_readers(folder):
    stream = stream_of(folder)
    assert stream.shard_for_rank(0, 5, 0).reader_count == 5
    message = (
        r"has 5 shards, and 2 processes with 3 readers each \(base.dataloader_num_workers = 3\) need 6, one each; lower"
    )
    with pytest.raises(ValueError, match=message):
        stream.shard_for_rank(0, 2, 3)


# --- runs


def check_resume(tiny_config, folder, **more):
    """A run that was cut at its checkpoint and one that was not: the same losses, weights and positions."""
    options = run_options(folder, **more)
    whole = train(load_config(tiny_config("ddpm", "whole", **options, **{"base.checkpointing_steps": 2})))
    cut = Path(shutil.copytree(whole, whole.with_name("cut")))
    forget_after(cut, 4)
    resumed = {**options, "base.resume_from_checkpoint": "latest", "base.checkpointing_steps": 5}
    train(load_config(tiny_config("ddpm", "cut", **resumed)))
    assert losses(cut) == losses(whole)
    assert final_state(cut) == final_state(whole)
    states = [json.loads((path / "checkpoint-6" / "state.json").read_text())["stream"] for path in (whole, cut)]
    for state in states:
        for reader in state[0]["readers"]:
            reader.pop("seconds")
    assert states[0] == states[1]
    return whole


READERS = {
    "no workers": {},
    "2 workers": {"base.dataloader_num_workers": 2},
    "3 workers, accumulation": {"base.dataloader_num_workers": 3, "base.gradient_accumulation_steps": 2},
    "a shuffle buffer": {"base.dataloader_num_workers": 2, "base.shuffle_buffer_size": 4},
}
QUICK = [("tar", "no workers"), ("parquet", "3 workers, accumulation"), ("tar", "a shuffle buffer")]
MATRIX = [*QUICK, *(slow(*case) for case in itertools.product(KINDS, READERS) if case not in QUICK)]


@pytest.mark.parametrize(("folder", "readers"), MATRIX, indirect=["folder"])
def test_resume_is_exact(folder, tiny_config, readers):
    check_resume(tiny_config, folder, **READERS[readers])


@pytest.mark.parametrize("folder", ["tar", slow("parquet")], indirect=True)
def test_without_the_position_the_runs_differ(folder, tiny_config, monkeypatch):
    """The comparison can fail."""
    monkeypatch.setattr(Stream, "go_on", lambda self, saved, process_index: [])
    with pytest.raises(AssertionError):
        check_resume(tiny_config, folder)


@pytest.mark.parametrize("folder", ["parquet", slow("tar")], indirect=True)
def test_one_worker_reads_what_none_does(folder, tiny_config):
    runs = [
        train(load_config(tiny_config("ddpm", f"{n}", **run_options(folder, **{"base.dataloader_num_workers": n}))))
        for n in (0, 1)
    ]
    assert losses(runs[0]) == losses(runs[1])


@pytest.mark.parametrize("folder", ["parquet", slow("tar")], indirect=True)
@pytest.mark.parametrize("workers", [slow(0), 2])
def test_two_processes_resume_exactly(folder, tiny_config, workers):
    options = run_options(folder, **{"base.dataloader_num_workers": workers})
    configs = {name: tiny_config("ddpm", name, **options) for name in ("whole", "cut")}
    for name, config in configs.items():
        run = launch(config, *(["base.checkpointing_steps=2"] if name == "cut" else []), processes=2)
        assert run.returncode == 0, run.stderr
    whole, cut = (config.with_suffix("") for config in configs.values())
    state = json.loads((whole / "checkpoint-6" / "state.json").read_text())["stream"]
    assert [len(part["readers"]) for part in state] == [max(workers, 1)] * 2
    forget_after(cut, 4)
    run = launch(configs["cut"], "base.resume_from_checkpoint=latest", processes=2)
    assert run.returncode == 0, run.stderr
    assert losses(cut) == losses(whole)
    assert final_state(cut) == final_state(whole)
