"""Local folders in a hub data set's layout from others: where their cards, links and paths lead, and what they unpack to."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import zipfile
from types import SimpleNamespace

import datasets
import pyarrow
import pyarrow.compute
import pyarrow.parquet
import pytest
from confined import confined
from image_folders import save
from image_sets import settings
from shard_files import png, write_tar

import datasets_lib
from datasets_lib.images import decode
from datasets_lib.sources import hub, hub_files, local_layout
from datasets_lib.sources.parquet_size import check_unpacked


@pytest.fixture
def build(tmp_path):
    def build(folder=tmp_path / "data", split="train", **changed):
        args = settings(dataset_name=str(folder), cache_dir=str(tmp_path / "cache"), channels=1, **changed)
        return datasets_lib.build(args, split)

    return build


@pytest.fixture
def data(tmp_path):
    """The folder of the data set, beside one with a private picture and a private table."""
    save(tmp_path / "private" / "p.png", 77)
    table(tmp_path / "private" / "t.parquet", [{"bytes": png(77), "path": None}])
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def table(path, images, **options):
    kinds = {"image": pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])}
    found = pyarrow.table({"image": images}, schema=pyarrow.schema(kinds))
    metadata = datasets.Features({"image": datasets.Image()}).arrow_schema.metadata
    pyarrow.parquet.write_table(found.replace_schema_metadata(metadata), path, **options)


def values(dataset):
    examples = [dataset.get(index, None) for index in range(len(dataset))]
    return [round(float(example["image"].mean() + 1) * 127.5) for example in examples]


def said(build, **changed):
    """What is said of the folder, in a process that may take 1 GB."""

    def run():
        dataset = build(**changed)
        dataset.get(0, None)
        return "fine"

    return confined(run)


# --- paths in rows


def test_a_path_in_a_row_leads_to_below_the_folder(build, data, tmp_path):
    save(data / "files" / "a.png", 5)
    (data / "link.png").symlink_to(tmp_path / "private" / "p.png")
    for path in (str(tmp_path / "private" / "p.png"), "../private/p.png", "files/../../private/p.png"):
        (data / "link.png").unlink(missing_ok=True)
        table(data / "train.parquet", [{"bytes": None, "path": path}])
        with pytest.raises(ValueError, match="p.png leads out of .*/data, .*base.allow_outside"):
            build()
        assert values(build(allow_outside=[str(tmp_path / "private")])) == [77]
    for path in ("files/a.png", str(data / "files" / "a.png"), "files/../files/a.png"):
        table(data / "train.parquet", [{"bytes": None, "path": path}])
        assert values(build()) == [5]


ROWS = {
    "missing.png": "cannot use image row 0 of .*column 'image' of row 0 names 'missing.png', which is not in .*/data",
    "": "cannot use image row 0 of .*it is empty",
    None: "cannot use image row 0 of .*it is empty",
    "/proc/self/environ": "InputError: column 'image' of row 0: /proc/self/environ leads out of",
    "/dev/zero": "InputError: column 'image' of row 0: /dev/zero leads out of",
    "https://host/a.png": "names 'https://host/a.png', which is not in",
    "pipe.png": "cannot use image .*pipe.png: is a named pipe, not a regular file; remove it",
    "files": "cannot use image .*files: is a folder, not a regular file",
    "\x1b[2J": "ImageError: .*which is not in",
    "nul\0.png": "InputError: .*cannot be a path",
    "x" * 100_000: "InputError: .*cannot be a path; correct or remove it",
}


@pytest.mark.parametrize("path", ROWS)
def test_paths_in_rows(build, data, path):
    (data / "files").mkdir()
    os.mkfifo(data / "pipe.png")
    table(data / "train.parquet", [{"bytes": None, "path": path}])
    found = said(build)
    assert re.search(ROWS[path], found), found
    assert found.isprintable()
    assert len(found) < 3000


def test_rows_without_a_picture_at_all(build, data):
    table(data / "train.parquet", [None, {"bytes": None, "path": None}, {"bytes": b"", "path": None}])
    for index in range(3):
        with pytest.raises(ValueError, match=f"cannot use image row {index} of .*: it is empty"):
            build().get(index, None)


# --- cards

CARDS = {
    "data_files: ../private/t.parquet": "names '../private/t.parquet', which leads out of the folder",
    "data_files: PRIVATE/t.parquet": "names '.*/private/t.parquet', which leads out",
    "data_files: PRIVATE/*.png": "names '.*/private/..png', which leads out",
    "data_files: /**": "names '/..', which leads out",
    "data_files: '*/../../private/*.png'": "which leads out",
    "data_files: https://127.0.0.1:1/t.parquet": "names 'https://127.0.0.1:1/t.parquet', which leads out",
    "data_files: file:///etc/t.parquet": "which leads out",
    "data_files: hf://datasets/owner/name/t.parquet": "which leads out",
    "data_files: zip://t.parquet::a.zip": "which leads out",
    "data_files: [{split: train, path: ../private/t.parquet}]": "which leads out",
    "data_files: [{split: train, path: [a.parquet, ../private/t.parquet]}]": "which leads out",
    "data_dir: ..": "names '.*', which leads out",
    "data_dir: /": "names '/', which leads out",
    "data_dir: ../private": "names '.*private', which leads out",
    "data_files: link/t.parquet": "leads out of",
    "data_files: [1, 2]": "cannot be loaded",
    "data_files: {": "its settings cannot be read",
    "sep: '(a+)+$'": "has the option sep, which is not read; it may have config_name",
    "compression: zip": "has the option compression",
    "storage_options: {}": "has the option storage_options",
    "data_files: &a [a.parquet, *a]": "its settings cannot be read .it has aliases",
}  # fmt: skip


CARD_FILES = [("README.md", line) for line in CARDS] + [(".huggingface.yaml", line) for line in list(CARDS)[:3]]


@pytest.mark.parametrize(("file", "line"), CARD_FILES)
def test_a_card_names_files_of_its_folder(build, data, tmp_path, line, file):
    table(data / "a.parquet", [{"bytes": png(3), "path": None}])
    (data / "link").symlink_to(tmp_path / "private")
    if "link" not in line:
        (data / "link").unlink()
    config = line.replace("PRIVATE", str(tmp_path / "private"))
    card = f"configs:\n- config_name: default\n  {config}\n"
    (data / file).write_text(f"---\n{card}---\n" if file == "README.md" else card)
    with pytest.raises((ValueError, OSError), match=CARDS[line]):
        build()
    with pytest.raises((ValueError, OSError), match=CARDS[line]):
        build(streaming=True, validation_split=None, shard_retries=0, shuffle_buffer_size=None)


def test_a_card_may_name_an_allowed_folder(build, data, tmp_path):
    for pattern in (f"{tmp_path}/private/t.parquet", "../private/*.parquet"):
        (data / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: '{pattern}'\n---\n")
        assert values(build(allow_outside=[str(tmp_path / "private")])) == [77]


def test_a_card_as_people_write_them(build, data):
    (data / "data").mkdir()
    table(data / "data" / "a.parquet", [{"bytes": png(3), "path": None}])
    (data / "README.md").write_text(
        "---\nlicense: mit\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/a*\n---\n# A\n"
    )
    assert values(build()) == [3]


def test_the_card_of_a_hub_data_set_names_files_of_the_hub(tmp_path, monkeypatch):
    """It may name a file of this machine, which `datasets` would read."""
    files = {"train": ["hf://datasets/owner/name@1/a.parquet", "/home/somebody/private.parquet"]}
    builder = SimpleNamespace(config=SimpleNamespace(data_files=files))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *a, **k: builder)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *a, **k: None)
    message = "its card names '/home/somebody/private.parquet', which is not on the hub"
    for read in (hub_files.load, hub_files.data_files):
        with pytest.raises(ValueError, match=message):
            read(settings(dataset_name="owner/name"))


def test_pictures_of_a_hub_data_set_are_in_its_caches(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    args = settings(dataset_name="owner/name", cache_dir=str(tmp_path / "cache"), allow_outside=["/shared"])
    own = [str(tmp_path / "hub" / "datasets--owner--name"), str(tmp_path / "cache" / "downloads")]
    assert hub_files.file_folders(args) == [*own, "/shared"]
    save(tmp_path / "hub" / "datasets--owner--name" / "blobs" / "a.png", 9)
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": None, "path": str(tmp_path / "hub/datasets--owner--name/blobs/a.png")}]},
        datasets.Features({"image": datasets.Image(decode=False)}),
    )
    folder, *outside = hub_files.file_folders(args)
    assert hub.EncodedImages(rows, "image", "image_column", folder, outside)[0].name == "a.png"
    with pytest.raises(ValueError, match="a.png leads out of .*base.allow_outside"):
        hub.EncodedImages(rows, "image", "image_column", str(tmp_path / "other"), outside)[0]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("column", ["image", "text", "caption", "label", "other"])
@pytest.mark.parametrize("saved", [False, True])
def test_no_column_is_decoded_by_other_libraries(build, data, tmp_path, monkeypatch, column, saved):
    """A column of captions may be one of pictures, which Pillow would hand to ghostscript; here is a stand-in for that."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    columns = {"image": [{"bytes": png(3), "path": None}]} | {column: [{"bytes": EPS, "path": None}]}
    rows = datasets.Dataset.from_dict(columns, datasets.Features(dict.fromkeys(columns, datasets.Image())))
    if saved:
        rows.save_to_disk(data)
    else:
        rows.to_parquet(data / "a.parquet")
    options = {"image_column": "image"} | ({"label_column": "label"} if column == "label" else {})
    with contextlib.suppress(ValueError):
        build(**options).get(0, None)
    assert not (tmp_path / "started").exists()


