"""The folders of kohya's main file: sub-folders called 10_name, pictures of the class, and those of fine-tuning."""

from __future__ import annotations

import re
from pathlib import Path

from trainers.inference.foreign_configs.translation import Cell, Translation

NUMBERED = re.compile(r"(\d+)_(.*)")


def main_folders(made: Translation) -> None:
    """Takes over 10_name, or the folder of fine-tuning, which has metadata."""
    if (prefix := str(made.given.get("caption_prefix", "")).strip(" ,")) != "":
        made.write("base.trigger_word", prefix, "caption_prefix")
    folder, repeats = made.read("train_data_dir"), made.read("dataset_repeats") or 1
    if folder is None:
        return
    if "in_json" not in made.given:
        _class_folders(made, Path(str(folder)))
        made.write("base.train_data_dir", folder, "train_data_dir")
        if not isinstance(made.entries["base.train_data_dir"].value, list):
            made.write("base.folder_repeats", True, remark="10_name, as there")
        made.leave("dataset_repeats", "the folders' names say it: 10_name")
    elif repeats > 1:
        table = {"path": Cell(folder, ("train_data_dir",)), "repeats": Cell(repeats, ("dataset_repeats",))}
        made.write("base.train_data_dir", [table], "train_data_dir", "dataset_repeats")
    made.leave("dataset_repeats", "is 1, as here")


def _class_folders(made: Translation, folder: Path) -> None:
    if "reg_data_dir" not in made.given:
        return
    source = Path(str(made.given["reg_data_dir"]))
    found, own = _numbered(source), _numbered(folder)
    if source.is_dir() and not found:
        made.leave("reg_data_dir", "has no folder like 1_name, so it has no effect there")
    elif len(found) > 1 and own:
        tables = [{"path": Cell(str(path)), "caption": Cell(name), "repeats": Cell(times)} for path, times, name in own]
        tables += [
            {"path": Cell(str(path)), "caption": Cell(name), "regularization": Cell(True)} for path, _, name in found
        ]
        tables[0]["path"] = Cell(tables[0]["path"].value, ("train_data_dir",))
        tables[len(own)]["path"] = Cell(tables[len(own)]["path"].value, ("reg_data_dir",))
        made.write("base.train_data_dir", tables, "train_data_dir", "reg_data_dir")
    else:
        made.write("base.class_data_dir", str(found[0][0] if found else source), "reg_data_dir")
        if found:
            made.write("base.class_caption", found[0][2], remark="the folder's name")


def _numbered(folder: Path) -> list[tuple[Path, int, str]]:
    """(path, repeats, name) of sub-folders called like 10_name; none if the folder is not there."""
    paths = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    found = [(path, NUMBERED.fullmatch(path.name)) for path in paths]
    return [(path, int(match[1]), match[2]) for path, match in found if match and int(match[1]) > 0]
