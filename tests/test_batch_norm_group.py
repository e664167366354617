"""update_bn over two gloo processes that see unequal parts of the data."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastswa
from tests.batch_norm import Residual, assert_statistics_close, batches, statistics

OPTIONS = {
    "torch": {},
    "weighted": {"estimator": "weighted"},
    "population": {"estimator": "population"},
    "sweeps": {"sweeps": 2},
}
PARTS = {"unequal": [(0, 4), (4, None)], "one without data": [(0, None), (0, 0)]}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What two processes ended with."""
    directory = tmp_path_factory.mktemp("group")
    torch.manual_seed(0)
    # float64, so that a difference would show that the buffers' own rounding would hide.
    given = {
        "model": Residual().double(),
        "data": [batch.double() for batch in batches(11)],
        "options": OPTIONS,
        "parts": PARTS,
    }
    torch.save(given, directory / "given.pt")
    script = Path(__file__).parent / "batch_norm_process.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), directory], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    # Only a hang takes this long.
    printed = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    ended = [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(2)]
    return {**given, "ended": ended, "printed": printed}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", OPTIONS)
def test_all_processes_end_with_the_statistics_of_all_data(outcome: dict, name: str, part: str) -> None:
    (first, report), (second, other_report) = (results[name, part] for results, _ in outcome["ended"])
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert (report.batches, report.samples) == (other_report.batches, other_report.samples) == (11, 83)
    assert report.worst_standard_error == other_report.worst_standard_error

    alone, together = Residual().double(), Residual().double()
    alone.load_state_dict(outcome["model"].state_dict())
    expected = fastswa.update_bn(outcome["data"], alone, engine="merge", **OPTIONS[name])
    together.load_state_dict(first)
    # float64 rounding: sums about zero lose (mean / deviation)^2, about 10, of the 2^-53 of each of eleven batches.
    assert_statistics_close(together, statistics(alone), 1e-13)
    assert report.worst_standard_error == pytest.approx(expected.worst_standard_error, rel=1e-12)
    assert int(together.norms[0].num_batches_tracked) == 11
    assert report.layers == expected.layers


def test_distributed_data_parallel_sends_no_buffers(outcome: dict) -> None:
    (first, _), (second, _) = outcome["ended"]
    assert all(torch.equal(first["wrapped"][key], second["wrapped"][key]) for key in first["wrapped"])
    assert all(torch.equal(first["wrapped"][key], first["torch", "unequal"][0][key]) for key in first["wrapped"])


def test_the_bar_is_the_first_processs(outcome: dict) -> None:
    assert "update_bn: 100%" in outcome["printed"][0]
    assert "update_bn" not in outcome["printed"][1]


@pytest.mark.parametrize(
    ("case", "first", "second"),
    [
        ("raises", ("OSError", "disk"), ("RuntimeError", "failed on 1 other process")),
        ("nan", ("ValueError", "not finite"), ("ValueError", "not finite")),
        ("nan seen early", ("ValueError", "not finite"), ("RuntimeError", "failed on 1 other process")),
        ("empty", ("ValueError", "gave no batches"), ("ValueError", "gave no batches")),
        ("sweep", ("OSError", "disk"), ("RuntimeError", "failed on 1 other process")),
    ],
)
def test_a_failure_of_one_ends_all(outcome: dict, case: str, first: tuple[str, str], second: tuple[str, str]) -> None:
    for (_, errors), (kind, message) in zip(outcome["ended"], (first, second), strict=True):
        assert errors[case][0] == kind
        assert message in errors[case][1]


def test_the_gathered_statistics_are_not_one_processs_own(outcome: dict) -> None:
    model: nn.Module = Residual().double()
    model.load_state_dict(outcome["model"].state_dict())
    fastswa.update_bn(outcome["data"][:4], model, engine="merge")
    together = Residual().double()
    together.load_state_dict(outcome["ended"][0][0]["torch", "unequal"][0])
    with pytest.raises(AssertionError):
        assert_statistics_close(together, statistics(model), 1e-2)