SETTINGS = {
    "README.md": [
        "---\ndataset_info: 7\n---\n", "---\ndataset_info: [1, [2]]\n---\n", "---\nconfigs: 7\n---\n", "---\nconfigs: [7]\n---\n",
        "---\nconfigs: [{}]\n---\n", "---\n- 1\n---\n", "---\ndataset_info: {features: [{name: image, dtype: nothing}]}\n---\n",
        "---\ndataset_info: {splits: [{name: train, num_bytes: 9e99}], dataset_size: 9e99}\n---\n", "---\na: " + "[" * 50_000 + "\n---\n",
        "---\nconfigs: [{config_name: {}, data_files: a.parquet}]\n---\n", "---\n" + "\n" * 200_000, "---\n" + "a: 1\n" * 200_000, "\xff", "---\n!!python/object/apply:os.system ['touch x']\n---\n",
    ],
    "dataset_infos.json": ["[]", '{"default": 7}', "[" * 100_000, "{", "9" * 5000, '{"default": {"features": {"image": {"_type": "os"}}}}'],
    "saved/dataset_info.json": ["[]", '{"features": 7}', '{"features": {"image": {"_type": "os"}}}', '{"features": {"image": {"_type": "Nothing"}}}'],
    "saved/state.json": [
        '{"_data_files": []}', '{"_data_files": [{"filename": "NAME"}]}',
        '{"_data_files": [{"filename": "NAME"}], "_format_type": "torch", "_format_columns": ["label"], "_format_kwargs": {},'
        ' "_output_all_columns": false, "_split": null, "_fingerprint": "1"}',
        '{"_data_files": [{"filename": "NAME"}], "_format_type": "os.system", "_format_columns": null, "_format_kwargs": {},'
        ' "_output_all_columns": false, "_split": null, "_fingerprint": "1"}',
    ],
}  # fmt: skip


