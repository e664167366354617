"""Checks what dist/*.whl contains, and runs the tests against the wheel as it would be installed.

The tests run on a copy that has the checkout's files but not its packages, so that nothing passes by accident through a
file that the wheel lacks. The installed torch is used as it is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("fastswa", "fastswa_kernels")
COPIED = (
    *("tests", "benchmarks", "kernels", "docs"),
    *("pyproject.toml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "constraints.txt"),
)
"""Of the checkout; tests read some of them."""

WHERE = "import fastswa, fastswa_kernels; print(fastswa.__file__); print(fastswa_kernels.__file__)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no options.

    Args:
        parser: of the command.
    """


def run(arguments: argparse.Namespace) -> int:
    """Check the contents, install, test.

    Args:
        arguments: none are used.

    Returns:
        pytest's exit status; 1 if the contents are wrong or other packages than the installed ones are imported.
    """
    wheels = sorted((ROOT / "dist").glob("*.whl"))
    if len(wheels) != 1:
        print(f"{len(wheels)} wheels in dist/; build one with `python -m build --wheel`", file=sys.stderr)
        return 1
    with zipfile.ZipFile(wheels[0]) as archive:
        problems = faults(archive.namelist())
    for problem in problems:
        print(f"{wheels[0].name}: {problem}", file=sys.stderr)
    if problems:
        return 1
    print(f"{wheels[0].name}: contents as expected", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        return _test(wheels[0].resolve(), Path(directory).resolve())


def faults(names: Sequence[str]) -> list[str]:
    """What is wrong with a wheel's list of files.

    Args:
        names: paths in the archive.

    Returns:
        Faults in words; none for a good wheel.

    Example:
        >>> faults(["fastswa/__init__.py", "tests/test_rules.py"])[0]
        "top-level names are ['fastswa', 'tests'], not ['fastswa', 'fastswa_kernels']"
    """
    found = []
    top = sorted({name.split("/")[0] for name in names if ".dist-info/" not in name})
    if top != sorted(PACKAGES):
        found.append(f"top-level names are {top}, not {sorted(PACKAGES)}")
    found += [f"{package}/py.typed is missing" for package in PACKAGES if f"{package}/py.typed" not in names]
    if not any(".dist-info/" in name and name.endswith("/LICENSE") for name in names):
        found.append("LICENSE is missing")
    found += [f"{name} is no source file" for name in names if "__pycache__" in name]
    return found


def _test(wheel: Path, directory: Path) -> int:
    site, copy = directory / "site", directory / "copy"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", site, wheel], check=True)
    copy.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("torch-ext", "__pycache__"))
        elif source.exists():
            shutil.copy(source, copy / name)

    # PYTHONPATH comes before the checkout, which an editable installation appends to sys.path.
    environment = {**os.environ, "PYTHONPATH": str(site)}
    imported = subprocess.run(
        [sys.executable, "-c", WHERE], cwd=copy, env=environment, check=True, capture_output=True, text=True
    ).stdout.split("\n")
    for path in filter(None, imported):
        if not Path(path).resolve().is_relative_to(site):
            print(f"{path} would be tested instead of the wheel", file=sys.stderr)
            return 1
    return subprocess.run([sys.executable, "-m", "pytest", "-q"], cwd=copy, env=environment).returncode
