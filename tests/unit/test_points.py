"""The crash points of federation/points.py and the code agree: no point is forgotten, none is unknown.

`uses` reads one module's source. Every module that ships is read, and so is one made-up module for every mistake.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from federation.points import Point, reach, watch

ROOT = Path(__file__).parents[2]
POINTS = "federation/points.py"


@dataclass
class Uses:
    """What a module does with points: those it reaches, and what it may not do, each with its line."""

    reached: set[Point] = field(default_factory=set)
    mistakes: list[str] = field(default_factory=list)


def uses(source: str) -> Uses:
    found = Uses()
    tree = ast.parse(source)
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        match node:
            case ast.Name(id="reach") | ast.Attribute(attr="reach"):
                call = calls.get(id(node))
                point = None if call is None else _literal(call)
                if point is None:
                    found.mistakes.append(f"line {node.lineno}: reach takes one Point.X")
                else:
                    found.reached.add(point)
            case ast.ImportFrom(module="federation.points"):
                found.mistakes += [
                    f"line {node.lineno}: from federation.points import {name.name}"
                    for name in node.names
                    if name.name not in ("Point", "reach") or name.asname
                ]
            case ast.ImportFrom(module="federation"):
                found.mistakes += [
                    f"line {node.lineno}: from federation import points"
                    for name in node.names
                    if name.name == "points"
                ]
            case ast.Import() if any(name.name == "federation.points" for name in node.names):
                found.mistakes.append(f"line {node.lineno}: import federation.points")
    return found


def _literal(call: ast.Call) -> Point | None:
    match call:
        case ast.Call(args=[ast.Attribute(value=ast.Name(id="Point"), attr=name)], keywords=[]):
            return Point.__members__.get(name)
    return None


def shipped() -> Iterator[Path]:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for package in {name.partition(".")[0] for name in listed["packages"]}:
        yield from (ROOT / package).rglob("*.py")
    yield from (ROOT / f"{module}.py" for module in listed["py-modules"])


MODULES = sorted(str(path.relative_to(ROOT)) for path in shipped())


@pytest.mark.parametrize("module", [name for name in MODULES if name != POINTS])
def test_a_module_names_the_points_that_it_reaches(module: str) -> None:
    assert uses((ROOT / module).read_text()).mistakes == []


def test_every_point_is_reached_somewhere() -> None:
    reached = {point for module in MODULES for point in uses((ROOT / module).read_text()).reached}
    assert [point.name for point in Point if point not in reached] == []


IMPORT = "from federation.points import Point, reach\n"


@pytest.mark.parametrize(
    "source",
    [
        "reach(Point.NO_SUCH_POINT)",
        "reach(Point('trained, nothing on disk'))",
        "reach(point)",
        "reach()",
        "reach(Point.TRAINED, Point.UPLOADED)",
        "reach(point=Point.TRAINED)",
        "points.reach(name)",
        "f = reach",
        "from federation.points import watch",
        "from federation.points import reach as r",
        "from federation.points import *",
        "from federation import points",
        "import federation.points",
        "import federation.points as p",
    ],
)
def test_mistakes_are_found(source: str) -> None:
    assert len(uses(IMPORT + source).mistakes) == 1


def test_what_is_right_passes() -> None:
    found = uses(IMPORT + "def f():\n    if True:\n        reach(Point.TRAINED)\n    reach(Point.UPLOADED)")
    assert found == Uses(reached={Point.TRAINED, Point.UPLOADED})


def test_a_hook_sees_the_points_until_it_is_taken_away() -> None:
    seen: list[Point] = []
    watch(seen.append)
    try:
        reach(Point.TRAINED)
        reach(Point.UPLOADED)
    finally:
        watch(None)
    reach(Point.CONFIRMED)
    assert seen == [Point.TRAINED, Point.UPLOADED]
