"""The schemas that editors check configs with: they judge as `coerce` does, and are what the command prints."""

from __future__ import annotations

import json
import math
import re
from typing import Annotated, Literal, get_args, get_origin

import pytest
from json_schemas import CHECKS, is_valid, problems
from repository import ROOT

from train import main
from trainers import TRAINERS
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.config.config import find_trainer, load_config
from trainers.engine.config.files import ConfigError, read_config_file
from trainers.engine.config.json_schema import config_schema
from trainers.engine.config.schema import coerce, options

SCHEMAS = ROOT / "configs/schema"
CONFIGS = sorted(
    path
    for folder in ("configs", "configs/zero_to_lora", "configs/tests")
    for path in (ROOT / folder).iterdir()
    if path.suffix in (".json", ".yaml")
)
[REWRITE] = re.findall(r"```bash\n(for task .*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
SECTIONS = {"base": BaseConfig} | {name: find_trainer(name).Config for name in TRAINERS}
OF_KINDS = [
    *(None, True, False, 0, 1, 3, -1, 2.0, 0.5, -0.5, 1e-12, 5e8, "", "1", "no", "none", "latest", "memory", "l2"),
    *([], [1], [1.0], [0.5], [-1], ["a"], ["a", 1], [None], [True], [[]], {}, {"a": 1}, {"a": -0.5}, {"a": "b"}),
    *({"a": None}, {"a": True}, {"a": [1]}),
]


def parts(kind):
    """The annotation and all that it is made of."""
    yield kind
    for each in get_args(kind) if get_origin(kind) is not Literal else ():
        yield from parts(each)


def samples(kind):
    """Values of every kind, the ends of ranges and what is next to them, the words of enumerations."""
    yield from OF_KINDS
    for part in parts(kind):
        if get_origin(part) is Literal:
            yield from get_args(part)
        if get_origin(part) is Annotated:
            of, bounds = get_args(part)
            for end in (bounds.low, bounds.high):
                if not math.isinf(end):
                    near = (end - 1, end + 1) if of is int else (math.nextafter(end, -9e9), math.nextafter(end, 9e9))
                    yield from (end, *near)


def fits(value, kind):
    try:
        coerce(value, kind)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("section", SECTIONS)
def test_the_schema_judges_values_as_the_check_does(section):
    schema = config_schema(None if section == "base" else section)
    of_section, judged = schema["properties"][section]["properties"], {True: 0, False: 0}
    assert set(of_section) == set(options(SECTIONS[section]))
    for name, option in options(SECTIONS[section]).items():
        for value in samples(option.kind):
            expected = fits(value, option.kind)
            assert is_valid(value, of_section[name], schema) == expected, f"{section}.{name} = {value!r}"
            judged[expected] += 1
        assert is_valid(option.default, of_section[name], schema)
        assert of_section[name]["default"] == option.default
        assert of_section[name]["description"] == option.comment
        assert is_valid("${base.seed}", of_section[name], schema)
    assert min(judged.values()) > 100


def test_the_evaluator_knows_draft_07():
    """The cases that a wrong evaluator would let pass."""
    assert is_valid(1.0, {"type": "integer"})
    for value, schema in (
        (True, {"type": "number"}),
        (True, {"enum": [1]}),
        (0, {"enum": [False]}),
        (1, {"exclusiveMinimum": 1}),
        ({"b": 1}, {"properties": {"a": {}}, "additionalProperties": False}),
        ({"a": 1, "b": 1}, {"oneOf": [{"required": ["a"]}, {"required": ["b"]}]}),
        ("x ${", {"pattern": r"^\$\{"}),
        ([1, "a"], {"items": {"type": "integer"}}),
    ):
        assert len(problems(value, schema)) == 1


def keywords(schema):
    """Every schema's keywords, names of options left out."""
    for keyword, value in schema.items():
        yield keyword
        named = keyword in ("properties", "definitions")
        children = value.values() if named else value if keyword in ("anyOf", "oneOf") else [value]
        for child in children:
            if isinstance(child, dict) and keyword != "default":
                yield from keywords(child)


@pytest.mark.parametrize("name", [*TRAINERS, "all"])
def test_the_shipped_schema_is_what_the_command_prints(name, capsys):
    assert main(["--schema", *([] if name == "all" else [name])]) == 0
    printed, shipped = capsys.readouterr().out, (SCHEMAS / f"{name}.json").read_text()
    assert printed == shipped, f"options have changed; write the schemas again:\n{REWRITE}"
    schema = json.loads(shipped)
    known = {*CHECKS, "$schema", "$ref", "title", "description", "default", "definitions"}
    assert set(keywords(schema)) <= known
    assert '"$ref": "#/definitions/reference"' in shipped
    assert list(schema["definitions"]) == ["reference"]


def test_a_task_has_a_schema_and_a_schema_a_task():
    assert {path.stem for path in SCHEMAS.iterdir()} == {*TRAINERS, "all"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_shipped_config_fits_its_schema(path):
    """And its task's schema is the one that its first line names; a misspelt option or section does not fit."""
    document = read_config_file(path)
    [task] = document.keys() - {"base"}
    for schema in (config_schema(task), config_schema()):
        assert problems(document, schema) == []
        typo = {"base": document["base"] | {"resolutoin": 1}, task: document[task] | {"learning_rat": 1}}
        assert problems(typo, schema) == [
            ".base.resolutoin: additionalProperties",
            f".{task}.learning_rat: additionalProperties",
        ]
        assert ".lorra: additionalProperties" in problems({"base": {}, "lorra": {}}, schema)
        assert problems({"base": {}}, schema) in ([": required"], [": oneOf"])
        two = {"base": {}, "vae": {}, "ddpm": {}}
        assert len(problems(two, schema)) >= 1
    if path.suffix == ".yaml":
        first = path.read_text().splitlines()[0]
        place = first.removeprefix("# yaml-language-server: $schema=")
        assert (path.parent / place).resolve() == SCHEMAS / f"{task}.json"


def test_a_task_outside_the_repository_has_a_section_of_any_name(capsys):
    assert main(["--schema", "trainers.ddpm:DDPMTrainer"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["additionalProperties"] == config_schema("ddpm")["properties"]["ddpm"]
    assert problems({"base": {"seed": 1}, "mine": {"snr_gamma": 5}}, schema) == []
    assert len(problems({"base": {"sed": 1}, "mine": {"snr_gama": 5}}, schema)) == 2


def test_the_schema_of_no_task(capsys):
    assert main(["--schema", "dppm"]) == 2
    assert "dppm: no such task; allowed: ddpm, " in capsys.readouterr().err


def test_a_config_may_name_its_schema(tmp_path):
    document = read_config_file(ROOT / "configs/digits.yaml")
    expected = load_config(ROOT / "configs/digits.yaml")
    for name in ("config.json", "config.yml"):
        path = tmp_path / name
        path.write_text(json.dumps({"$schema": "schema/all.json"} | document))
        run = load_config(path)
        assert run == expected
        assert "$schema" not in run.as_yaml()
        path.write_text(json.dumps({"$schema": 7} | document))
        with pytest.raises(ConfigError, match=r"\$schema = 7: must be text, the schema that an editor reads"):
            load_config(path)
