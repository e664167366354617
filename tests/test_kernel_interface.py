"""Code that calls fastswa_kernels goes on working until the major version changes."""

from __future__ import annotations

import re
import tomllib
from itertools import pairwise

import pytest

import fastswa_kernels
from tests.kernel_interface import ROOT, change, committed, present, text_of

MAJOR, MINOR, _ = map(int, re.findall(r"\d+", fastswa_kernels.__version__))


def test_the_interface_is_the_one_of_its_version() -> None:
    versions = committed()
    newest = max(versions)
    assert newest == (MAJOR, MINOR), "a new version needs its file in kernels/interface/"
    needed = change(versions[newest], present())
    major, minor = (newest[0] + 1, 0) if needed == "major" else (newest[0], newest[1] + 1)
    assert needed == "none", (
        f"this is a {needed} change: set __version__ to {major}.{minor}.0, build.toml's version to {major}, and commit "
        f"kernels/interface/{major}.{minor}.txt:\n{text_of(present())}"
    )


def test_no_minor_version_breaks_another() -> None:
    for (before, old), (after, new) in pairwise(committed().items()):
        assert before[0] < after[0] or change(old, new) == "minor", f"{before} to {after}"


def test_the_hub_serves_the_major_version() -> None:
    build = tomllib.loads((ROOT / "kernels" / "build.toml").read_text())
    assert build["general"]["version"] == MAJOR
    card = (ROOT / "kernels" / "CARD.md").read_text()
    assert {int(version) for version in re.findall(r"version=(\d+)", card)} == {MAJOR}


OLD = {"f": "(x: int, y: int = 1, *, z: int = 2) -> None", "Table": "(x: int)", "Table.launches": ": int"}


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        ({}, "none"),
        ({"g": "() -> None"}, "minor"),
        ({"f": "(x: int, y: int = 1, w: int = 0, *, z: int = 2) -> None"}, "minor"),
        ({"f": "(x: int, y: int = 1, *, z: int = 2, w: int = 0) -> None"}, "minor"),
        ({"f": "(x: int, y: int = 1, *, w: int, z: int = 2) -> None"}, "major"),
        ({"f": "(x: int, w: int = 0, y: int = 1, *, z: int = 2) -> None"}, "major"),
        ({"f": "(x: int, y: int = 1) -> None"}, "major"),
        ({"f": "(x: int, y: int = 2, *, z: int = 2) -> None"}, "major"),
        ({"f": "(x: int, renamed: int = 1, *, z: int = 2) -> None"}, "major"),
        ({"f": "(x: float, y: int = 1, *, z: int = 2) -> None"}, "major"),
        ({"f": "(x: int, y: int = 1, *, z: int = 2) -> int"}, "major"),
        ({"Table": "(x: int, y: int)"}, "major"),
        ({"Table.launches": "() -> int"}, "major"),
        ({"f": None}, "major"),
    ],
)
def test_changes_are_told_apart(edit: dict[str, str | None], expected: str) -> None:
    new = {name: signature for name, signature in {**OLD, **edit}.items() if signature is not None}
    assert change(OLD, new) == expected


def test_every_public_name_is_in_the_interface_and_on_the_card() -> None:
    card = (ROOT / "kernels" / "CARD.md").read_text()
    for name in fastswa_kernels.__all__:
        assert name in present() or any(key.startswith(f"{name}.") for key in present()), name
        # The shape of a launch is for those who tune it.
        assert f"`{name}" in card or f".{name}" in card or name == "LaunchConfig", name
