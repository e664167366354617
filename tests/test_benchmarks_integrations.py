"""The benchmark of the integrations compares before it times, and says which library is missing or slower."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import integrations
from benchmarks.__main__ import main
from benchmarks.cases import Shapes
from benchmarks.integrations import LIBRARIES, slower
from benchmarks.integrations.check import prepare
from benchmarks.integrations.pair import PairRow
from benchmarks.measure import Times, ratio, ratio_percentiles
from benchmarks.providers import Prepared, held_by
from fastswa import EMA, AveragedModel


def average(model: nn.Module, decay: float = 0.9, used: bool = True) -> Prepared:
    averaged = AveragedModel(model, multi_avg_fn=EMA(decay))
    return Prepared(lambda: averaged.update_parameters(model) if used else None, held_by(averaged.module))


def without_the_last(model: nn.Module) -> Prepared:
    right = average(model)
    assert right.averages is not None
    (tensors,) = right.averages()
    return Prepared(right.update, lambda: [dict(list(tensors.items())[1:])])


def counts_wrong(model: nn.Module) -> Prepared:
    right = average(model)
    assert right.averages is not None
    (tensors,) = right.averages()
    return Prepared(right.update, lambda: [{**tensors, "stem_norm.num_batches_tracked": torch.tensor(-1)}])


def breaks(model: nn.Module) -> Prepared:
    raise RuntimeError("no such average")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    # A fresh process would not see the libraries that the tests put in.
    monkeypatch.setattr(integrations, "in_fresh_process", call)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(path: Path, *libraries: str) -> tuple[int, list[dict[str, str]]]:
    options = ["--cases", "resnet20", "--seconds-per-case", "0.01", "--output", str(path)]
    status = main(["integrations", "--libraries", *libraries, *options])
    with path.open(newline="") as file:
        return status, list(csv.DictReader(file))


def test_a_library_is_compared_and_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, rows = run(tmp_path / "results.csv", "torch_ema")
    assert status == 0
    assert [(row["library"], row["implementation"], row["checked"]) for row in rows] == [
        ("torch_ema", "original", "yes"),
        ("torch_ema", "fastswa", "yes"),
    ]
    for row in rows:
        assert (row["case"], row["device"], row["tensors"], row["elements"]) == ("resnet20", "cpu", "59", "269722")
        assert row["version"] == "0.3"
        assert row["torch"] == torch.__version__
        assert 0 < float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
        (median,) = (float(value) for name, value in row.items() if name.startswith("ratio_to_fastswa"))
        assert float(row["ratio_p20"]) <= median <= float(row["ratio_p80"])
    assert "torch_ema, resnet20" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("original", "ours", "reason", "status"),
    [
        (average, lambda model: average(model, 0.899), "wrong: stem.weight is off by", 1),
        (average, lambda model: average(model, used=False), "wrong: stem.weight is off by", 1),
        (*[lambda model: average(model, used=False)] * 2, "wrong: stem.weight was not averaged", 1),
        (average, without_the_last, "wrong: stem.weight has no average", 1),
        (average, counts_wrong, "wrong: stem_norm.num_batches_tracked is -1", 1),
        (average, breaks, "wrong: raised RuntimeError: no such average", 1),
        (breaks, average, "yes", 0),
    ],
)
def test_a_wrong_result_gets_no_time(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    original: Callable[[nn.Module], Prepared],
    ours: Callable[[nn.Module], Prepared],
    reason: str,
    status: int,
) -> None:
    module = ModuleType("benchmarks.integrations.torch_ema")
    vars(module).update(original=original, ours=ours)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    result, rows = run(tmp_path / "results.csv", "torch_ema")
    assert result == status
    assert rows[1]["checked"].startswith(reason)
    assert bool(rows[1]["p50_us"]) == (status == 0)
    if original is breaks:
        assert rows[0]["checked"] == "skipped: RuntimeError: no such average"
        assert not rows[0]["p50_us"]


def test_a_missing_library_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(integrations, "version", missing)
    assert run(tmp_path / "results.csv", "ignite") == (0, [])
    assert "ignite: skipped, pytorch-ignite is not installed" in capsys.readouterr().out


def test_each_library_has_a_file() -> None:
    files = {path.stem for path in Path(integrations.__file__).parent.glob("*.py")}
    assert files - {"__init__", "check", "pair"} == set(LIBRARIES)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.usefixtures("torchvision_imports")
def test_each_file_prepares_both(library: str) -> None:
    model = Shapes("resnet20")
    for implementation in ("original", "fastswa"):
        prepared = prepare(library, implementation, model)
        prepared.update()
        assert prepared.averages is not None
        (averages,) = prepared.averages()
        assert dict(model.named_parameters()).keys() <= averages.keys()


def test_the_ratio_scatters_over_the_rounds() -> None:
    slow, fast = Times([[2.0, 3.0, 90.0], [4.0], [10.0]]), Times([[1.0], [1.0, 2.0, 70.0], [2.0]])
    # 3, 2 and 5: percentiles two fifths of the way from 2 to 3, and three fifths from 3 to 5.
    assert (ratio(slow, fast), *ratio_percentiles(slow, fast)) == pytest.approx((3, 2.4, 4.2))


def test_what_is_slower_is_said() -> None:
    empty = dict.fromkeys(PairRow.__dataclass_fields__)
    fields = {**empty, "library": "timm", "case": "gpt2", "implementation": "original"}
    fast = PairRow(**{**fields, "ratio_to_fastswa": 2.0})  # type: ignore[arg-type]
    slow = PairRow(**{**fields, "ratio_to_fastswa": 0.8, "ratio_p80": 0.9})  # type: ignore[arg-type]
    even = PairRow(**{**fields, "ratio_to_fastswa": 0.98, "ratio_p80": 1.01})  # type: ignore[arg-type]
    host = PairRow(**{**fields, "ratio_to_fastswa": 2.0, "wall_ratio_to_fastswa": 0.5})  # type: ignore[arg-type]
    assert slower([fast, even]) == ["none is slower"]
    assert slower([fast, slow]) == ["slower: timm, gpt2: fastswa takes 1.25 times the time"]
    assert slower([host]) == ["slower: timm, gpt2: fastswa takes 2 times the time in a row"]


def test_importing_fastswa_imports_no_other_library() -> None:
    program = """
import sys, json, torch
before = set(sys.modules)
import fastswa, fastswa.integrations, fastswa_kernels
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    imported = {name.split(".")[0] for name in json.loads(printed)}
    assert imported - sys.stdlib_module_names - {"torch", "numpy"} == {"fastswa", "fastswa_kernels"}
