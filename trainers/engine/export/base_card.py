"""Reads what the card of the model that was trained on says of itself: its name on the hub, and its licence."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from datasets_lib.foreign import read_bytes, read_json
from trainers.pretrained import hub_name

CARD, INDEX = "README.md", "model_index.json"
MOST_BYTES = 1 << 20  # of either
FORMS = {
    "license": re.compile(r"[a-z0-9][a-z0-9.+-]{0,59}"),  # the hub's identifiers
    "license_name": re.compile(r"[\w.+-][\w .+-]{0,99}"),
    "license_link": re.compile(r"https://[^\s<>\"'()]{1,500}"),
}
FILE = re.compile(r"[\w-][\w.-]{0,99}", re.ASCII)


class BaseCard(NamedTuple):
    """Facts about a base model; the texts are another person's, and only those of the expected form."""

    name: str | None = None  # on the hub: its own, or that of the model that a local folder comes from
    license: str | None = None
    license_name: str | None = None  # with the license "other"
    license_link: str | None = None


def read_base_card(source: str | None, revision: str | None, online: bool) -> BaseCard:
    """Reads the card of a folder, of a file (which has none) or of a hub name; nothing that is wrong with it matters.

    A hub's card is looked for among the files that were downloaded before, or with `online` on the hub.
    """
    if source is None:
        return BaseCard()
    folder, found = Path(source), BaseCard()
    name = None if folder.exists() else hub_name(source)
    if folder.is_dir():
        header = _header(folder / CARD)
        named = header.get("base_model")  # a list is as good to the hub
        named = named[0] if isinstance(named, list) and len(named) == 1 else named
        name, found = hub_name(named) or hub_name(_saved_from(folder)), _licence(header, None)
    if name is not None and found.license is None:
        found = _licence(_header(_of_hub(name, revision if name == source else None, online)), name)
    return found._replace(name=name)


def _licence(header: dict[str, Any], repository: str | None) -> BaseCard:
    """Reads the fields of a licence; the name of a file is a link into the repository, if there is one."""
    values = {name: _text(header.get(name), form) for name, form in FORMS.items()}
    if values["license"] is None:
        return BaseCard()
    if (file := _text(header.get("license_link"), FILE)) is not None and repository is not None:
        values["license_link"] = f"https://huggingface.co/{repository}/blob/main/{file}"
    return BaseCard(None, **values)


def _header(path: Path | None) -> dict[str, Any]:
    """Reads the YAML in front of a card's text; empty without one, or if the hub would not read it either."""
    from huggingface_hub import ModelCard

    with suppress(Exception):  # whatever YAML and the hub's classes raise for the text of others
        if path is not None:
            content = read_bytes(path, MOST_BYTES).decode("utf-8-sig")
            return ModelCard(content, ignore_metadata_errors=True).data.to_dict() if content.startswith("---") else {}
    return {}


def _saved_from(folder: Path) -> Any:
    """Returns what diffusers read a pipeline from that it saved in a folder: a hub name, or a folder."""
    with suppress(OSError, ValueError, AttributeError):
        return read_json(folder / INDEX, MOST_BYTES).get("_name_or_path")
    return None


def _of_hub(name: str, revision: str | None, online: bool) -> Path | None:
    from huggingface_hub import hf_hub_download

    with suppress(Exception):  # no network, no card, no access
        return Path(hf_hub_download(name, CARD, revision=revision, local_files_only=not online))
    return None


def _text(value: Any, form: re.Pattern[str]) -> str | None:
    return value if isinstance(value, str) and form.fullmatch(value) else None
