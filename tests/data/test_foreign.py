"""Names, texts and files of others: shown without control characters, opened only if they are regular and small."""

from __future__ import annotations

import os
import socket

import pytest

from datasets_lib.foreign import check_regular, read_bytes, read_json, shown, shown_lines


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain name.png", "plain name.png"),
        ("Größe 図 é", "Größe 図 é"),
        ("\x1b]0;PWN\x07", "\\x1b]0;PWN\\x07"),
        ("a\nerror: fake\n.png", "a\\nerror: fake\\n.png"),
        ("a\rb\tc\x00d\x7f", "a\\rb\\tc\\x00d\\x7f"),
        ("\x9b31m", "\\x9b31m"),  # the eight-bit form of ESC [
        ("gnp.\u202eexe", "gnp.\\u202eexe"),  # would be read from right to left
        ("zero\u200bwidth\u2028line", "zero\\u200bwidth\\u2028line"),
        (os.fsdecode(b"latin-\xe9"), "latin-\\udce9"),  # cannot be printed otherwise
        ("x" * 1005, "x" * 1000 + "... (1,005 characters)"),
    ],
)
def test_control_characters_are_shown_escaped(text, expected):
    assert shown(text) == expected


def test_a_message_keeps_its_lines():
    assert shown_lines("error: a\n  b \x1b[2J") == "error: a\n  b \\x1b[2J"


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("/dev/zero")
    (tmp_path / "file").write_bytes(b"content")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        kinds = {"pipe": "a named pipe", "folder": "a folder", "link": "a device", "socket": "a socket"}
        for name, kind in kinds.items():
            with pytest.raises(OSError, match=f"{name}: is {kind}, not a regular file; remove it"):
                read_bytes(tmp_path / name, 100)
    with pytest.raises(FileNotFoundError):
        check_regular(tmp_path / "missing")
    assert read_bytes(tmp_path / "file", 7) == b"content"
    with pytest.raises(ValueError, match="file: has 7 bytes, and at most 6 are read"):
        read_bytes(tmp_path / "file", 6)


@pytest.mark.parametrize(
    "text", ["[" * 200_000, "9" * 6_000, "{", "\ud800".encode("utf-8", "surrogatepass"), b"\xff\xfe\x00"]
)
def test_what_is_no_json_is_a_value_error(tmp_path, text):
    (tmp_path / "file.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="file.json: cannot be read as JSON"):
        read_json(tmp_path / "file.json", 1 << 20)
