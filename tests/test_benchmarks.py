"""The benchmark measures the right tensors, and gives no time to a wrong result."""

from __future__ import annotations

import csv
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import counts, disturbance, measure, providers
from benchmarks.__main__ import main
from benchmarks.cases import CASES, Shapes
from benchmarks.disturbance import LIMIT, Disturbance
from benchmarks.measure import FEWEST_ROUNDS, ROUNDS, Times, ratio, ratio_percentiles
from benchmarks.peers import PEERS
from benchmarks.providers import CACHED, CEILING, OURS, PLANS, PROVIDERS, TORCH, Plan, Prepared
from benchmarks.record import HEADINGS
from benchmarks.registry import providers_of
from benchmarks.verify import verify
from benchmarks.wheel import faults

KNOWN = {
    "resnet20": (59, 269_722),
    "preresnet164": (494, 1_726_388),
    "resnet50": (161, 25_557_032),
    "vit_b": (152, 86_567_656),
    "gpt2": (148, 124_439_808),
    "llama8b": (291, 8_030_261_248),
}


@pytest.mark.parametrize("case", CASES)
def test_cases_have_the_published_sizes(case: str) -> None:
    shapes = [shape for _, shape, kind in CASES[case]() if kind == "parameter"]
    assert (len(shapes), sum(map(prod, shapes))) == KNOWN[case]


def test_a_case_holds_its_tensors_under_their_names() -> None:
    model = Shapes("resnet20", torch.bfloat16)
    names = {name: (shape, kind) for name, shape, kind in CASES["resnet20"]()}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        shape, kind = names.pop(name)
        assert tensor.shape == shape
        assert tensor.dtype == (torch.int64 if kind == "counter" else torch.bfloat16)
    assert not names


def test_bytes_of_an_update() -> None:
    model = nn.BatchNorm1d(8)
    # 16 parameters of 12 bytes; 16 floats and one counter, read and written.
    assert providers.update_bytes(model, PLANS["fp32"]) == 16 * 12 + 16 * 8 + 16
    assert providers.update_bytes(model.bfloat16(), PLANS["mixed"]) == 16 * 10 + 16 * 6 + 16
    assert providers.update_bytes(model, PLANS["bf16"]) == 16 * 6 + 16 * 4 + 16
    # Of SWAG 16 parameters alone, with mean, variance and a deviation.
    assert providers.update_bytes(model.float(), PLANS["swag"]) == 16 * 24


RIGHT = dict(PROVIDERS)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Two threads on a busy machine wait for one another in every call, and the times do not matter here.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(path: Path, *plans: str) -> tuple[int, list[dict[str, str]]]:
    options = ["--cases", "resnet20", "--plans", *plans, "--seconds-per-case", "0.01", "--output", str(path)]
    status = main(["update", *options])
    with path.open(newline="") as file:
        return status, list(csv.DictReader(file))


def test_every_measurement_is_checked_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, rows = run(tmp_path / "results.csv", "fp32", "mixed")
    assert status == 0
    assert [(row["plan"], row["provider"]) for row in rows] == [
        (plan, name) for plan in ("fp32", "mixed") for name in providers_of(plan)
    ]
    # Every peer takes part in float32, each with what it does with buffers.
    assert {(row["provider"], row["checked"]) for row in rows if row["plan"] == "fp32"} >= {
        (name, f"yes, {peer.buffers}") for name, peer in PEERS.items()
    }
    for row in rows:
        assert (row["case"], row["device"], row["tensors"], row["elements"]) == ("resnet20", "cpu", "59", "269722")
        assert row["torch"] == torch.__version__
        assert row["cpu"]
        if row["checked"].startswith("skipped: "):
            assert row["plan"] == "mixed"
            assert "dtype" in row["checked"]
            assert not row["p50_us"]
            continue
        assert row["checked"].split(",")[0] == ("averages nothing" if row["provider"] == CEILING else "yes")
        assert 0 < float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
        assert 0 < float(row["ratio_p20"]) <= float(row[HEADINGS["ratio_to_fastswa"]]) <= float(row["ratio_p80"])
        assert FEWEST_ROUNDS <= int(row["rounds"]) <= ROUNDS
        assert not row["launches"]
    # torch 2.11 refuses the mixed plan in its default update too.
    skipped = {row["provider"] for row in rows if row["checked"].startswith("skipped")}
    assert {CACHED, f"{TORCH}, get_ema_multi_avg_fn"} <= skipped <= {CACHED, f"{TORCH}, get_ema_multi_avg_fn", TORCH}
    printed = capsys.readouterr().out
    assert all(name in printed for name in providers_of("fp32"))
    # torch reads its counter twice, ema-pytorch its own two, and its decay, twice.
    reads = {row["provider"]: row["device_reads"] for row in rows if row["plan"] == "fp32"}
    assert (reads[OURS], reads[CACHED], reads[TORCH], reads["ema-pytorch EMA"]) == ("0", "0", "2", "4")
    # diffusers holds a difference for all 269,722 parameters at one time, torch_ema for the largest, of 36,864.
    extra = {row["provider"]: int(row["peak_extra_bytes"]) for row in rows if row["plan"] == "fp32"}
    assert extra[CACHED] == 0
    assert extra["diffusers EMAModel, foreach"] == 4 * 269_722
    assert 4 * 36_864 <= extra["torch_ema"] < 8 * 36_864
    assert "times as fast as cached _foreach_lerp_, asked >= 1" in printed


