"""Captions and metadata as other tools and people write them: each is read right, or refused with the reason."""

from __future__ import annotations

import json
import re

import pyarrow
import pyarrow.parquet
import pytest
from image_folders import build, captions, labels, save, values, write

import datasets_lib


def csv_of(tmp_path, text, name="metadata.csv"):
    for number, picture in enumerate("ab"):
        save(tmp_path / f"{picture}.png", number)
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return tmp_path


# --- CSV

ROWS = {
    "a comma in a text": (
        "a.png,a cat, on a mat",
        r"row 1 of .*metadata.csv \(line 2\) has 3 fields, and the header 2",
    ),
    "many tags": ("a.png,1girl, solo, hat, tree", r"has 5 fields, and the header 2 \(file_name, text\); quote texts"),
    "a short row": ("a.png,x\nb.png", r"row 2 of .*metadata.csv \(line 3\) has 1 fields, and the header 2"),
    "behind a text of two lines": ('a.png,"x\ny"\nb.png,p,q', r"row 2 of .* \(line 4\) has 3 fields"),
    "a comma at the end": ("a.png,x,", "has 3 fields, and the header 2"),
    "text behind a quote": ('a.png,"x" y', r"cannot be read after line 2 \(.*expected after"),
    "a quote that stays open": ('a.png,"x\nb.png,y', r"cannot be read after line 3 \(unexpected end of data\)"),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_row_of_a_csv_that_does_not_fit_is_named(tmp_path, case):
    text, message = ROWS[case]
    with pytest.raises(ValueError, match=message):
        build(csv_of(tmp_path, f"file_name,text\n{text}\n"))


CSV = {
    "quoted": 'file_name,text\na.png,"a cat, on a mat"\nb.png,"a ""dog"""\n',
    "semicolons": 'file_name;text\na.png;a cat, on a mat\nb.png;"a ""dog"""\n',
    "tabs": 'file_name\ttext\na.png\ta cat, on a mat\nb.png\t"a ""dog"""\n',
    "a mark and CR LF": b'\xef\xbb\xbffile_name,text\r\na.png,"a cat, on a mat"\r\nb.png,"a ""dog"""\r\n',
    "CR alone": b'file_name,text\ra.png,"a cat, on a mat"\rb.png,"a ""dog"""\r',
    "an index column": ',file_name,text\n0,a.png,"a cat, on a mat"\n1,b.png,"a ""dog"""\n',
    "blanks around names": ' file_name , text\na.png,"a cat, on a mat"\nb.png,"a ""dog"""\n',
    "blank lines": '\nfile_name,text\n\na.png,"a cat, on a mat"\n\nb.png,"a ""dog"""\n\n',
    "a wide column beside": 'file_name,text,vector\na.png,"a cat, on a mat",'
    + "9 " * 300_000
    + '\nb.png,"a ""dog""",\n',
    "Excel's first line": 'sep=;\nfile_name;text\na.png;a cat, on a mat\nb.png;"a ""dog"""\n',
    "rows of nothing at the end": 'file_name,text\na.png,"a cat, on a mat"\nb.png,"a ""dog"""\n,\n , \n',
    "in another order": 'text,file_name\n"a cat, on a mat",a.png\n"a ""dog""",b.png\n',
}


@pytest.mark.parametrize("case", CSV)
def test_dialects_of_csv(tmp_path, case):
    assert captions(build(csv_of(tmp_path, CSV[case]))) == ["a cat, on a mat", 'a "dog"']


@pytest.mark.parametrize("header", ["image,text", "file_name|text", "filename;caption", "a.png,a cat"])
def test_a_csv_without_file_names_shows_the_columns_that_it_has(tmp_path, header):
    found = re.escape(", ".join(re.split("[,;]", header))) or "none"
    with pytest.raises(ValueError, match=rf"first line has no column file_name \(columns: {found}\); name the column"):
        build(csv_of(tmp_path, f"{header}\na.png,x\n"))


# --- which file


def rows_of(*names):
    return [{"file_name": f"{name}.png", "text": f"of {name}"} for name in names]


def test_metadata_of_sub_folders(tmp_path):
    for number, name in enumerate(("cat/a", "cat/b", "dog/c")):
        save(tmp_path / f"{name}.png", number)
    write(tmp_path / "cat" / "metadata.jsonl", *rows_of("b", "a"))
    (tmp_path / "dog" / "METADATA.CSV").write_text("file_name,text\nc.png,of c\n")
    dataset = build(tmp_path)
    assert (values(dataset), captions(dataset)) == ([1, 0, 2], ["of b", "of a", "of c"])


def test_the_table_nearest_to_a_picture_counts(tmp_path):
    for number, name in enumerate(("a", "sub/b", "sub/c")):
        save(tmp_path / f"{name}.png", number)
    write(tmp_path / "metadata.jsonl", *[{"file_name": f"{n}.png", "text": "far"} for n in ("a", "sub/b", "sub/c")])
    write(tmp_path / "sub" / "metadata.jsonl", {"file_name": "b.png", "text": "near"})
    dataset = build(tmp_path)
    assert dict(zip(values(dataset), captions(dataset), strict=True)) == {0: "far", 2: "far", 1: "near"}
    assert dataset.notes == ["1 rows are not used: a metadata file nearer to the image has it too"]


def test_train_with_metadata_below_the_folder(tmp_path):
    """As diffusers' scripts read it: no split is named."""
    for number, name in enumerate(("train/a", "train/b", "test/c")):
        save(tmp_path / f"{name}.png", number)
    write(tmp_path / "train" / "metadata.jsonl", *rows_of("a", "b"))
    write(tmp_path / "test" / "metadata.jsonl", *rows_of("c"))
    assert captions(build(tmp_path)) == ["of a", "of b"]
    assert captions(build(tmp_path, "validation", validation_split="test")) == ["of c"]


def test_of_several_tables_in_a_folder_one_is_read_and_the_others_are_named(tmp_path):
    save(tmp_path / "a.png")
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"file_name": "a.png", "text": "3"}]), tmp_path / "metadata.parquet"
    )
    assert captions(build(tmp_path)) == ["3"]
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,2\n")
    dataset = build(tmp_path)
    assert captions(dataset) == ["2"]
    assert dataset.notes == [f"{tmp_path}/metadata.parquet is not read: metadata.csv beside it comes first"]
    write(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": "1"})
    (tmp_path / "a.txt").write_text("0")
    dataset = build(tmp_path)
    assert captions(dataset) == ["1"]
    assert [note.split("/")[-1].split()[0] for note in dataset.notes] == ["metadata.csv", "metadata.parquet", "1"]
    assert dataset.notes[2] == "1 text files with the names of images are not read: metadata.jsonl comes first"


def test_metadata_as_parquet(tmp_path):
    """pandas' columns: an index, numbers that became floats, a list of texts, embeddings that are not read."""
    for number, name in enumerate("abc"):
        save(tmp_path / f"{name}.png", number)
    rows = [
        {"file_name": f"{n}.png", "text": ["x", n], "label": float(i), "vector": [0.5] * 4, "raw": b"\0"}
        for i, n in enumerate("abc")
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "metadata.parquet")
    dataset = build(tmp_path)
    assert (values(dataset), captions(dataset), labels(dataset)) == ([0, 1, 2], ["x"] * 3, [0, 1, 2])
    assert list(dataset.captions()) == ["x", "a", "x", "b", "x", "c"]


def test_a_metadata_parquet_that_is_none(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "metadata.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"metadata.parquet: cannot be read as parquet"):
        build(tmp_path)


def test_a_key_twice_in_a_line_is_named(tmp_path):
    save(tmp_path / "a.png")
    write(tmp_path / "metadata.jsonl", '{"file_name": "a.png", "text": "x", "text": "y"}')
    with pytest.raises(
        ValueError, match=r"row 1 of .*metadata.jsonl has the line .*; write one object a line, with each key once"
    ):
        build(tmp_path)


@pytest.mark.parametrize("kind", [pyarrow.binary(), pyarrow.struct({"a": pyarrow.string()})])
def test_captions_of_another_type_are_named(tmp_path, kind):
    save(tmp_path / "a.png")
    value = b"x" if kind == pyarrow.binary() else {"a": "x"}
    columns = {"file_name": ["a.png"], "text": pyarrow.array([value], kind)}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "metadata.parquet")
    with pytest.raises(ValueError, match=r"metadata.parquet: .*column text is of the type .*; make it text, or rename"):
        build(tmp_path)


@pytest.mark.parametrize("kind", [pyarrow.list_(pyarrow.string(), 2), pyarrow.large_list(pyarrow.large_string())])
def test_lists_of_captions_of_every_type(tmp_path, kind):
    save(tmp_path / "a.png")
    columns = {"file_name": ["a.png"], "text": pyarrow.array([["x", "y"]], kind)}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "metadata.parquet")
    assert list(build(tmp_path).captions()) == ["x", "y"]