@pytest.mark.parametrize("file", SETTINGS)
def test_settings_that_cannot_be_end_without_a_traceback(build, data, file):
    table(data / "a.parquet", [{"bytes": png(3), "path": None}])
    rows = datasets.Dataset.from_dict({"image": [{"bytes": png(3), "path": None}], "label": [1]})
    rows.cast_column("image", datasets.Image()).save_to_disk(data / "saved")
    [arrow_file] = (data / "saved").glob("*.arrow")
    if not file.startswith("saved"):
        shutil.rmtree(data / "saved")

    def run(text):
        (data / file).write_text(text.replace("NAME", arrow_file.name), encoding="latin-1")
        try:
            build(data / "saved" if file.startswith("saved") else data).get(0, None)
        except (ValueError, OSError) as error:
            return str(error)
        return "fine"

    found = confined(lambda: [run(text) for text in SETTINGS[file]], seconds=60)
    assert isinstance(found, list), found
    assert all(len(text) < 3000 for text in found)
    assert not (data / "x").exists()


# --- other files of the layout


def test_links_and_pipes_are_named_before_anything_is_loaded(build, data, tmp_path):
    table(data / "a.parquet", [{"bytes": png(3), "path": None}])
    (data / "elsewhere").symlink_to("/")
    assert "elsewhere leads out of" in said(build)
    (data / "elsewhere").unlink()
    (data / "around").symlink_to(data)
    assert said(build) == "fine"
    (data / "circle").symlink_to(data / "circle")
    assert "circle: cannot be a path" in said(build)
    (data / "circle").unlink()
    for name in ("README.md", ".huggingface.yaml", "dataset_infos.json", "state.json", "dataset_dict.json"):
        os.mkfifo(data / name)
        assert f"{name}: is a named pipe, not a regular file; remove it" in said(build)
        (data / name).unlink()
    with (data / "README.md").open("wb") as file:
        file.truncate(20 << 30)
    assert "README.md: has 21,474,836,480 bytes, and at most" in said(build)