def wrong_weight(model: nn.Module, plan: Plan) -> Prepared:
    """fastswa, but an average of the wrong kind."""
    return RIGHT[f"{OURS}, EMA"].setup(model, plan)


def misses_an_element(model: nn.Module, plan: Plan) -> Prepared:
    """torch, but the last element of the last parameter is left as it was."""
    right = RIGHT[TORCH].setup(model, plan)
    (average,) = right.averages()
    last = average[list(dict(model.named_parameters()))[-1]].detach()

    def update() -> None:
        kept = last[-1].clone()
        right.update()
        last[-1] = kept

    return Prepared(update, right.averages)


def stale_buffers(model: nn.Module, plan: Plan) -> Prepared:
    """An average whose buffers stay behind by one update."""
    right = RIGHT[CACHED].setup(model, plan)

    def update() -> None:
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        right.update()
        (average,) = right.averages()
        for name, value in buffers.items():
            average[name].copy_(value + 1)

    return Prepared(update, right.averages)


def breaks(model: nn.Module, plan: Plan) -> Prepared:
    raise RuntimeError("no such kernel")


def not_there(model: nn.Module, plan: Plan) -> Prepared:
    raise ModuleNotFoundError("No module named 'shelf.averages'", name="shelf.averages")


@pytest.mark.parametrize(
    ("name", "setup", "reason", "status"),
    [
        (OURS, wrong_weight, "wrong: stem.weight is off by", 1),
        (OURS, breaks, "wrong: raised RuntimeError: no such kernel", 1),
        (TORCH, misses_an_element, "wrong: head.bias is off by", 0),
        (CACHED, stale_buffers, "wrong: buffer stem_norm.running_mean differs", 0),
        (TORCH, breaks, "skipped: RuntimeError: no such kernel", 0),
        (TORCH, not_there, "skipped: shelf is not installed", 0),
    ],
)
def test_a_wrong_result_gets_no_time(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    setup: Callable[[nn.Module, Plan], Prepared],
    reason: str,
    status: int,
) -> None:
    monkeypatch.setitem(PROVIDERS, name, replace(PROVIDERS[name], setup=setup))
    result, rows = run(tmp_path / "results.csv", "fp32")
    assert result == status
    for row in rows:
        if row["provider"] == name:
            assert row["checked"].startswith(reason)
            assert not row["p50_us"]
        else:
            assert row["p50_us"]


@pytest.mark.parametrize(
    ("peer", "buffers", "reason"),
    [
        ("timm ModelEmaV2", providers.AVERAGED, "wrong: buffer stem_norm.num_batches_tracked differs"),
        ("timm ModelEmaV2", providers.LEFT, "wrong: buffer stem_norm.num_batches_tracked is 561, 0 at the start"),
        ("timm ModelEmaV3", providers.TRUNCATED, "wrong: buffer stem_norm.num_batches_tracked is 3000, 561.0 before"),
        ("ultralytics ModelEMA", providers.TRUNCATED, "wrong: buffer stem_norm.num_batches_tracked is 0, 561.0 before"),
        ("torch_ema", providers.COPIED, "wrong: stem_norm.running_mean has no average"),
    ],
)
def test_what_becomes_of_buffers_is_compared(peer: str, buffers: str, reason: str) -> None:
    plan = PLANS["fp32"]
    _, verdicts = verify(Shapes("resnet20"), plan, {peer: replace(PEERS[peer], buffers=buffers)})
    assert verdicts[peer].startswith(reason)


