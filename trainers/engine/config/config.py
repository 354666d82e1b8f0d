"""Turns a config file and overrides into two checked dataclasses, or into one message that lists every problem."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from datasets_lib.checks import nearest
from datasets_lib.foreign import named_object, shown
from trainers import TRAINERS
from trainers.base import Section, Trainer, TrainerConfig
from trainers.engine.config.base_options import OF_CAPTIONS, BaseConfig
from trainers.engine.config.files import ConfigError, read_config_file
from trainers.engine.config.launcher import resolve_launcher_values
from trainers.engine.config.overrides import parse_overrides, with_typed_texts
from trainers.engine.config.schema import UNDECIDED, coerce, options
from trainers.engine.config.texts import ENVIRONMENT, OF_TEXTS, text_problem
from trainers.engine.config.trust import OWN, Trust
from trainers.engine.optim.table import optimizer_problem

Check = Callable[[BaseConfig], Iterable[tuple[str, str]]]
Schemas = dict[str, type[Section]]  # of the two sections, by name


class RunConfig(NamedTuple):
    """A checked configuration: the task's name, both sections and the class that trains it."""

    task: str
    base: BaseConfig
    config: TrainerConfig
    trainer_class: type[Trainer]

    def as_dict(self) -> dict[str, dict[str, Any]]:
        return {"base": dataclasses.asdict(self.base), self.task: dataclasses.asdict(self.config)}

    def as_yaml(self) -> str:
        return OmegaConf.to_yaml(OmegaConf.create(self.as_dict()))


def load_config(
    path: str | Path,
    overrides: list[str] | None = None,
    data_problems: Check = lambda base: (),
    trust_code: bool = False,
) -> RunConfig:
    """Reads CONFIG, applies `section.key=value` overrides and checks it; `data_problems` checks the data options."""
    trust = Trust.of_config(Path(path), trust_code, overrides or [])

    def problems(base: BaseConfig) -> Iterator[tuple[str, str]]:
        if problem := trust.problem("dataset", base.dataset):
            yield "dataset", problem
        yield from data_problems(base)

    return check_config(read_config_file(Path(path)), overrides, problems, trust)


def check_config(
    document: dict[str, Any],
    overrides: list[str] | None = None,
    data_problems: Check = lambda base: (),
    trust: Trust = OWN,
) -> RunConfig:
    """Checks a document that has been read already; see load_config. Its data set is not imported, and not judged."""
    given, problems = parse_overrides(overrides or [])
    task = _task_of(document, given)
    trainer_class = find_trainer(task, (document["base"] | given.get("base", {})).get("trainer_class"), trust)
    schemas: Schemas = {"base": BaseConfig, task: trainer_class.Config}
    given, empty = with_typed_texts(given, overrides or [], schemas)
    problems += empty
    document = _resolve(_merge(document, given, schemas))

    checked: dict[str, dict[str, Any]] = {}
    for name in schemas:
        checked[name], wrong_values = _check_section(name, document[name], schemas)
        problems += wrong_values
    base, config = BaseConfig(**checked["base"]), trainer_class.Config(**checked[task])
    of_base = [*_untrusted(base, trust), *data_problems(base), *base.problems()]
    of_base += base.without_effect(OF_CAPTIONS, "a task that reads captions", config.reads_captions)
    on_disk = any(name.startswith("cache_") and value == "disk" for name, value in vars(config).items())
    of_base += base.without_effect(("encoder_cache_dir",), "cache_latents or cache_text: disk", on_disk)
    if base.buckets and not config.takes_buckets:
        of_base.append(("buckets", f"{task} takes pictures of one size; set it to false"))
    if base.export_variant and not config.exports_networks:
        found = f"{task} exports an adapter, and no network that could have variants; set it to null"
        of_base.append(("export_variant", found))
    of_task = list(config.problems(base))
    if problem := optimizer_problem(config.optimizer):
        of_task.append(("optimizer", problem))
    problems += _not_repeated(problems, {"base": (base, of_base), task: (config, of_task)})
    problems += _unknown_changes(base.allow_changes, schemas)
    problems += resolve_launcher_values(base, os.environ)
    if problems:
        raise ConfigError(*problems)
    return RunConfig(task, base, config, trainer_class)


def _not_repeated(problems: list[str], rules: dict[str, tuple[Section, list[tuple[str, str]]]]) -> Iterator[str]:
    """Yields problems between options; one that names a wrong option would only repeat that."""
    wrong = {problem.split(" = ")[0] for problem in problems}
    for name, (section, found) in rules.items():
        names = {option.partition(".")[2] for option in wrong if option.startswith(f"{name}.")}
        for option, reason in found:
            if not names & {option, *re.findall(r"\w+", reason)}:
                yield f"{name}.{option} = {_show(getattr(section, option))}: {reason}"


def _task_of(document: dict[str, Any], given: dict[str, Any]) -> str:
    """Returns the name of the task's section; raises ConfigError for other sections. Empty ones become mappings."""
    tasks = [str(name) for name in document if name != "base"]
    known = ", ".join(TRAINERS)
    problems = []
    if "base" not in document:
        problems.append("base: this section is missing; it holds output_dir, data and durations")
    if len(tasks) != 1:
        found = ", ".join(map(shown, tasks)) or "none"
        problems.append(f"sections: apart from base, exactly one section must name the task ({known}), found {found}")
    for name in [*document, *given]:
        if name not in document:
            has = ", ".join(map(shown, document))
            problems.append(f"{shown(name)}: an override names this section, the file has {has}")
        elif not isinstance(document[name], dict | None):
            problems.append(f"{shown(name)} = {_show(document[name])}: must be a mapping of options to values")
    if problems:
        raise ConfigError(*problems)
    for name in document:
        document[name] = document[name] or {}
    return tasks[0]


