"""`all` runs every part and judges what it wrote; `compare` tells which ratios differ between two runs."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import all as every
from benchmarks.__main__ import main
from benchmarks.compare import by_work
from benchmarks.pictures.measurements import read
from benchmarks.providers import CACHED, OURS, TORCH
from benchmarks.record import RESULTS
from benchmarks.tables.files import load
from benchmarks.targets import TARGETS
from tests.measurement_files import update, write


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """The command lines of the parts, none of which is run; `update` writes a file, and `swap` finds a wrong result."""
    seen: list[Sequence[str]] = []

    def run(command: Sequence[str], check: bool) -> SimpleNamespace:
        seen.append(command[3:])
        if command[3] == "update":
            slow = update("resnet50", TORCH, "18900", "3.5", share_of_ceiling="0.2564", rounds=9)
            path = Path(command[command.index("--output") + 1])
            path.parent.mkdir()
            write(path, "update", [slow])
        return SimpleNamespace(returncode=int(command[3] == "swap"))

    monkeypatch.setattr(subprocess, "run", run)
    return seen


def test_every_part_runs_and_is_judged(
    tmp_path: Path, calls: list[Sequence[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    # Left by an earlier run, which says nothing about this one.
    stale = {"case": "mlp", "provider": "torch update_bn", "ratio_to_fastswa": "2"}
    write(tmp_path / "update_bn-cpu.csv", "update_bn", [stale])
    assert main(["all", "--output", str(tmp_path), "--runs", "2"]) == 1
    assert [command[0] for command in calls] == [*every.PARTS, *every.PARTS]
    for part, prefix in every.PARTS.items():
        first, second = (command for command in calls if command[0] == part)
        assert first[4] != second[4]
        for command in (first, second):
            assert command[1:4] == ["--device", "cpu", "--output"]
            assert Path(command[4]).name == f"{prefix}cpu.csv"
            assert command[5:] == every.SHORTER["cpu"].get(part, [])
    (row,) = read(tmp_path / "cpu.csv", ())
    assert (row["command"], row["rounds"]) == ("python -m benchmarks update # 2 runs", "18")
    printed = capsys.readouterr()
    assert "swap: exit status 1" in printed.err
    assert printed.err.endswith("failed: swap, swap\n")
    asked = [target for target in TARGETS if target.device == "cpu"]
    *lines, counts = printed.out.splitlines()[-len(asked) - 1 :]
    assert [line.split("  ")[0] for line in lines] == [target.work for target in asked]
    assert lines[0].endswith("asked >= 10; at the byte ceiling it would be 3.90")
    assert all("not measured: " in line for line in lines[1:])
    assert counts == f"0 met, 1 NOT MET, {len(asked) - 1} not measured"


@pytest.mark.parametrize("command", ["all", *every.PARTS, "train"])
def test_without_a_gpu_none_is_measured(
    command: str, monkeypatch: pytest.MonkeyPatch, calls: list[Sequence[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([command, "--device", "cuda"]) == 2
    assert not calls
    assert "no CUDA device" in capsys.readouterr().err


def test_intervals_that_do_not_overlap_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, ratios, seconds in ((one, ("3.5", "0.8"), "6"), (other, ("3.9", "1.1"), "5")):
        folder.mkdir()
        rows = [
            update("resnet50", OURS, "5000", "1", ratio_p20="1", ratio_p80="1", rounds=9),
            # 3.5 reaches 3.85, and 3.9 reaches down to 3.51; 0.8 ends at 0.88, and 1.1 starts at 0.99.
            *(
                update("resnet50", name, "18900", ratio, rounds=9)
                for name, ratio in zip((TORCH, CACHED), ratios, strict=True)
            ),
            update("resnet50", f"only in {folder.name}", "1", "1", rounds=9),
            update("gpt2", TORCH, "1", ratios[1], rounds=9, disturbed=5 if folder == one else 0),
        ]
        write(folder / "cpu.csv", f"update --seconds-per-case {seconds}", rows, threads="2" if folder == one else "4")
    write(one / "swap-cpu.csv", "swap", rows)
    # It informs, and judges nothing.
    assert main(["compare", str(one), str(other)]) == 0
    lines = capsys.readouterr().out.splitlines()
    counts = "1 ratios reproduced, 1 apart, 1 disturbed, 1 rows without an interval, 2 in one of the two"
    assert lines == [
        f"cpu.csv: {counts}",
        "  another threads: 2, 4",
        "  apart: resnet50, fp32, cached _foreach_lerp_, 59, 57: 0.800 (0.720 to 0.880) and 1.10 (0.990 to 1.21)",
        "  only in the first: resnet50, fp32, only in one, 59, 57",
        "  only in the second: resnet50, fp32, only in other, 59, 57",
        f"together: {counts}",
    ]


def test_nothing_to_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tmp_path)]) == 2
    assert "no CSV file is in both" in capsys.readouterr().err


@pytest.mark.parametrize("file", load(RESULTS), ids=lambda file: file.path.name)
def test_a_row_is_known_by_what_is_not_measured(file: object) -> None:
    rows = file.rows  # type: ignore[attr-defined]
    assert len(dict(by_work(rows))) == len(rows)
