"""The house of docs/architecture.md, enforced: who may import whom, and what nobody may do.

`violations` judges one module's source. Every module of ours is judged, and so is one made-up module for
every rule, which must be found guilty: a checker that cannot fail guards nothing.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

OURS: dict[str, set[str]] = {
    "federation": set(),
    "aggregator": {"federation"},
    "storage": {"federation"},
    "broker": {"federation"},
    "detection": {"federation"},
    "producers": {"federation", "storage", "broker", "detection"},
    "tasks": {"federation", "storage", "broker", "detection", "aggregator"},
    "dashboard": {"federation", "storage"},
    "cli": {
        "federation",
        "aggregator",
        "storage",
        "broker",
        "detection",
        "producers",
        "tasks",
        "dashboard",
        "celeryconfig",
    },
    "celeryconfig": {"federation", "broker"},
}
"""Layer -> the layers of ours that it may import, itself always."""

THIRD_PARTY: dict[str, set[str]] = {
    "numpy": {"aggregator", "storage", "detection", "producers", "tasks", "cli"},
    "pydantic": set(OURS),
    "pydantic_settings": {"federation"},
    "cryptography": {"federation"},  # Ed25519, by which sites sign
    "pika": {"broker"},
    "celery": {"tasks", "celeryconfig"},
    "kombu": {"tasks", "celeryconfig"},
    "billiard": {"tasks"},  # Celery's process pool: its exceptions say that a child died
    "minio": {"storage"},
    "urllib3": {"storage"},  # minio's transport: time limits are set and errors caught there
    "redis": {"storage"},
    "torch": {"detection"},
    "torchvision": {"detection"},
    "pycocotools": {"detection"},
    "onnx": {"detection"},
    "onnxruntime": {"detection"},
    "PIL": {"detection", "cli"},
    "av": {"detection"},
    "matplotlib": {"detection", "cli"},
    "yaml": {"detection"},  # data.yaml of YOLO data sets
    "rich": {"cli"},
    "typer": {"cli"},
    "click": {"cli"},
}
"""Distribution's top module -> the layers that may import it. What is not here, nobody may import."""

# A merge worker's image has no torch: two modules lead to it, and only when their tasks run, on fed.evaluate.
EVALUATION_MODULES = ("tasks.evaluate", "tasks.bundle")

# Pure mathematics: what is not in this list does I/O, tells the time, logs, or is not needed.
AGGREGATOR_STANDARD_LIBRARY = {
    "__future__",
    "abc",
    "collections",
    "dataclasses",
    "enum",
    "functools",
    "itertools",
    "math",
    "operator",
    "types",
    "typing",
}
AGGREGATOR_CALLS = {"open", "print", "input", "breakpoint"}
AGGREGATOR_FEDERATION = {"federation.settings"}  # reads the environment

UNPICKLERS = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
PICKLE_EXCEPTIONS = {"PickleError", "UnpicklingError"}  # for `except` clauses: loads nothing
# Code is found by name in one place, which asks what this machine's operator chose.
PLUGINS_MODULE = "federation.plugins"
LOADERS = {"EntryPoint", "EntryPoints", "entry_points", "distribution", "distributions"}
EVALUATORS = {"eval", "exec", "compile", "__import__"}


@dataclass(frozen=True)
class Import:
    """`target` is what must exist as a module, `name` what is taken from it ("" for a plain import)."""

    target: str
    name: str
    lazy: bool
    line: int

    @property
    def top(self) -> str:
        return self.target.partition(".")[0]


def imports(module: str, tree: ast.AST) -> Iterator[Import]:
    """Every import in `tree`; lazy are those that do not run when the module is imported."""
    yield from _imports(module.split("."), tree, lazy=False)


def _imports(module: list[str], node: ast.AST, lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, "", lazy, child.lineno)
        elif isinstance(child, ast.ImportFrom):
            base = module[: -child.level] if child.level else []
            target = ".".join([*base, *([child.module] if child.module else [])])
            for alias in child.names:
                yield Import(target, alias.name, lazy, child.lineno)
        yield from _imports(module, child, lazy or _runs_later(child))


