"""Fixtures of streams."""

from __future__ import annotations

import pytest
from shard_files import write_shards
from streams import KINDS, SIZES

from datasets_lib.streaming import reader as stream_reader


@pytest.fixture(params=KINDS)
def folder(request, tmp_path):
    return write_shards(tmp_path / "shards", request.param, SIZES)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(stream_reader, "RETRY_SECONDS", 0.001)
