"""A rank that is killed, or hangs, does not hang the others past the process group's timeout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.killed_rank import TIMEOUT


@pytest.mark.parametrize(
    ("how", "where"),
    [("killed", "construction"), ("hangs", "construction"), ("killed", "export"), ("killed", "mean")],
)
def test_the_other_rank_ends_with_an_error(tmp_path: Path, how: str, where: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.killed_rank"]
    first, second = (
        subprocess.Popen(
            [*command, str(rank), str(tmp_path), how, where], env=environment, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    )
    try:
        # A minute for both to start on a busy machine; then only a hang takes longer than the timeout.
        printed, _ = first.communicate(timeout=60 + 5 * TIMEOUT)
    finally:
        second.kill()
        second.communicate()
    assert first.returncode == 3
    assert "Error after" in printed