def _runs_later(node: ast.AST) -> bool:
    """True for a function, and for `if TYPE_CHECKING:` (which must not have an else)."""
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name):
        return node.test.id == "TYPE_CHECKING" and not node.orelse
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))


def violations(module: str, source: str) -> list[str]:
    """What `module` (dotted; a package's own file ends in .__init__) does against the rules, with lines."""
    tree = ast.parse(source)
    layer = module.partition(".")[0]
    found: list[str] = []
    for item in imports(module, tree):
        found += [f"{module}:{item.line}: {what}" for what in _import_violations(module, layer, item)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found += [f"{module}:{node.lineno}: {what}" for what in _call_violations(layer, node)]
    return found


def _import_violations(module: str, layer: str, item: Import) -> Iterator[str]:
    top = item.top
    if top in OURS:
        if top != layer and top not in OURS[layer]:
            yield f"{layer} may not import {top}"
        if layer == "tasks" and top == "detection":
            if module not in EVALUATION_MODULES:
                yield f"only {' and '.join(EVALUATION_MODULES)} may import {top}"
            if not item.lazy:
                yield f"{layer} imports {top} inside functions only"
    elif top in UNPICKLERS:
        if not (top == "pickle" and item.name in PICKLE_EXCEPTIONS):
            yield f"nothing is pickled: no {top}"
    elif top not in sys.stdlib_module_names:
        if top not in THIRD_PARTY:
            yield f"{top} is not among the third-party modules that this test lists"
        elif layer not in THIRD_PARTY[top]:
            yield f"{layer} may not import {top}, only {', '.join(sorted(THIRD_PARTY[top]))} may"
    elif top == "importlib" and "import_module" in (item.name, item.target.rpartition(".")[2]):
        yield "imports are written as imports, where they can be checked"
    elif item.target == "importlib.metadata" and item.name in LOADERS | {""} and module != PLUGINS_MODULE:
        yield f"only {PLUGINS_MODULE} loads code by name"
    elif layer == "aggregator" and top not in AGGREGATOR_STANDARD_LIBRARY:
        yield f"aggregator is pure: no {top}"
    if layer == "aggregator" and AGGREGATOR_FEDERATION & {item.target, f"{item.target}.{item.name}"}:
        yield "aggregator is pure: no federation.settings"
    if item.target == "torch" and item.name == "load":
        yield "write torch.load(…, weights_only=True) in full"


def _call_violations(layer: str, call: ast.Call) -> Iterator[str]:
    function = call.func
    if isinstance(function, ast.Name):
        if function.id in EVALUATORS:
            yield f"no {function.id}()"
        if layer == "aggregator" and function.id in AGGREGATOR_CALLS:
            yield f"aggregator is pure: no {function.id}()"
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        owner, name = function.value.id, function.attr
        if owner == "builtins" and name in EVALUATORS:
            yield f"no {name}()"
        if owner == "importlib" and name == "import_module":
            yield "imports are written as imports, where they can be checked"
        if owner == "torch" and name == "load" and not _keyword_is(call, "weights_only", True):
            yield "torch.load without weights_only=True unpickles"
        if owner in ("np", "numpy") and name == "load" and _has_keyword(call, "allow_pickle"):
            yield "numpy.load with allow_pickle unpickles"


def _keyword_is(call: ast.Call, name: str, value: object) -> bool:
    return any(
        k.arg == name and isinstance(k.value, ast.Constant) and k.value.value is value for k in call.keywords
    )


def _has_keyword(call: ast.Call, name: str) -> bool:
    return any(k.arg == name and not _keyword_is(call, name, False) for k in call.keywords)


# --- our modules ---------------------------------------------------------------------------------------


def module_files() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    found = {"celeryconfig": ROOT / "celeryconfig.py"}
    for layer in OURS:
        for path in sorted((ROOT / layer).rglob("*.py")):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path
    return found


@pytest.mark.parametrize("module", sorted(module_files()))
def test_module_keeps_the_rules(module: str) -> None:
    assert violations(module, module_files()[module].read_text(encoding="utf-8")) == []


def test_every_package_is_judged_and_ships() -> None:
    """Packages are listed, never discovered: one that is forgotten in pyproject.toml is missing in an image."""
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {name.rpartition(".")[0] for name in module_files()} - {""}
    assert folders == set(shipped["packages"])
    assert set(shipped["py-modules"]) == {"celeryconfig"}
    assert {folder.partition(".")[0] for folder in folders} | {"celeryconfig", "dashboard"} == set(OURS)
    for folder in folders:
        assert (ROOT / folder.replace(".", "/") / "__init__.py").exists(), folder


# --- the checker can fail ------------------------------------------------------------------------------

GUILTY = [
    ("federation.types", "import storage.blob", "federation may not import storage"),
    ("federation.types", "from aggregator import merge", "federation may not import aggregator"),
    ("aggregator.merge", "import storage", "aggregator may not import storage"),
    ("storage.log", "from aggregator.decide import decide", "storage may not import aggregator"),
    ("storage.log", "def f():\n    import broker", "storage may not import broker"),
    ("broker.rabbit", "import storage", "broker may not import storage"),
    ("detection.train", "import storage.blob", "detection may not import storage"),
    ("producers.agent", "from tasks import app", "producers may not import tasks"),
    ("producers.agent", "import aggregator", "producers may not import aggregator"),
    ("tasks.accept", "import producers.outbox", "tasks may not import producers"),
    ("tasks.accept", "def f():\n    from cli.main import app", "tasks may not import cli"),
    ("dashboard.page", "import broker", "dashboard may not import broker"),
    ("celeryconfig", "from tasks.celery import app", "celeryconfig may not import tasks"),
    ("storage.__init__", "from . import blob\nimport tasks", "storage may not import tasks"),
    ("tasks.ingress", "import pika", "tasks may not import pika"),
    ("producers.agent", "from pika.exceptions import AMQPError", "producers may not import pika"),
    ("broker.rabbit", "import celery", "broker may not import celery"),
    ("cli.server", "from celery import Celery", "cli may not import celery"),
    ("producers.agent", "import kombu", "producers may not import kombu"),
    ("tasks.publish", "from minio.error import S3Error", "tasks may not import minio"),
    ("tasks.publish", "import redis", "tasks may not import redis"),
    ("storage.tensors", "import torch", "storage may not import torch"),
    ("tasks.evaluate", "def f():\n    import torch", "tasks may not import torch"),
    ("producers.agent", "import torchvision.ops", "producers may not import torchvision"),
    ("cli.model", "from pycocotools.coco import COCO", "cli may not import pycocotools"),
    ("tasks.evaluate", "from detection import evaluate", "inside functions only"),
    ("tasks.evaluate", "if True:\n    import detection", "inside functions only"),
    ("tasks.evaluate", "if TYPE_CHECKING:\n    pass\nelse:\n    import detection", "inside functions only"),
    (
        "tasks.publish",
        "def f():\n    import detection",
        "only tasks.evaluate and tasks.bundle may import detection",
    ),
    ("aggregator.merge", "import os", "aggregator is pure: no os"),
    ("aggregator.merge", "import time", "aggregator is pure: no time"),
    ("aggregator.merge", "from datetime import datetime", "aggregator is pure: no datetime"),
    ("aggregator.merge", "import logging", "aggregator is pure: no logging"),
    ("aggregator.merge", "from pathlib import Path", "aggregator is pure: no pathlib"),
    ("aggregator.merge", "import random", "aggregator is pure: no random"),
    ("aggregator.merge", "open('x')", "aggregator is pure: no open"),
    ("aggregator.merge", "print(1)", "aggregator is pure: no print"),
    ("aggregator.merge", "from federation import settings", "no federation.settings"),
    ("aggregator.merge", "from federation.settings import Settings", "no federation.settings"),
    ("storage.tensors", "import pickle", "nothing is pickled: no pickle"),
    ("storage.tensors", "from pickle import loads", "nothing is pickled: no pickle"),
    ("storage.tensors", "def f():\n    import marshal", "nothing is pickled: no marshal"),
    ("storage.tensors", "import shelve", "nothing is pickled: no shelve"),
    ("detection.weights", "torch.load(path)", "torch.load without weights_only=True"),
    ("detection.weights", "torch.load(path, weights_only=False)", "torch.load without weights_only=True"),
    ("detection.weights", "torch.load(path, weights_only=flag)", "torch.load without weights_only=True"),
    ("detection.weights", "from torch import load", "write torch.load"),
    ("storage.tensors", "np.load(path, allow_pickle=True)", "numpy.load with allow_pickle"),
    ("cli.main", "eval('1')", "no eval()"),
    ("cli.main", "def f():\n    exec('x = 1')", "no exec()"),
    ("cli.main", "import builtins\nbuiltins.exec('x = 1')", "no exec()"),
    ("tasks.accept", "__import__('torch')", "no __import__()"),
    ("tasks.accept", "import importlib\nimportlib.import_module('torch')", "imports are written as imports"),
    ("tasks.accept", "from importlib import import_module", "imports are written as imports"),
    (
        "detection.registry",
        "from importlib.metadata import entry_points",
        "only federation.plugins loads code",
    ),
    ("producers.agent", "from importlib.metadata import EntryPoint", "only federation.plugins loads code"),
    ("detection.registry", "import importlib.metadata", "only federation.plugins loads code"),
    ("storage.blob", "import boto3", "boto3 is not among the third-party modules"),
]


@pytest.mark.parametrize(("module", "source", "expected"), GUILTY)
def test_the_checker_finds(module: str, source: str, expected: str) -> None:
    found = violations(module, source)
    assert any(expected in line for line in found), found


INNOCENT = [
    ("tasks.evaluate", "def f():\n    from detection.evaluate import evaluate"),
    ("tasks.evaluate", "if TYPE_CHECKING:\n    import detection.dataset"),
    ("cli.model", "import detection.draw"),
    ("cli.site", "import producers.agent, tasks.celery"),
    ("celeryconfig", "from kombu import Queue\nfrom federation.settings import Settings\nimport broker"),
    (
        "aggregator.merge",
        "import numpy as np\nfrom dataclasses import dataclass\nfrom federation import types",
    ),
    ("aggregator.__init__", "from .merge import fold\nfrom . import decide"),
    ("detection.weights", "import torch\ntorch.load(path, weights_only=True)\nmodel.eval()"),
    ("detection.weights", "from pickle import UnpicklingError"),
    ("storage.s3", "from minio import Minio\nimport redis, os, time"),
    ("cli.main", "from importlib.metadata import version"),
    ("federation.plugins", "from importlib.metadata import EntryPoint, entry_points"),
]


@pytest.mark.parametrize(("module", "source"), INNOCENT)
def test_the_checker_lets_pass(module: str, source: str) -> None:
    assert violations(module, source) == []


# --- what importing really loads -----------------------------------------------------------------------


def loaded_by(module: str, cwd: Path) -> set[str]:
    """Top names in sys.modules of a new process that imports `module`."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,  # a folder without a settings file
        env={name: value for name, value in os.environ.items() if not name.startswith("FEDQUEUE_")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_importing_federation_loads_nothing_else_of_ours(tmp_path: Path) -> None:
    for module in ("federation", "federation.wire", "federation.settings", "federation.layout"):
        assert loaded_by(module, tmp_path) & set(OURS) == {"federation"}


@pytest.mark.parametrize(
    "module", ["tasks.celery", "tasks.ingress", "tasks.publish", "tasks.evaluate", "tasks.bundle", "cli.main"]
)
def test_the_server_starts_without_torch(module: str, tmp_path: Path) -> None:
    if not (ROOT / module.replace(".", "/")).with_suffix(".py").exists():
        pytest.skip(f"{module} is not written yet")
    loaded = loaded_by(module, tmp_path)
    assert module.partition(".")[0] in loaded
    assert not loaded & {"torch", "torchvision", "pycocotools", "PIL", "matplotlib"}