@pytest.mark.parametrize("header", ["file_name,text,text", "file_name,file_name,text"])
def test_a_column_twice_is_named(tmp_path, header):
    with pytest.raises(ValueError, match=r"metadata.csv: has the column '(text|file_name)' twice; keep one"):
        build(csv_of(tmp_path, f"{header}\na.png,x,y\n"))


def test_a_key_twice_in_an_object_that_nobody_reads(tmp_path):
    save(tmp_path / "a.png")
    write(tmp_path / "metadata.jsonl", '{"file_name": "a.png", "text": "x: y", "exif": {"a": 1, "a": 2}}')
    assert captions(build(tmp_path)) == ["x: y"]


# --- names


def test_names_in_another_unicode_form_mean_the_same_file(tmp_path):
    save(tmp_path / "caf\u0065\u0301.png", 7)
    write(tmp_path / "metadata.jsonl", {"file_name": "caf\u00e9.png", "text": "x"})
    assert (values(build(tmp_path)), captions(build(tmp_path))) == ([7], ["x"])


@pytest.mark.parametrize("name", ["sub\\a.png", "./sub/a.png", "{folder}/sub/a.png"])
def test_backslashes_and_absolute_paths_in_the_folder(tmp_path, name):
    save(tmp_path / "sub" / "a.png", 7)
    write(tmp_path / "metadata.jsonl", {"file_name": name.format(folder=tmp_path), "text": "x"})
    assert values(build(tmp_path)) == [7]
    write(tmp_path / "list.jsonl", {"image": name.format(folder=tmp_path), "text": "x"})
    assert values(build(tmp_path / "list.jsonl")) == [7]