TABLES = {
    "a.csv": ("image\n/etc/passwd\n", "/etc/passwd leads out of"),
    "b.jsonl": ('{"image": "../private/p.png"}', "p.png leads out of"),
    "c.json": ("[" * 1_000_000, "cannot be loaded"),
    "d.jsonl": ('{"image": ' + "[" * 1_000_000, "cannot be loaded"),
    "e.csv": ('image\n"' + "x" * 10_000, "cannot be loaded"),
    "f.jsonl": (None, "f.jsonl: has 21,474,836,480 bytes, and at most 1,073,741,824 are read"),
    "g.csv": (None, "g.csv: has 21,474,836,480 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_texts(build, data, name):
    text, message = TABLES[name]
    (data / name).write_text(text or "")
    if text is None:
        os.truncate(data / name, 20 << 30)
    found = said(build, image_column="image")
    assert message in found, found
    assert len(found) < 3000


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_metadata_of_an_image_folder(build, data, name):
    save(data / "a.png", 3)
    line = {"metadata.csv": "file_name,text\n{},x\n", "metadata.jsonl": '{{"file_name": "{}", "text": "x"}}\n'}[name]
    (data / name).write_text(line.format("a.png"))
    assert values(build()) == [3]
    (data / name).write_text(line.format("a.png") + line.format("../private/p.png").removeprefix("file_name,text\n"))
    assert "private" not in said(build) or "cannot be loaded" in said(build)
    os.truncate(data / name, 20 << 30)
    assert f"{name}: has 21,474,836,480 bytes" in said(build)


def test_an_archive_is_not_unpacked(build, data):
    save(data.parent / "a.png", 3)
    with zipfile.ZipFile(data / "train.zip", "w") as archive:
        archive.write(data.parent / "a.png", "a.png")
    with pytest.raises(ValueError, match=r"train.zip: base.dataset_name reads .arrow, .* files from a folder; unpack"):
        build()
    assert not (data.parent / "cache" / "downloads" / "extracted").exists()
    (data / "train.zip").unlink()
    write_tar(data / "train.tar", {"a.png": png(3)})
    with pytest.raises(ValueError, match=r"train.tar: .* or read .tar files with base.streaming=true"):
        build()
    (data / "train.tar").unlink()
    (data / "train.txt").write_text("a\n")
    with pytest.raises(ValueError, match=r"train.txt: base.dataset_name reads"):
        build()


STATES = {
    "state.json": {
        '{"_data_files": [{"filename": "../private/x.arrow"}]}': "private/x.arrow leads out of",
        '{"_data_files": [{"filename": "/etc/x.arrow"}]}': "/etc/x.arrow leads out of",
        '{"_data_files": [{"filename": "link.arrow"}]}': "link.arrow leads out of",
        '{"_data_files": [{"filename": "pipe.arrow"}]}': "pipe.arrow: is a named pipe",
        '{"_data_files": [1]}': "its _data_files must each have a filename",
        '{"_data_files": {"a": 1}}': "has no list of _data_files",
        "[]": "has no list of _data_files",
        "[" * 100_000: "cannot be read as JSON",
    },
    "dataset_dict.json": {
        '{"splits": ["../private"]}': "private leads out of",
        '{"splits": ["/etc"]}': "/etc leads out of",
        '{"splits": [7]}': "has no list of splits",
        '{"splits": 7}': "has no list of splits",
        "[]": "has no list of splits",
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in STATES.items() for text in texts])
def test_a_saved_data_set_names_files_of_its_folder(build, data, tmp_path, name, text):
    rows = datasets.Dataset.from_dict({"image": [{"bytes": png(3), "path": None}]})
    rows.cast_column("image", datasets.Image()).save_to_disk(data)
    assert values(build()) == [3]
    (data / "link.arrow").symlink_to(tmp_path / "private" / "t.parquet")
    if "link" not in text:
        (data / "link.arrow").unlink()
    os.mkfifo(data / "pipe.arrow")
    (data / name).write_text(text)
    found = said(build)
    assert STATES[name][text] in found, found


# --- what a file unpacks to


def bomb(path, rows, size, **options):
    """Every row has the same picture, which the file holds once."""
    kept = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, pyarrow.int32()), pyarrow.array([bytes(size)]))
    images = pyarrow.StructArray.from_arrays([kept, pyarrow.nulls(rows, pyarrow.string())], ["bytes", "path"])
    metadata = datasets.Features({"image": datasets.Image()}).arrow_schema.metadata
    found = pyarrow.table({"image": images}).replace_schema_metadata(metadata)
    pyarrow.parquet.write_table(found, path, compression="zstd", **options)
    assert path.stat().st_size < 1 << 20


