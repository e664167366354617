"""The benchmark of the swap checks bits before it times, and what ncu prints is read as it is documented."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import ncu
from benchmarks.__main__ import main
from benchmarks.providers import CEILING
from benchmarks.record import HEADINGS
from benchmarks.swap import Row
from benchmarks.swap_providers import LENDERS, SWAPPED, Lending

RIGHT = dict(LENDERS)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # Two threads on a busy machine wait for one another in every call, and the times do not matter here.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(path: Path) -> tuple[int, list[dict[str, str]]]:
    status = main(["swap", "--cases", "resnet20", "--seconds-per-case", "0.01", "--output", str(path)])
    with path.open(newline="") as file:
        return status, list(csv.DictReader(file))


@pytest.mark.usefixtures("torchvision_imports")
def test_every_way_is_checked_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, rows = run(tmp_path / "swap.csv")
    assert status == 0
    assert [row["provider"] for row in rows] == [*LENDERS, CEILING]
    assert list(rows[0]) == [HEADINGS.get(column.name, column.name) for column in fields(Row)]
    for row in rows:
        assert (row["elements"], row["bytes"]) == ("269722", str(24 * 269_722))
        assert row["checked"] == ("averages nothing" if row["provider"] == CEILING else "yes")
        assert 0 < float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
        assert float(row["ratio_p20"]) <= float(row[HEADINGS["ratio_to_fastswa"]]) <= float(row["ratio_p80"])
    # The others hold a third copy of all parameters; an exchange holds a part at a time.
    extra = {row["provider"]: row["peak_extra_bytes"] for row in rows}
    assert int(extra[SWAPPED]) < 4 * 269_722 <= int(extra["torch_ema average_parameters"])
    assert not extra[CEILING]
    assert SWAPPED in capsys.readouterr().out


def lends(model: nn.Module, wrong_inside: bool = False, wrong_after: bool = False, spoils: bool = False) -> Lending:
    right = RIGHT["torch_ema average_parameters"](model)
    weight = model.get_parameter("head.bias")
    average = right.average()["head.bias"]

    @contextmanager
    def lent() -> Iterator[None]:
        with right.lent():
            if wrong_inside:
                weight.data[-1] += 1e-6
            yield
        if wrong_after:
            weight.data[-1] += 1e-6
        if spoils:
            average[-1] += 1e-6

    return Lending(lent, right.average)


def breaks(model: nn.Module) -> Lending:
    raise RuntimeError("no such average")


@pytest.mark.parametrize(
    ("name", "make", "checked", "status"),
    [
        (SWAPPED, lambda model: lends(model, wrong_inside=True), "wrong: inside, head.bias is not the average's", 1),
        (
            SWAPPED,
            lambda model: lends(model, wrong_after=True),
            "wrong: afterwards, head.bias is not the model's own",
            1,
        ),
        (SWAPPED, lambda model: lends(model, spoils=True), "wrong: afterwards, the average has another head.bias", 1),
        (SWAPPED, breaks, "wrong: raised RuntimeError: no such average", 1),
        ("torch_ema average_parameters", breaks, "skipped: RuntimeError: no such average", 0),
    ],
)
def test_a_wrong_bit_gets_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, make: object, checked: str, status: int
) -> None:
    for other in list(LENDERS):
        if other.startswith(("diffusers", "Lightning")):
            monkeypatch.delitem(LENDERS, other)
    monkeypatch.setitem(LENDERS, name, make)
    result, rows = run(tmp_path / "swap.csv")
    assert result == status
    for row in rows:
        assert (row["checked"] == checked) == (row["provider"] == name)
        assert bool(row["p50_us"]) == (row["provider"] != name)


# In the format that Nsight Compute documents for --csv --page raw --print-units base; the numbers are made up.
PRINTED = """==PROF== Connected to process 4711 (/usr/bin/python3)
a line of the program
==PROF== Profiling "_average_kernel" - 0: 0%....50%....100% - 3 passes
==PROF== Disconnected from process 4711
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"dram__bytes.sum.per_second","dram__throughput.avg.pct_of_peak_sustained_elapsed","gpu__time_duration.sum"
"","","","","","","","","","","","byte/s","%","ns"
"0","4711","python3","host","_average_kernel","1","7","(256, 1, 1)","(264, 1, 1)","0","9.0",\
"3,900,000,000,000.5","81.25","78,750"
""".replace("\\\n", "")


def test_what_ncu_prints_is_read() -> None:
    assert ncu.parse(PRINTED) == [("_average_kernel", 78_750.0, 3_900_000_000_000.5, 81.25)]
    assert ncu.parse("==PROF== Connected\n") == []
    refused = "==PROF== Connected\n==ERROR== ERR_NVGPUCTRPERM - no permission to read the counters\n"
    assert ncu.reason(refused) == "ERR_NVGPUCTRPERM - no permission to read the counters"
    assert ncu.reason("") == "ncu saw no kernel"


def test_ncu_says_why_it_did_not_measure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ncu.run(torch.device("cpu"), "", None)
    monkeypatch.setenv("PATH", "")
    ncu.run(torch.device("cuda"), "", None)
    assert capsys.readouterr().out.splitlines() == [
        "ncu: not measured: needs a GPU",
        "ncu: not measured: there is no ncu on the PATH",
    ]


@pytest.mark.parametrize(("printed", "lines"), [(PRINTED, 4), ("==ERROR== no permission", 0)])
def test_kernels_are_recorded_or_the_reason_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    printed: str,
    lines: int,
) -> None:
    tool = tmp_path / "ncu"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{printed}\nEND\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(ncu.record, "environment", lambda device, command: dict.fromkeys(ENVIRONMENT, ""))
    output = tmp_path / "gpu.csv"
    ncu.run(torch.device("cuda"), "", output)
    if not lines:
        assert capsys.readouterr().out == "ncu: resnet50 fp32: not measured: no permission\n"
        return
    with (tmp_path / "ncu-gpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["plan"]) for row in rows] == [
        (case, plan) for case in ("resnet50", "gpt2") for plan in ("fp32", "mixed")
    ]
    assert {(row["duration_us"], row["dram_gb_per_second"], row["share_of_peak"]) for row in rows} == {
        ("78.75", "3900", "0.8125")
    }
    assert rows[0]["bytes"] == "307110192"


ENVIRONMENT = [column.name for column in fields(ncu.record.Environment)]
