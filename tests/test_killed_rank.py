"""A rank that is killed, or hangs, does not hang the others past the process group's timeout."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.killed_rank import TIMEOUT, lose_a_rank
from tests.processes import start


@pytest.mark.parametrize(
    ("how", "where"),
    [("killed", "construction"), ("hangs", "construction"), ("killed", "export"), ("killed", "mean")],
)
def test_the_other_rank_ends_with_an_error(tmp_path: Path, how: str, where: str) -> None:
    first, second = start(lose_a_rank, 2, tmp_path, how, where)
    try:
        # A minute for both to start on a busy machine; then only a hang takes longer than the timeout.
        first.join(60 + 5 * TIMEOUT)
    finally:
        first.kill()
        second.kill()
    assert first.exitcode == 3
    assert "Error: " in (tmp_path / "error").read_text()
