"""Functions that can be read: how many arguments they take, and how long the loop is."""

from __future__ import annotations

import ast

import pytest
from repository import ROOT

FOLDERS = ("trainers", "datasets_lib", "scripts")
FILES = ["train.py", *sorted(str(p.relative_to(ROOT)) for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def arguments(function):
    """Names of all arguments but self and cls."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    return [argument.arg for argument in named if argument.arg not in ("self", "cls")]


@pytest.mark.parametrize("path", FILES)
def test_a_function_takes_at_most_seven_arguments(path):
    """In what is written: the constructor that a dataclass generates takes one for each field."""
    functions = [node for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, FUNCTIONS)]
    assert [(node.lineno, arguments(node)) for node in functions if len(arguments(node)) > 7] == []


@pytest.fixture(scope="module")
def loop():
    """train() of train.py, which is the whole training loop."""
    [function] = [n for n in ast.parse((ROOT / "train.py").read_text()).body if getattr(n, "name", "") == "train"]
    return function


def test_the_loop_is_a_page(loop):
    assert loop.end_lineno - loop.lineno + 1 <= 80


def test_the_loop_binds_few_names_and_each_once(loop):
    """Without what it imports, and without the variables of `for`."""
    nodes = list(ast.walk(loop))
    loops = [node for node in nodes if isinstance(node, (ast.For, ast.comprehension))]
    counters = {id(name) for each in loops for name in ast.walk(each.target)}
    stored = [node for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    bound = arguments(loop) + [name.id for name in stored if id(name) not in counters]
    assert sorted(bound) == sorted(set(bound))
    assert len(bound) <= 30
    assert not any(isinstance(node, (*FUNCTIONS, ast.ExceptHandler)) for node in nodes[1:])  # these bind names, too


# raised for our own code, which catches it, or for who writes a task
OF_OUR_OWN = {
    "trainers/common/class_pipeline.py": 4,  # works without diffloop, whose callers turn its ValueError into InputError
    "trainers/engine/config/schema.py": 1,  # what an annotation allows
    "trainers/engine/run/randomness.py": 1,  # a draw that a task asks for twice
}


@pytest.mark.parametrize("path", [path for path in FILES if not path.startswith("scripts/benchmarks")])
def test_what_a_user_can_mend_is_raised_as_such(path):
    """Only UserError and its kinds are shown without a traceback."""
    raised = [node.exc for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.Raise)]
    names = [exc.func.id for exc in raised if isinstance(exc, ast.Call) and isinstance(exc.func, ast.Name)]
    bare = [name for name in names if name in ("ValueError", "OSError", "FileNotFoundError", "PermissionError")]
    assert len(bare) == OF_OUR_OWN.get(path, 0), bare
