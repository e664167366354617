"""Averages past one process: all cases of some modules, on four gloo processes and then on two."""

from __future__ import annotations

import shutil

import pytest

from tests.processes import assert_passed, cases, run

MODULES = [
    "tests.sharded_cases",
    "tests.sharded_state_cases",
    "tests.parallel_cases",
    "tests.agreement_cases",
    "tests.ranks_cases",
    "tests.readme_cases",
]
Outcome = dict[str, list[str | None]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> object:
    """For each number of processes."""
    return {world: tmp_path_factory.mktemp(str(world)) for world in (4, 2)}


@pytest.fixture(scope="module")
def four(directory: dict) -> Outcome:
    """How four processes ended."""
    return run(MODULES, 4, directory[4])


@pytest.fixture(scope="module")
def two(directory: dict, four: Outcome) -> Outcome:
    """How two processes ended, which load what the four saved."""
    shutil.copytree(directory[4] / "checkpoint", directory[2] / "checkpoint")
    return run(MODULES, 2, directory[2])


@pytest.mark.parametrize("case", cases(MODULES))
def test_four_ranks(four: Outcome, case: str) -> None:
    assert_passed(four, case)


@pytest.mark.parametrize("case", cases(MODULES))
def test_two_ranks(two: Outcome, case: str) -> None:
    assert_passed(two, case)
