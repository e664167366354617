"""The benchmark of growing models checks before it times, and its pictures show what its file holds."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes
from torch import nn

from benchmarks import scaling
from benchmarks.__main__ import main
from benchmarks.pictures import bandwidth
from benchmarks.pictures import scaling as growth
from benchmarks.providers import CACHED, CEILING, OURS, PROVIDERS, TORCH, Plan, Prepared, Provider, ceiling
from benchmarks.record import HEADINGS
from benchmarks.registry import providers_of
from benchmarks.scaling import Equal, Point, Row, measure_point, points
from benchmarks.weight_averages import LISTS, ONE_PASS, PASSES, SEVERAL

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # Two threads on a busy machine wait for one another in every call, and the times do not matter here.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two points of each series."""
    monkeypatch.setattr(scaling, "points", lambda *arguments: points(*arguments)[:2])


@pytest.mark.usefixtures("small", "torchvision_imports")
def test_every_series_is_checked_recorded_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "scaling-cpu.csv"
    options = ["--largest", "100000", "--elements", "2000", "--seconds-per-point", "0.01", "--output", str(path)]
    assert main(["scaling", *options]) == 0
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [HEADINGS.get(column.name, column.name) for column in fields(Row)]
    single = list(providers_of("fp32"))
    expected = [("size", x, name) for x in (10_000, 100_000) for name in single]
    expected += [("tensors", x, name) for x in (1, 10) for name in single]
    expected += [("averages", x, name) for x in (1, 2) for name in SEVERAL]
    assert [(row["series"], int(row["x"]), row["provider"]) for row in rows] == expected
    for row in rows:
        elements, averages = int(row["elements"]), int(row["averages"])
        assert int(row["bytes"]) == elements * (4 + 8 * averages)
        if row["checked"].startswith("skipped: "):
            assert row["checked"].endswith(" is not installed")
            continue
        assert row["checked"].split(",")[0] == ("averages nothing" if row["provider"] == CEILING else "yes")
        assert 0 < float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
        # Both are rounded to four digits.
        assert float(row["gb_per_second"]) == pytest.approx(int(row["bytes"]) / float(row["p50_us"]) / 1e3, rel=2e-3)
        assert float(row["ratio_p20"]) <= float(row[HEADINGS["ratio_to_fastswa"]]) <= float(row["ratio_p80"])
    printed = capsys.readouterr().out
    assert all(f"{quantity} by {series}" in printed for quantity in ("median us", "GB/s") for series in scaling.SERIES)
    assert "bytes to move for an element" in printed

    for module, column, factor in ((bandwidth, "gb_per_second", 1.0), (growth, "p50_us", 1e-3)):
        figure = module.draw(tmp_path)
        series = ("size",) if module is bandwidth else ("tensors", "averages")
        for axes, own in zip(figure.axes, series, strict=True):
            assert drawn(axes) == {
                name: [(int(row["x"]), factor * float(row[column])) for row in of_name]
                for name in dict.fromkeys(row["provider"] for row in rows if row["series"] == own)
                if (of_name := [row for row in rows if (row["series"], row["provider"]) == (own, name) and row[column]])
            }
    named = {text.get_text() for text in bandwidth.draw(tmp_path).legends[0].get_texts()}
    assert {OURS, TORCH, CACHED} < named


def drawn(axes: Axes) -> dict[str, list[tuple[int, float]]]:
    """The points of each line; the marks of disturbed points have no name of their own."""
    lines = [line for line in axes.lines if not line.get_label().startswith("_")]
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in lines}


def test_points_grow_in_one_number() -> None:
    assert [point.x for point in points("size", 10**8, 1)] == [10**power for power in range(4, 9)]
    assert {point.tensors for point in points("size", 10**8, 1)} == {scaling.TENSORS}
    tensors = points("tensors", 1, 4_000_000)
    assert [point.tensors for point in tensors] == [1, 10, 100, 1000, 10_000]
    models = [Equal(point.tensors, point.elements, CPU) for point in tensors]
    assert {sum(tensor.numel() for tensor in model.parameters()) for model in models} == {4_000_000}
    assert [point.averages for point in points("averages", 1, 1)] == [1, 2, 4, 8]


def test_eight_averages_are_checked() -> None:
    rows = measure_point("averages", Point(8, 3, 30, 8), SEVERAL, CPU, 0.001, "")
    assert {row.provider: row.checked for row in rows} == {
        **dict.fromkeys((ONE_PASS, PASSES, LISTS), "yes"),
        CEILING: "averages nothing",
    }


def test_a_wrong_result_gets_no_time() -> None:
    def halfway(model: nn.Module, plan: Plan) -> Prepared:
        """torch, whose second tensor stays behind."""
        right = PROVIDERS[TORCH].setup(model, plan)
        assert right.averages is not None
        (average,) = right.averages()
        last = average["tensor1"].detach()

        def update() -> None:
            kept = last.clone()
            right.update()
            last.copy_(kept)

        return Prepared(update, right.averages)

    providers = {
        OURS: PROVIDERS[OURS],
        TORCH: Provider(halfway, PROVIDERS[TORCH].exact),
        CEILING: Provider(ceiling, ()),
    }
    rows = {row.provider: row for row in measure_point("size", Point(20, 2, 20), providers, CPU, 0.001, "")}
    assert rows[TORCH].checked.startswith("wrong: tensor1 is off by")
    assert rows[TORCH].p50_us is None
    assert rows[OURS].p50_us
    assert "wrong: tensor1" in scaling.table(list(rows.values()))


def test_pictures_name_the_series_that_is_missing(tmp_path: Path) -> None:
    options = ["--series", "averages", "--elements", "200", "--seconds-per-point", "0.001"]
    assert main(["scaling", *options, "--output", str(tmp_path / "scaling-cpu.csv")]) == 0
    for module, series in ((bandwidth, "size"), (growth, "tensors")):
        with pytest.raises(ValueError, match=f"holds no series '{series}'"):
            module.draw(tmp_path)