def test_llama_is_refused_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["update", "--cases", "llama8b"]) == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_ratios_are_taken_within_a_round() -> None:
    # The machine is ten times slower in the second round; the calls keep their ratio of 3.
    fast = Times([[1.0, 1.0], [10.0, 10.0], [1.0, 1.0]])
    slow = Times([[3.0, 9.0, 3.0], [30.0, 30.0], [3.0]])
    assert ratio(slow, fast) == 3.0
    assert slow.scaled(2.0).percentile(50) == 12.0
    slower = Times([[1.0], [20.0], [4.0]])
    # Of the ratios 1, 2 and 4, four tenths of the way to the middle.
    assert ratio_percentiles(slower, fast) == pytest.approx((1.4, 3.2))


def test_slow_calls_get_fewer_rounds_and_one_run_in_each() -> None:
    class SleepClock:
        def block(self, call: Callable[[], object], count: int, times: Times) -> None:
            times.runs.append([0.0] * count)
            for _ in range(count):
                call()

    calls = {"slow": lambda: time.sleep(0.02), "quick": lambda: None}
    times, _ = measure.measure(calls, SleepClock(), 0.1)
    assert [len(block) for block in times["slow"].runs] == [1] * FEWEST_ROUNDS
    assert [len(block) for block in times["quick"].runs] == [measure.MOST] * FEWEST_ROUNDS
    times, _ = measure.measure({"quick": calls["quick"]}, SleepClock(), 0.1)
    assert len(times["quick"].runs) == ROUNDS


def test_reads_and_memory_are_counted() -> None:
    cpu, kept = torch.device("cpu"), torch.ones(1000)

    def call() -> None:
        one = kept + 1
        del one
        two, three = kept + 2, kept + 3
        assert two[0].item() < three[0].item()
        kept.mul_(1)

    assert counts.device_reads(call, cpu) == 2
    # Two tensors, and a few bytes for the numbers added and read.
    assert 8000 <= counts.peak_extra_bytes(call, cpu) <= 8032
    assert counts.peak_extra_bytes(lambda: kept.add_(1), cpu) <= 32


class StepClock:
    """Each run takes a microsecond more than the one before."""

    def __init__(self) -> None:
        self.now = 0.0

    def block(self, call: Callable[[], object], count: int, times: Times) -> None:
        call()
        times.runs.append([self.now + run for run in range(count)])
        self.now += count


@pytest.mark.parametrize(("shares", "expected"), [([0.0], 0), ([0.5, 0.0, 0.5, 0.0], 0), ([0.5], 4)])
def test_disturbed_rounds_are_repeated(monkeypatch: pytest.MonkeyPatch, shares: list[float], expected: int) -> None:
    upcoming = itertools.cycle(shares)
    monkeypatch.setattr(measure, "wait_until_alone", lambda seconds: 0.0)
    monkeypatch.setattr(measure.Disturbance, "share", lambda self: next(upcoming))
    # Of a machine that is always disturbed the first measurements have to do.
    seconds = 1.0 if expected == 0 else 0.0
    calls = {"one": lambda: None, "other": lambda: None}
    times, found = measure.measure(calls, StepClock(), seconds, rounds=4)
    assert found == expected
    assert all(len(own.runs) == 4 for own in times.values())


@pytest.mark.parametrize(("others", "expected"), [(0.0, False), (50.0, True)])
def test_other_processes_are_noticed(monkeypatch: pytest.MonkeyPatch, others: float, expected: bool) -> None:
    # Busy processors are this process, and `others` seconds of something else on each.
    taken = iter([0.0, others * (os.cpu_count() or 1)])
    monkeypatch.setattr(disturbance, "_busy_seconds", lambda: next(taken) + time.process_time())
    monkeypatch.setattr(disturbance.time, "perf_counter", itertools.count(0, 100).__next__)
    assert (Disturbance().share() > LIMIT) == expected


def test_a_wheel_with_strange_contents_is_refused() -> None:
    good = [f"{package}/{name}" for package in ("fastswa", "fastswa_kernels") for name in ("__init__.py", "py.typed")]
    good += ["fastswa-0.1.0.dist-info/METADATA", "fastswa-0.1.0.dist-info/licenses/LICENSE"]
    assert faults(good) == []
    assert "top-level names" in faults([*good, "tests/test_rules.py"])[0]
    assert faults([name for name in good if name != "fastswa_kernels/py.typed"]) == [
        "fastswa_kernels/py.typed is missing"
    ]
    assert faults([name for name in good if "LICENSE" not in name]) == ["LICENSE is missing"]
