"""Files, folders and globs: which images a command is meant to read, and what it calls them."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.inputs import find_inputs


@pytest.fixture
def cameras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (
        "a/1.jpg",
        "a/2.PNG",
        "a/notes.txt",
        "a/.hidden.jpg",
        "a/.trash/1.jpg",
        "b/1.jpg",
        "b/deep/[x].jpg",
    ):
        path = tmp_path / "frames" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(*arguments: str, skip: str = "out") -> list[str]:
    return [item.name for item in find_inputs(arguments, Path(skip))[0]]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["frames/a"], ["1.jpg", "2.PNG"]),
        (["frames/a/"], ["1.jpg", "2.PNG"]),
        (["frames"], ["a/1.jpg", "a/2.PNG", "b/1.jpg", "b/deep/[x].jpg"]),
        (["frames/a", "frames/b"], ["a/1.jpg", "a/2.PNG", "b/1.jpg", "b/deep/[x].jpg"]),
        (["frames/b/1.jpg", "frames/a/1.jpg"], ["b/1.jpg", "a/1.jpg"]),
        (["frames/*/1.jpg"], ["a/1.jpg", "b/1.jpg"]),
        (["frames/**/*.jpg"], ["a/1.jpg", "b/1.jpg", "b/deep/[x].jpg"]),
        (["frames/b/deep/[x].jpg"], ["[x].jpg"]),
        (["frames/a/notes.txt"], ["notes.txt"]),
        (["frames/a/1.jpg", "frames/a/*.jpg", "frames/a"], ["1.jpg", "2.PNG"]),
        (["frames/*"], ["a/1.jpg", "a/2.PNG", "b/1.jpg", "b/deep/[x].jpg"]),
        (["../{here}/frames/a/1.jpg", "frames/b/1.jpg"], ["a/1.jpg", "b/1.jpg"]),
    ],
)
def test_each_file_once_named_below_the_folder_that_all_share(
    cameras: Path, arguments: list[str], expected: list[str]
) -> None:
    assert names(*(argument.format(here=cameras.name) for argument in arguments)) == expected


def test_what_names_nothing_is_returned(cameras: Path) -> None:
    (cameras / "empty").mkdir()
    found, nothing = find_inputs(["nope.jpg", "frames/a/1.jpg", "x/*.png", "empty"], Path("out"))
    assert [item.name for item in found] == ["1.jpg"]
    assert nothing == ["nope.jpg", "x/*.png", "empty"]
    assert find_inputs(["nope"], Path("out")) == ([], ["nope"])


def test_earlier_output_is_no_input(cameras: Path) -> None:
    assert names("frames", skip="frames/b") == ["a/1.jpg", "a/2.PNG"]
    assert names("frames/**/*.jpg", skip="frames/b") == ["1.jpg"]
    assert names("frames/b/1.jpg", skip="frames/b") == ["1.jpg"], "asked for by its name"