def test_a_file_with_a_backslash_in_its_name_is_itself(tmp_path):
    save(tmp_path / "sub" / "a.png", 7)
    save(tmp_path / "sub\\a.png", 8)
    write(tmp_path / "metadata.jsonl", {"file_name": "sub\\a.png", "text": "x"})
    assert values(build(tmp_path)) == [8]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("C:\\\\pictures\\\\a.png", r"it is a path of Windows: name the file below"),
        ("\\\\\\\\host\\\\share\\\\a.png", r"it is a path of Windows: name the file below"),
        ("sub\\\\..\\\\..\\\\a.png", "which is not there or no image"),
        ("/elsewhere/a.png", "leads out of the folder"),
    ],
)
def test_paths_that_lead_elsewhere(tmp_path, name, message):
    save(tmp_path / "a.png")
    write(tmp_path / "metadata.jsonl", f'{{"file_name": "{name}", "text": "x"}}')
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build(tmp_path)


# --- text files


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.caption", "a.Caption", "a.png.txt", "a.PNG.txt"])
def test_endings_of_text_files(tmp_path, name):
    save(tmp_path / ("a.PNG" if "PNG" in name else "a.png"))
    (tmp_path / name).write_bytes("\ufeffa café\r\n".encode())
    assert captions(build(tmp_path)) == ["a café"]


