"""Folders of shards as the hub and other tools write them."""

from __future__ import annotations

import json

import datasets as hub
import pyarrow
import pyarrow.parquet
import pytest
from image_sets import settings
from shard_files import caption, png, write_parquet, write_tar
from streams import base_of, number_of, numbers, stream_of

import datasets_lib
from datasets_lib.sources.hub import read_captions, read_labels, unread_columns
from datasets_lib.streaming.writing import example_of


def hub_layout(tmp_path):
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", range(4))
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", range(4, 8))
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", range(8, 11))
    return tmp_path


def test_a_hub_layout_is_never_trained_on_test(tmp_path):
    stream = stream_of(hub_layout(tmp_path))
    assert [shard.name for shard in stream.shards] == [f"data/train-0000{n}-of-00002.parquet" for n in (0, 1)]
    assert sorted(numbers(stream.open_reader(0, None), 8)) == list(range(8))
    assert stream.notes[1:] == ["not read: 1 shards of test; name a split in base.validation_split"]


def test_a_split_that_names_of_shards_tell_can_be_held_out(tmp_path):
    folder = hub_layout(tmp_path)
    stream = stream_of(folder, validation_split="test")
    assert (len(stream.shards), stream.notes[1:]) == (2, [])
    held = datasets_lib.build(base_of(folder, validation_split="test"), "validation")
    assert [number_of(held.get(index, None)) for index in range(len(held))] == [8, 9, 10]
    with pytest.raises(
        ValueError, match="base.validation_split .* is 'tset'; it must be one of: data, test, train; did"
    ):
        stream_of(folder, validation_split="tset")