def _untrusted(base: BaseConfig, trust: Trust) -> Iterator[tuple[str, str]]:
    """Yields the options that name programs which may not run."""
    for option in ("eval_features", "eval_classifier"):
        if problem := trust.program_problem(getattr(base, option)):
            yield option, problem


def find_trainer(task: str, trainer_class: str | None = None, trust: Trust = OWN) -> type[Trainer]:
    """Imports a task's Trainer: `base.trainer_class` if given, else from TRAINERS; ConfigError if there is none."""
    if trainer_class is None and task not in TRAINERS:
        raise ConfigError(
            f"{shown(task)}: no such task; allowed: {', '.join(TRAINERS)}; did you mean {nearest(task, TRAINERS)}? "
            'For your own class set base.trainer_class: "package.module:Class"'
        )
    given = f"base.trainer_class = {shown(trainer_class)}"
    if problem := trust.problem("trainer_class", trainer_class):
        raise ConfigError(f"{given}: {problem}")
    try:
        found = named_object(str(trainer_class or TRAINERS[task]))
    except (ImportError, AttributeError, ValueError) as error:
        wanted = "must be an importable package.module:Class"
        raise ConfigError(f"{given}: {wanted} ({error}); is its folder on PYTHONPATH?") from None
    if not (isinstance(found, type) and issubclass(found, Trainer)):
        raise ConfigError(f"{given}: must be a subclass of trainers.base.Trainer")
    has_config = issubclass(getattr(found, "Config", object), TrainerConfig)
    lacking = sorted(found.__abstractmethods__) + ([] if has_config else ["a Config derived from TrainerConfig"])
    if lacking:
        raise ConfigError(f"{given}: lacks {', '.join(lacking)}; see trainers/base.py")
    return found


def _merge(document: dict, given: dict, schemas: Schemas) -> dict[str, Any]:
    """Applies overrides: one of an exclusive group replaces the others and their options; `x=null` replaces nothing."""
    for name, schema in schemas.items():
        chosen = {key for key, value in given.get(name, {}).items() if value is not None}
        for group in schema.exclusive:
            if chosen & set(group):
                document[name] = {k: v for k, v in document[name].items() if k not in group}
        gone = {key for option in chosen & schema.reset_with.keys() for key in schema.reset_with[option]}
        document[name] = {k: v for k, v in document[name].items() if k not in gone}
    return _plain(OmegaConf.merge(document, given))


def _resolve(document: dict[str, Any]) -> dict[str, Any]:
    OmegaConf.clear_resolver("oc.env")  # a config is written to the run folder; the environment holds secrets
    try:
        return _plain(OmegaConf.create(document), resolve=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "a reference"
        reason = str(error).splitlines()[0]
        hint = f"; {ENVIRONMENT}" if "oc.env" in reason or re.search(r"key '\w+' not found", reason) else ""
        raise ConfigError(f"{key}: {reason}{hint}") from None


def _plain(config: object, resolve: bool = False) -> dict[str, Any]:
    found = OmegaConf.to_container(config, resolve=resolve, throw_on_missing=resolve)
    return cast("dict[str, Any]", found)  # its type allows for lists too


def _check_section(section: str, values: dict, schemas: Schemas) -> tuple[dict[str, Any], list[str]]:
    """Returns the values that fit, by name, and the problems of the others."""
    known = options(schemas[section])
    checked: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in values.items():
        if key not in known:
            problems += _unknown_option(section, str(key), value, schemas)
            continue
        if value == UNDECIDED:
            problems.append(f"{section}.{key} = {_show(value)}: is to be decided: {known[key].comment}")
            continue
        if isinstance(value, str):
            if problem := text_problem(key, value):
                problems.append(f"{section}.{key} = {_show(shown(value))}: {problem}")
                continue
            value = os.path.expanduser(value) if value.startswith("~/") and not OF_TEXTS.search(key) else value
        try:
            checked[key] = coerce(value, known[key].kind)
        except ValueError as allowed:
            hint = "; a text that reads like a number or word of YAML needs quotes" if "text" in str(allowed) else ""
            hint = hint if isinstance(value, bool | int | float) else ""
            problems.append(f"{section}.{key} = {_show(value)}: must be {allowed}{hint}")
    return checked, problems


def _unknown_option(section: str, key: str, value: Any, schemas: Schemas) -> list[str]:
    """Says what to write instead; nothing for an option of an earlier version whose meaning is the default now."""
    known, given = options(schemas[section]), f"{section}.{shown(key)} = {_show(value)}"
    for old, (name, now) in schemas[section].replaced.get(key, {}).items():
        if old == value:
            return [] if now == known[name].default else [f"{given}: has been replaced; write {name}: {now}"]
    for other, schema in schemas.items():
        if key in options(schema):
            return [f"{given}: unknown option; it belongs in section {other}"]
    return [f"{given}: unknown option; did you mean {section}.{nearest(key, known)}?"]


def _unknown_changes(allowed: list[str], schemas: Schemas) -> Iterator[str]:
    known = ["dataset", "network", "task", *(name for schema in schemas.values() for name in options(schema))]
    for name in allowed:
        section, _, option = name.rpartition(".")
        if (option or name) not in known or (section and section not in schemas):
            yield f"base.allow_changes: {name} is not an option; did you mean {nearest(name, known)}?"


def _show(value: Any) -> str:
    return json.dumps(value, default=str)
