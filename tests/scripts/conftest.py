"""Fixtures of scripts."""

from __future__ import annotations

import pytest

from train import main


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A finished tiny autoencoder of digits, [1, 16, 16] -> [2, 8, 8], with a scale and a shift."""
    folder = tmp_path_factory.mktemp("vae") / "run"
    options = [f"base.output_dir={folder}", "vae.estimate_shift=true", "base.max_train_steps=4"]
    assert main(["configs/tests/vae.json", *options]) == 0
    return folder
