"""Pictures that say how they were made."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from trainers.inference.picture_files import read_settings, save_picture


def test_a_picture_carries_its_settings(tmp_path):
    settings = {"seed": 3, "prompt": "a café, 猫", "lora": [["a.safetensors", 0.8]]}
    save_picture(Image.new("RGB", (4, 4), "red"), tmp_path / "deep" / "a.png", settings)
    assert read_settings(tmp_path / "deep" / "a.png") == settings
    assert json.loads((tmp_path / "deep" / "a.json").read_text()) == settings


def test_pictures_that_say_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such picture"):
        read_settings(tmp_path / "a.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="does not say how it was made; give a PNG that diffloop's scripts wrote"):
        read_settings(tmp_path / "a.png")
