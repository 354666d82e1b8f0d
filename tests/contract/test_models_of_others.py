"""What has weights is read in one place, where safetensors are asked for and code is refused."""

from __future__ import annotations

import ast

import pytest
from repository import ROOT

PLACE = "trainers/pretrained.py"
OWN = {  # what the same file has just written
    "scripts/data/make_base.py": ["CLIPTokenizer.from_pretrained"],
    "scripts/benchmarks/lora.py": ["UNet2DConditionModel.from_pretrained"],
}
FILES = [
    "train.py",
    *(str(p.relative_to(ROOT)) for f in ("trainers", "datasets_lib", "scripts") for p in (ROOT / f).rglob("*.py")),
]
READERS = ("from_pretrained", "from_single_file", "load_lora_weights", "load_attn_procs", "load_textual_inversion")


@pytest.mark.parametrize("path", sorted(path for path in FILES if path != PLACE))
def test_nobody_else_reads_models(path):
    calls = [node.func for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.Call)]
    found = [ast.unparse(call) for call in calls if isinstance(call, ast.Attribute) and call.attr in READERS]
    assert found == OWN.get(path, [])


def test_that_place_asks_for_safetensors():
    calls = [node for node in ast.walk(ast.parse((ROOT / PLACE).read_text())) if isinstance(node, ast.Call)]
    readers = {ast.unparse(call) for call in calls if ast.unparse(call.func) == "kind.from_pretrained"}
    assert readers == {
        "kind.from_pretrained(source, use_safetensors=True, **options)",  # what has weights
        "kind.from_pretrained(source, **options)",
    }