@pytest.mark.parametrize("rows", [20, 3000])
def test_a_parquet_file_of_a_few_kb_does_not_fill_the_memory(build, data, rows):
    """One picture of 60 MB, or of 1 MB, is named by every row."""
    bomb(data / "a.parquet", rows, 60_000_000 if rows == 20 else 1_000_000)
    assert rows > 20 or (data / "a.parquet").stat().st_size < 5000
    found = said(build)
    assert "a.parquet: row group 0 would take" in found, found
    assert "bytes of memory, and may take 1,073,741,824; make the file again with fewer rows in a group" in found
    assert not any((data.parent / "cache").rglob("*.arrow"))


def test_a_parquet_file_without_repetitions_does_not_fill_the_memory(build, data, monkeypatch):
    monkeypatch.setattr("datasets_lib.sources.parquet_size.UNPACKED_BYTES", 100 << 20)
    table(
        data / "a.parquet", [{"bytes": bytes(6_000_000), "path": None}] * 20, compression="zstd", use_dictionary=False
    )
    assert (data / "a.parquet").stat().st_size < 1 << 20
    assert "a.parquet: row group 0 would take 120,0" in said(build)


def test_parquet_files_of_all_shapes_are_let_through(tmp_path):
    columns = {
        "texts": [["a", "b"], ["c"], None], "maps": [{"a": "x"}, {}, None], "text": ["q", None, ""],
        "numbers": [1.0, 2.0, 3.0], "nothing": pyarrow.nulls(3), "large": pyarrow.array([b"a", b"b", b"c"], pyarrow.large_binary()),
        "structs": [{"a": {"b": "x"}}, None, {"a": {"b": "y"}}],
    }  # fmt: skip
    for number, options in enumerate(({}, {"use_dictionary": False}, {"row_group_size": 1}, {"data_page_size": 1})):
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / f"{number}.parquet", **options)
        check_unpacked(tmp_path / f"{number}.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"a": [["x" * 1000] * 9] * 99}), tmp_path / "a.parquet")
    check_unpacked(tmp_path / "a.parquet")


def test_many_repetitions_of_little_are_counted_and_let_through(tmp_path, monkeypatch):
    """One long text among short ones: the product of rows and the longest is far above what the texts take."""
    monkeypatch.setattr("datasets_lib.sources.parquet_size.UNPACKED_BYTES", 60_000)
    texts = ["x" * 5000] + ["y"] * 5000
    pyarrow.parquet.write_table(pyarrow.table({"a": texts}), tmp_path / "a.parquet")
    check_unpacked(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"a": ["x" * 5000] * 5000}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="row group 0 would take 25,0.* bytes of memory"):
        check_unpacked(tmp_path / "a.parquet")


def arrow(path, table, **options):
    with pyarrow.ipc.new_stream(path, table.schema, options=pyarrow.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)


IMAGES = pyarrow.table({"image": [{"bytes": bytes(1_000_000), "path": None}] * 3})
ARROWS = {
    "packed": (IMAGES, {"compression": "zstd"}, "is packed .compressed.; save it as it is"),
    "lz4": (IMAGES, {"compression": "lz4"}, "is packed"),
    "dictionary": (pyarrow.table({"image": pyarrow.array(["x"] * 3).dictionary_encode()}), {}, "columns that repeat their values"),
    "view": (pyarrow.table({"image": pyarrow.array([[b"x"]], pyarrow.list_(pyarrow.binary_view()))}), {}, "columns that repeat"),
    "run": (pyarrow.table({"image": pyarrow.compute.run_end_encode(pyarrow.array(["x"] * 3))}), {}, "columns that repeat"),
}  # fmt: skip


