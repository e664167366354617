"""The benchmark of what is paid once: imports in turns, first updates in fresh processes, tensors that moved."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import cold, cold_import
from benchmarks.__main__ import main
from benchmarks.cold import Row, measurements
from benchmarks.cold_import import KINDS
from benchmarks.cold_updates import CONSTRUCTED, FIRST, MOVES, ORDINARY, moved_updates
from benchmarks.measure import Times
from benchmarks.providers import CACHED, OURS, PROVIDERS, TORCH, Plan, Prepared
from benchmarks.record import HEADINGS

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Two threads on a busy machine wait for one another in every call, and the times do not matter here.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imports of torch that took 2 s beside fastswa's 2.6 s."""
    times = {"fastswa": Times([[2.6e6], [2.6e6]]), "torch": Times([[2e6], [2e6]])}
    monkeypatch.setattr(cold, "import_times", lambda rounds: dict.fromkeys(KINDS, times))


@pytest.mark.usefixtures("imported")
def test_every_cost_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cold.csv"
    options = ["--cases", "resnet20", "--rounds", "2", "--seconds-per-case", "0.01", "--output", str(path)]
    assert main(["cold", *options]) == 0
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [HEADINGS.get(column.name, column.name) for column in fields(Row)]
    expected = [(kind, "process", module) for kind in KINDS for module in ("fastswa", "torch")]
    expected += [(cost, "resnet20", name) for cost in (CONSTRUCTED, FIRST, *MOVES) for name in PROVIDERS]
    assert [(row["quantity"], row["case"], row["provider"]) for row in rows] == expected
    for row in rows:
        if row["provider"] == CACHED and row["quantity"] in MOVES and row["quantity"] != ORDINARY:
            # The lists hold the memory that the parameters left.
            assert row["checked"].startswith("wrong: stem.weight is off by")
            assert not row["p50_us"]
            continue
        assert row["checked"] == ("no result" if row["case"] == "process" else "yes")
        assert 0 < float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
        assert float(row["ratio_p20"]) <= float(row[HEADINGS["ratio_to_fastswa"]]) <= float(row["ratio_p80"])
    printed = capsys.readouterr().out
    assert all(f"resnet20: {cost}" in printed for cost in (CONSTRUCTED, FIRST, *MOVES))
    assert "cold import: NOT MET: 1.30 (1.30 to 1.30) times" in printed


def test_imports_are_timed_in_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (cold, cold_import):
        monkeypatch.setattr(module, "MODULES", ("json", "fractions"))
    path = tmp_path / "cold.csv"
    assert main(["cold", "--cases", "--rounds", "3", "--output", str(path)]) == 0
    assert "process: import" in capsys.readouterr().out
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["quantity"], row["provider"]) for row in rows] == [
        (kind, module) for kind in KINDS for module in ("json", "fractions")
    ]
    assert all(float(row["p50_us"]) > 0 for row in rows)


def breaks(model: nn.Module, plan: Plan) -> Prepared:
    raise RuntimeError("no such average")


@pytest.mark.usefixtures("imported")
def test_a_wrong_result_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PROVIDERS[TORCH].setup

    def frozen(model: nn.Module, plan: Plan) -> Prepared:
        """torch, which takes nothing in."""
        return replace(right(model, plan), update=lambda: None)

    monkeypatch.setitem(PROVIDERS, TORCH, replace(PROVIDERS[TORCH], setup=frozen))
    monkeypatch.setitem(PROVIDERS, OURS, replace(PROVIDERS[OURS], setup=breaks))
    for rows in list(measurements(["resnet20"], CPU, 1, 0.001, ""))[len(KINDS) :]:
        found = {row.provider: row for row in rows}
        assert found[TORCH].checked.startswith("wrong: buffer stem_norm.running_mean differs")
        assert found[OURS].checked == "wrong: raised RuntimeError: no such average"
        assert found[TORCH].p50_us is found[OURS].p50_us is None
        assert found[f"{OURS}, EMA"].p50_us


def test_tensors_move_before_the_time_is_taken() -> None:
    seen: list[tuple[int, ...]] = []

    def watching(model: nn.Module, plan: Plan) -> Prepared:
        right = PROVIDERS[OURS].setup(model, plan)

        def update() -> None:
            seen.append(tuple(parameter.data_ptr() for parameter in model.parameters()))
            right.update()

        return replace(right, update=update)

    moved_updates("resnet20", {OURS: replace(PROVIDERS[OURS], setup=watching)}, CPU, 0.001)
    moves = [sum(map(int.__ne__, one, other)) for one, other in pairwise(seen)]
    # Of 59 parameters none, the first, or all; memory that was freed may be used again two updates later.
    assert set(moves) >= {0, 1}
    assert max(moves) > 50
