"""Several runs become one file: the middle run, the widest intervals, and no wrong result lost."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

from benchmarks import merge as module
from benchmarks.__main__ import main
from benchmarks.merge import merge
from benchmarks.pictures.measurements import read
from benchmarks.providers import CACHED, OURS, TORCH
from tests.measurement_files import update, write


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three runs, of the second and third of which a row is missing, and of the third a file too."""
    made = []
    for number, (time, ratio) in enumerate((("18900", "3.5"), ("20000", "3.9"), ("17000", "3.0"))):
        folder = tmp_path / str(number)
        folder.mkdir()
        rows = [
            update("resnet50", OURS, "5000", "1", rounds=9, share_of_ceiling="0.7"),
            update("resnet50", TORCH, time, ratio, rounds=5, share_of_ceiling=("0.25", "0.23", "0.3")[number]),
        ]
        if not number:
            rows.append(update("gpt2", CACHED, "40000", "1.1", rounds=7))
        write(folder / "cpu.csv", "update", rows, timestamp=f"2026-11-2{number}T00:00:00+00:00")
        if number < 2:
            write(folder / "swap-cpu.csv", "swap", rows)
        made.append(folder)
    return made


def test_the_middle_run_and_the_widest_intervals(folders: list[Path], tmp_path: Path) -> None:
    assert merge(folders, tmp_path) == [tmp_path / "cpu.csv", tmp_path / "swap-cpu.csv"]
    ours, torch, cached = read(tmp_path / "cpu.csv", ())
    assert ours["p50_us"] == "5000"
    # By the sum of its times the second, since the first has one more.
    assert torch["timestamp"] == "2026-11-21T00:00:00+00:00"
    assert torch["command"] == "python -m benchmarks update # 3 runs"
    measured = ("p50_us", "ratio_to_fastswa", "share_of_ceiling")
    assert [torch[name] for name in measured] == ["20000", "3.9", "0.23"]
    # A tenth below the least ratio, and above the greatest; the times have no interval of their own in each file.
    assert [torch[name] for name in ("ratio_p20", "ratio_p80", "p20_us", "p80_us")] == ["2.7", "4.29", "17000", "20000"]
    assert [ours["rounds"], torch["rounds"], cached["rounds"]] == ["27", "15", "7"]
    assert [cached["ratio_to_fastswa"], cached["command"]] == ["1.1", "python -m benchmarks update"]
    assert read(tmp_path / "swap-cpu.csv", ())[0]["command"].endswith("# 2 runs")


def test_a_single_run_stays_as_it_is(folders: list[Path], tmp_path: Path) -> None:
    merge(folders[:1], tmp_path)
    for name in ("cpu.csv", "swap-cpu.csv"):
        assert (tmp_path / name).read_bytes() == (folders[0] / name).read_bytes()


def test_what_was_wrong_once_has_no_time(tmp_path: Path) -> None:
    folders = [tmp_path / "good", tmp_path / "bad"]
    for folder, values in zip(folders, (("5", "1", "yes"), ("", "", "wrong: head.bias is off by 1")), strict=True):
        folder.mkdir()
        write(folder / "cpu.csv", "update", [update("resnet50", OURS, *values[:2], checked=values[2])])
    merge(folders, tmp_path)
    (row,) = read(tmp_path / "cpu.csv", ())
    assert row["checked"] == "wrong: head.bias is off by 1"
    assert {row[name] for name in ("p20_us", "p50_us", "p80_us", "ratio_to_fastswa", "ratio_p20")} == {""}


def test_what_was_disturbed_does_not_count(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("quiet", "disturbed", "quiet too")]
    runs = (("3500", "3.5", 4), ("3200", "9", 5), ("3000", "3", 0))
    for folder, (time, ratio, disturbed) in zip(folders, runs, strict=True):
        folder.mkdir()
        times = {OURS: "1000", TORCH: time}
        rows = [update("gpt2", name, time, ratio, rounds=9, disturbed=disturbed) for name, time in times.items()]
        rows.append(update("resnet50", TORCH, "1000", ratio, rounds=9, disturbed=5))
        write(folder / "cpu.csv", f"update {folder.name}", rows)
    merge(folders, tmp_path)
    _, gpt2, resnet50 = read(tmp_path / "cpu.csv", ())
    columns = ("p50_us", "ratio_to_fastswa", "ratio_p20", "ratio_p80", "rounds", "disturbed")
    assert [gpt2[column] for column in columns] == ["3500", "3.5", "2.7", "3.85", "18", "4"]
    # The command of the run whose numbers they are, and not of the middle one, which was disturbed.
    assert gpt2["command"] == "python -m benchmarks update quiet # 3 runs"
    # No other is there.
    assert [resnet50[column] for column in columns[2:]] == ["2.7", "9.9", "27", "15"]


def test_a_file_without_rows_is_left_out(folders: list[Path], tmp_path: Path) -> None:
    heading = (folders[0] / "cpu.csv").read_text().splitlines()[0]
    (folders[0] / "step-cpu.csv").write_text(heading + "\n")
    assert tmp_path / "step-cpu.csv" not in merge(folders, tmp_path)


def test_the_command(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", *map(str, folders[:2]), "--output", str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        str(tmp_path / "new" / name) for name in ("cpu.csv", "swap-cpu.csv")
    ]
    assert main(["merge", str(tmp_path / "nowhere"), "--output", str(tmp_path)]) == 2
    assert "no CSV file" in capsys.readouterr().err


def test_the_example_in_the_docstring_runs() -> None:
    assert doctest.testmod(module) == (0, 1)