@pytest.mark.parametrize(
    "name", ["validation/0.parquet", "Test/x.parquet", "val.parquet", "test_0.parquet", "valid.0.parquet"]
)
def test_names_of_shards_to_hold_out(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    write_parquet(tmp_path / "part-0.parquet", range(3))
    write_parquet(tmp_path / name, range(3, 5))
    assert [shard.name for shard in stream_of(tmp_path).shards] == ["part-0.parquet"]


HELD_OUT = (
    "cifar10-test", "part.test.0", "imagenet1k-validation-00", "partial-test/0", "test0", "val2017", "dev-0", "eval-0",
    "evaluation-0", "holdout", "a/b/shard_test_003",
)  # fmt: skip


@pytest.mark.parametrize("name", HELD_OUT)
def test_words_in_names_of_shards(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
    write_parquet(tmp_path / "cifar10-train-0.parquet", range(3))
    write_parquet(tmp_path / f"{name}.parquet", range(3, 5))
    assert [shard.name for shard in stream_of(tmp_path).shards] == ["cifar10-train-0.parquet"]


@pytest.mark.parametrize("name", ["testing_ground-0.parquet", "valley.parquet", "contest.parquet", "a/trains.parquet"])
def test_names_that_only_begin_so(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    write_parquet(tmp_path / name, range(3))
    if name.startswith("testing"):  # "testing" stands by itself before the underscore
        with pytest.raises(ValueError, match="has shards of the splits testing"):
            stream_of(tmp_path)
    else:
        assert len(stream_of(tmp_path).shards) == 1


def test_shards_of_a_split_to_hold_out_alone_are_refused(tmp_path):
    write_parquet(tmp_path / "test-0.parquet", range(3))
    with pytest.raises(
        ValueError, match=r"has shards of the splits test \(1\) alone, which nobody trains on; give the"
    ):
        stream_of(tmp_path)


def test_what_img2dataset_writes(tmp_path):
    """A tar, a table of its members and a file of statistics for each shard; failed downloads have no picture."""
    for shard, rows in enumerate((range(3), range(3, 5))):
        members = {}
        for number in rows:
            key = f"{shard:05}{number:04}"
            members[f"{key}.jpg"] = png(number)
            members[f"{key}.txt"] = caption(number).encode()
            about = {"caption": "of the table", "url": "https://x/y", "key": key, "status": "success", "width": 16}
            members[f"{key}.json"] = json.dumps(about).encode()
        write_tar(tmp_path / f"{shard:05}.tar", members)
        write_parquet(tmp_path / f"{shard:05}.parquet", rows)
        (tmp_path / f"{shard:05}_stats.json").write_text("{}")
    stream = stream_of(tmp_path)
    assert [shard.name for shard in stream.shards] == ["00000.tar", "00001.tar"]
    reader = stream.open_reader(0, None)
    found = [reader.next(None) for _ in range(5)]
    assert sorted(example["caption"] for example in found) == [caption(number) for number in range(5)]
    for example in found:
        assert example["caption"] == caption(round((float(example["image"].mean()) + 1) * 127.5))


TEXTS = {
    "a mark at the beginning": ({"a.txt": b"\xef\xbb\xbfa cat"}, "a cat"),
    "another encoding": ({"a.txt": "caf\u00e9".encode("latin-1")}, r"has no caption \(found b'caf"),
    "a broken json": ({"a.json": b'{"text": "a'}, r"has no caption \(found None\)"),
    "no object": ({"a.json": b'["a cat"]'}, r"has no caption \(found None\)"),
    "both": ({"a.json": b'{"text": "of the json"}', "a.txt": b"a cat"}, "a cat"),
    "both, the other way": ({"a.txt": b"a cat", "a.json": b'{"text": "of the json"}'}, "a cat"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_texts_in_tars(tmp_path, case):
    members, expected = TEXTS[case]
    write_tar(tmp_path / "0.tar", {"a.png": png(1), **members})
    reader = stream_of(tmp_path).open_reader(0, None)
    if expected == "a cat":
        assert reader.next(None)["caption"] == "a cat"
    else:
        with pytest.raises(ValueError, match=expected):
            reader.next(None)


def test_trigger_words_of_folders_stand_in_the_shards(tmp_path):
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(png(number))
    tables = [
        {"path": str(tmp_path / "cat"), "caption": "a cat", "trigger_word": "ohwx"},
        {"path": str(tmp_path / "dog"), "caption": "a dog"},
    ]
    args = settings(train_data_dir=tables, caption=None, trigger_word="sks")
    dataset = datasets_lib.build(args, "train")
    assert [example_of(dataset, index)["text"] for index in range(2)] == ["ohwx, a cat", "sks, a dog"]
    plain = datasets_lib.build(settings(train_data_dir=tables[1:], caption=None, trigger_word="sks"), "train")
    assert example_of(plain, 0)["text"] == "a dog"


# --- the columns that `datasets` makes of a tar


def tar_rows(**columns):
    rows = {"__key__": ["a", "b"], "__url__": ["u", "u"], "jpg": [b"", b""], **columns}
    return hub.Dataset.from_dict(rows)


def test_texts_and_classes_of_tars_that_are_not_streamed():
    rows = tar_rows(txt=["x", "y"], cls=[3, 1])
    assert read_captions(rows, None, "set") == ["x", "y"]
    assert read_labels(rows, None) == ([3, 1], None, None)
    assert read_captions(tar_rows(txt=["x", "y"], text=["p", "q"]), None, "set") == ["p", "q"]


def test_what_looks_like_captions_in_a_table():
    assert unread_columns(tar_rows(json=["x", "y"], n=[1, 2]).features) == ["column 'json' of texts"]
    assert unread_columns(tar_rows(file_name=["x", "y"], image_url=["x", "y"]).features) == []


def test_a_stream_with_a_column_that_looks_like_captions(tmp_path):
    more = {"Beschreibung": (hub.Value("string"), ["x", "y"])}
    write_parquet(tmp_path / "0.parquet", range(2), **more)
    table = pyarrow.parquet.read_table(tmp_path / "0.parquet").drop(["text"])
    pyarrow.parquet.write_table(table, tmp_path / "0.parquet")
    stream = stream_of(tmp_path)
    assert stream.caption_note == "no captions found: every example has base.caption = ''"
    with pytest.raises(ValueError, match=r"not read: column 'Beschreibung' of texts; captions are"):
        datasets_lib.check_captions(stream)
    datasets_lib.check_captions(stream_of(tmp_path, caption=""), stream_of(tmp_path, caption_column="Beschreibung"))


@pytest.mark.parametrize("column", ["label", "class", "target"])
def test_integers_that_may_be_labels_are_named(column):
    labels, names, why = read_labels(hub.Dataset.from_dict({column: [0, 1], "n": ["a", "b"]}), None)
    assert (labels, names, why) == (None, None, f"name {column} in base.label_column")


def test_rows_that_name_files(tmp_path):
    """Beside the table, and not there."""
    (tmp_path / "set" / "data").mkdir(parents=True)
    (tmp_path / "set" / "data" / "a.png").write_bytes(png(7))
    for name in ("a.png", "gone.png", "x" * 3000):
        schema = hub.Features({"image": hub.Image()}).arrow_schema
        table = pyarrow.Table.from_pylist([{"image": {"bytes": None, "path": name}}], schema=schema)
        pyarrow.parquet.write_table(table, tmp_path / "set" / "data" / "train.parquet")
        args = settings(dataset_name=str(tmp_path / "set"), cache_dir=str(tmp_path / name[:9]))
        dataset = datasets_lib.build(args, "train")
        if name == "a.png":
            assert round((float(dataset.get(0, None)["image"].mean()) + 1) * 127.5) == 7
        else:
            with pytest.raises(
                ValueError, match=r"cannot use image row 0 of .*column 'image' of row 0 names '(gone.png|xxx)"
            ):
                dataset.get(0, None)