@pytest.mark.parametrize("case", ARROWS)
def test_an_arrow_file_takes_no_more_memory_than_its_bytes(build, data, case):
    found, options, message = ARROWS[case]
    arrow(data / "a.arrow", found, **options)
    with pytest.raises(ValueError, match=f"a.arrow: .*{message}"):
        build()
    rows = datasets.Dataset.from_dict({"image": [{"bytes": png(3), "path": None}]}).cast_column(
        "image", datasets.Image()
    )
    rows.save_to_disk(data / "saved")
    [file] = (data / "saved").glob("*.arrow")
    arrow(file, found, **options)
    with pytest.raises(ValueError, match=f"{file.name}: .*{message}"):
        build(data / "saved")


def test_arrow_files_as_people_have_them(build, data):
    kinds = datasets.Features(
        {
            "image": datasets.Image(),
            "view": datasets.ClassLabel(names=["dictionary"]),
            "text": datasets.List(datasets.Value("string")),
        }
    )
    rows = {"image": [{"bytes": png(3), "path": None}] * 3, "view": [0] * 3, "text": [["a", "b"]] * 3}
    table = datasets.Dataset.from_dict(rows, kinds).data.table
    arrow(data / "a.arrow", table)
    assert values(build(label_column="view")) == [3] * 3
    with pyarrow.ipc.new_file(data / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    assert values(build()) == [3] * 3
    for content in (b"", b"\xff" * 100, (data / "a.arrow").read_bytes()[:300]):
        (data / "a.arrow").write_bytes(content)
        with pytest.raises(ValueError, match=r"a.arrow: cannot be read as arrow \(.+\); replace it"):
            build()


def test_the_name_of_a_file_does_not_say_how_it_is_read(build, data):
    """The card's files are all read in the format that most of them have."""
    arrow(data / "a.arrow", IMAGES)
    arrow(data / "b.arrow", IMAGES)
    arrow(data / "c.csv", IMAGES, compression="zstd")
    (data / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: ['*.arrow', c.csv]\n---\n")
    with pytest.raises(ValueError, match="c.csv: is packed"):
        build()


def test_a_pattern_with_many_stars(build, data):
    table(data / ("a" * 200 + ".parquet"), [{"bytes": png(3), "path": None}])
    (data / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: '{'*a' * 9}*b'\n---\n")
    assert "give at most 3 stars in a name" in said(build)


def test_a_row_larger_than_pictures_are(build, data, monkeypatch):
    monkeypatch.setattr(decode, "PICTURE_BYTES", 1000)
    table(data / "a.parquet", [{"bytes": png(3), "path": None}, {"bytes": bytes(1001), "path": None}])
    dataset = build()
    dataset.get(0, None)
    with pytest.raises(ValueError, match="cannot use image row 1 of .*: it has 1,001 bytes, and at most 1,000 are"):
        dataset.get(1, None)
    assert values(build(bad_images="skip")) == [3, 3]


def test_labels_that_fit_into_no_int64(build, data):
    labels = pyarrow.array([2**63 + 5], pyarrow.uint64())
    pyarrow.parquet.write_table(pyarrow.table({"image": [{"bytes": png(3)}], "label": labels}), data / "a.parquet")
    with pytest.raises(ValueError, match="column 'label' has 9223372036854775813 in row 0; labels are integers"):
        build(label_column="label", image_column="image")


def test_names_of_columns_and_files_are_shown_escaped(build, data):
    name = "\x1b]0;PWN\x07\nerror: fake"
    pyarrow.parquet.write_table(pyarrow.table({name: [1], "b": [2]}), data / "a.parquet")
    for options in ({}, {"image_column": "c"}, {"image_column": "b"}):
        with pytest.raises(ValueError, match="image_column") as error:
            build(**options)
        assert str(error.value).isprintable()
    (data / f"{name}.parquet").write_bytes(b"")
    with pytest.raises((ValueError, OSError)) as error:
        build()
    assert str(error.value).isprintable()


def test_the_limits_of_the_layout_are_those_of_the_documents():
    assert set(local_layout.KINDS) >= {".parquet", ".arrow", ".png"}
    assert not {".tar", ".zip", ".pkl", ".gz"} & set(local_layout.KINDS)