def test_txt_comes_before_caption_and_the_other_is_counted(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.caption").write_text("caption")
    dataset = build(tmp_path)
    assert captions(dataset) == ["text"]
    assert dataset.notes == [f"1 text files such as {tmp_path}/a.caption are not read: another one comes first"]


def test_lines_of_a_text_file_as_captions_of_their_own(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("one\n\n two \nthree\n")
    assert captions(build(tmp_path)) == ["one\n\n two \nthree"]
    dataset = build(tmp_path, caption_lines=True)
    assert list(dataset.captions()) == ["one", "two", "three"]
    assert dataset.random
    (tmp_path / "a.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"a.png \(its text file: a.txt\) has no caption \(found None\)"):
        build(tmp_path, caption_lines=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a cat".encode("utf-16-le"), r"has a caption that is no text \('a\\x00 "),
        ("a cat".encode("utf-16"), "is not UTF-8 text"),
        (b"PNG\0\0\0", "has a caption that is no text"),
        ("\u200b\u2060\ufeff".encode(), r"has no caption \(found '\\u200b"),
        ("\u00a0\u3000".encode(), "has no caption"),
        ("\u200e \u202a".encode(), "has no caption"),
    ],
)
def test_what_is_no_text(tmp_path, text, message):
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        build(tmp_path)


@pytest.mark.parametrize("text", ["👩\u200d🚀", "नि", "😀", "a\u200bb", "\u200fشجرة", "1"])
def test_texts_with_characters_that_join_others_are_texts(tmp_path, text):
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert captions(build(tmp_path)) == [text.strip()]


@pytest.mark.parametrize("image", ["caf\u00e9.png", "cafe\u0301.png"])
def test_text_files_in_another_unicode_form(tmp_path, image):
    save(tmp_path / image)
    (tmp_path / ("cafe\u0301.txt" if "\u00e9" in image else "caf\u00e9.txt")).write_text("x")
    assert captions(build(tmp_path)) == ["x"]


OTHER_NAMES = ["img_1.txt", "0000.txt", "a-1.txt", "captions/a.txt", "txt/a.txt", "a .txt", "b.caption"]


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_text_files_of_no_image(tmp_path, name):
    save(tmp_path / "a.png")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match=r"not read: 1 \.(txt|caption) with other names than the images"):
        datasets_lib.check_captions(build(tmp_path, caption=None))


def test_what_a_fallback_would_hide_is_a_note(tmp_path):
    save(tmp_path / "3_cat" / "a.png")
    (tmp_path / "3_cat" / "a.text").write_text("x")
    notes = build(tmp_path, folder_repeats=True).notes
    assert any(note.startswith("not read, though it looks like captions: 1 .text with the names") for note in notes)


# --- none found, and what was seen

SEEN = {
    "a.json": "1 .json with the names of images",
    "a.tags": "1 .tags with the names of images",
    "a.png.json": "1 .json with the names of images",
    "captions.csv": "captions.csv",
    "prompts.txt": "prompts.txt",
    "metadata.json": "metadata.json",
    "meta_cap.json": "meta_cap.json",
    "readme.txt": None,
    "LICENSE": None,
    "a.npz": None,
}


@pytest.mark.parametrize("name", SEEN)
def test_what_looks_like_captions_and_is_not_read(tmp_path, name):
    save(tmp_path / "a.png")
    (tmp_path / name).write_text("{}")
    dataset = build(tmp_path, caption=None)
    assert dataset.caption_note == "no captions found: every example has base.caption = ''"
    if SEEN[name] is None:
        datasets_lib.check_captions(dataset)
    else:
        message = f'what looks like them is not read: .*{re.escape(SEEN[name])}.*base.caption="" trains without them'
        with pytest.raises(ValueError, match=message):
            datasets_lib.check_captions(dataset, None)
    datasets_lib.check_captions(build(tmp_path, caption=""), build(tmp_path, caption="a cat"))


@pytest.mark.parametrize("column", ["Text", "additional_feature", "caption_en", "tags", "description"])
def test_columns_that_look_like_captions(tmp_path, column):
    for name in "ab":
        save(tmp_path / f"{name}.png")
    write(
        tmp_path / "metadata.jsonl", *[{"file_name": f"{n}.png", column: "a cat", "url": "https://x/y"} for n in "ab"]
    )
    with pytest.raises(ValueError, match=f"not read: column '{column}'; captions are"):
        datasets_lib.check_captions(build(tmp_path, caption=None))
    assert captions(build(tmp_path, caption_column=column)) == ["a cat"] * 2


@pytest.mark.parametrize(
    "row", [{"label": "cat"}, {"url": "https://x/y"}, {"width": 5}, {"license": "MIT"}, {"text": None}]
)
def test_columns_that_do_not(tmp_path, row):
    save(tmp_path / "a.png")
    write(tmp_path / "metadata.jsonl", json.dumps({"file_name": "a.png"} | {k: v for k, v in row.items() if v}))
    datasets_lib.check_captions(build(tmp_path, caption=None))


# --- labels


def label_rows(tmp_path, *values_of):
    for number in range(len(values_of)):
        save(tmp_path / f"{number}.png", number)
    rows = [{"file_name": f"{number}.png", "label": value} for number, value in enumerate(values_of)]
    write(tmp_path / "metadata.jsonl", *[json.dumps(row) for row in rows])
    return build(tmp_path)


@pytest.mark.parametrize("value", [None, "", " ", -1, True, 1.5, [1], {"a": 1}])
def test_the_row_that_spoils_a_column_of_labels_is_named(tmp_path, value):
    dataset = label_rows(tmp_path, 0, 1, value)
    assert labels(dataset) == [None] * 3
    found = re.escape(repr(value))
    assert re.search(
        rf"column 'label' is not used as labels: row 3 of .* has no class \(found {found}\)", dataset.no_labels
    )


@pytest.mark.parametrize("column", ["Label", "labels", "class", "category"])
def test_a_column_that_may_hold_classes_is_named(tmp_path, column):
    save(tmp_path / "a.png")
    write(tmp_path / "metadata.jsonl", {"file_name": "a.png", column: "x"})
    assert build(tmp_path).no_labels == f"name the column '{column}' in base.label_column"


def test_numbers_that_pandas_wrote_as_floats_are_numbers(tmp_path):
    assert labels(label_rows(tmp_path, 1.0, 0.0, 2.0)) == [1, 0, 2]


def test_classes_that_look_equal_are_equal(tmp_path):
    dataset = label_rows(tmp_path, "caf\u00e9", "cafe\u0301", " caf\u00e9 ", "tea")
    assert (dataset.label_names, labels(dataset)) == (["caf\u00e9", "tea"], [0, 0, 0, 1])
    notes = label_rows(tmp_path, "Cat", "cat", "dog", "cat").notes
    assert any(note.endswith("Cat, cat, dog; these differ by case alone: Cat, cat") for note in notes)


# --- how often


def test_a_column_of_repeats(tmp_path):
    for number, name in enumerate("abc"):
        save(tmp_path / f"{name}.png", number)
    (tmp_path / "metadata.csv").write_text("file_name,text,n\na.png,x,1\nb.png,y,3\nc.png,z,2\n")
    once, dataset = build(tmp_path), build(tmp_path, repeats_column="n")
    assert (values(dataset), captions(dataset)) == ([0, 1, 1, 1, 2, 2], ["x", "y", "y", "y", "z", "z"])
    assert [dataset.name(index)[-5:] for index in range(6)] == ["a.png", "b.png", "b.png", "b.png", "c.png", "c.png"]
    assert (len(dataset.pictures), len(once)) == (3, 3)
    assert dataset.fingerprint != once.fingerprint
    dataset.prepare(show_progress=False)
    assert dataset.in_memory
    assert values(dataset.only([4, 1])) == [2, 1]
    batch = dataset.finish(dataset.get_batch([0, 3, 5], [None] * 3))
    assert batch["caption"] == ["x", "y", "z"]
    assert [round(float(image.mean() + 1) * 127.5) for image in batch["image"]] == [0, 1, 2]
    held_out = build(tmp_path, "validation", repeats_column="n", validation_split=0.34)
    assert len(held_out) == 1
    assert len(build(tmp_path, repeats_column="n", validation_split=0.34)) + len(held_out) in (6, 5, 4)


@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5", "", "1000000"])
def test_repeats_that_cannot_be(tmp_path, value):
    save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text(f"file_name,n\na.png,{value}\n")
    with pytest.raises(
        ValueError, match=rf"row 1 of .* has the repeats '{value}' \(base.repeats_column\); give a whole"
    ):
        build(tmp_path, repeats_column="n")


def test_repeats_need_metadata(tmp_path):
    save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="base.repeats_column is 'n', but there is no metadata"):
        build(tmp_path, repeats_column="n")
