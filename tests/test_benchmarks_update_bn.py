"""The benchmark of the BatchNorm recomputation runs the right networks, and gives no time to a wrong result."""

from __future__ import annotations

import csv
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import fastswa
from benchmarks import measure, update_bn
from benchmarks.__main__ import main
from benchmarks.batch_norm import counts
from benchmarks.batch_norm.cases import CASES, Case, prepare
from benchmarks.batch_norm.one_case import Row
from benchmarks.batch_norm.providers import FVCORE, MERGE, OURS, POPULATION, PROVIDERS, TORCH, Provider
from benchmarks.batch_norm.verify import verify
from benchmarks.cases import CASES as SHAPES
from benchmarks.networks import MLP, PreResNet164, ResNet50
from benchmarks.record import HEADINGS

CPU = torch.device("cpu")
TINY = Case(partial(MLP, inputs=6, width=4, depth=2), (8, 6), {"cpu": 3, "cuda": 3})


@pytest.fixture(autouse=True)
def _tiny_and_quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    # A fresh process would see neither the small case nor changed providers.
    monkeypatch.setattr(update_bn, "in_fresh_process", call)
    monkeypatch.setitem(CASES, "mlp", TINY)
    # The times do not matter here, so nobody waits for a quiet machine.
    monkeypatch.setattr(measure, "PATIENCE", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(path: Path, *options: str) -> tuple[int, list[dict[str, str]]]:
    status = main(["update_bn", "--cases", "mlp", "--seconds-per-case", "0.01", "--output", str(path), *options])
    with path.open(newline="") as file:
        return status, list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("network", "shapes", "image", "layers"),
    [(PreResNet164, "preresnet164", 32, 163), (ResNet50, "resnet50", 224, 53)],
)
def test_networks_are_the_published_ones(
    network: Callable[[], nn.Module], shapes: str, image: int, layers: int
) -> None:
    model = network()
    kinds = {name: "parameter" for name, _ in model.named_parameters()}
    found = [
        (name, tuple(tensor.shape), kinds.get(name, "buffer" if tensor.is_floating_point() else "counter"))
        for name, tensor in model.state_dict().items()
    ]
    assert found == list(SHAPES[shapes]())
    assert sum(isinstance(module, _BatchNorm) for module in model.modules()) == layers
    with torch.no_grad():
        scores = model.eval()(torch.randn(1, 3, image, image))
    assert scores.shape == (1, model.get_submodule("head").out_features)
    assert scores.isfinite().all()


def test_the_stages_have_the_published_resolutions() -> None:
    sizes: dict[str, list[int]] = {"preresnet164": [], "resnet50_batch8": []}
    for name, seen in sizes.items():
        case = CASES[name]
        model = case.network().eval()
        for stage in (module for path, module in model.named_children() if path.startswith("stage")):
            stage.register_forward_hook(lambda _, inputs, output, seen=seen: seen.append(output.shape[-1]))
        with torch.no_grad():
            model(torch.randn(1, *case.shape[1:]))
    assert sizes == {"preresnet164": [32, 16, 8], "resnet50_batch8": [56, 28, 14, 7]}


def test_every_measurement_is_checked_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, rows = run(tmp_path / "results.csv", "--precisions", "fp32", "bf16_autocast")
    assert status == 0
    assert [(row["precision"], row["provider"]) for row in rows] == [
        (precision, name) for precision in ("fp32", "bf16_autocast") for name in PROVIDERS
    ]
    assert list(rows[0]) == [HEADINGS.get(column.name, column.name) for column in fields(Row)]
    for row in rows:
        assert (row["case"], row["batches_from"], row["device"], row["torch"]) == (
            *("mlp", "device", "cpu"),
            torch.__version__,
        )
        assert (row["layers"], row["channels"], row["batch_size"], row["batches"]) == ("2", "8", "8", "3")
        assert row["command"].endswith("--cases mlp --precisions fp32 bf16_autocast")
        if row["provider"] == FVCORE and find_spec("fvcore") is None:
            assert (row["checked"], row["fvcore"]) == ("skipped: fvcore is not installed", "not installed")
            assert not row["p50_ms"]
            continue
        assert row["checked"] == "yes"
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        ratio = float(row[HEADINGS["ratio_to_fastswa"]])
        assert 0 < float(row["ratio_p20"]) <= ratio <= float(row["ratio_p80"])
        assert not row["launches_per_batch"]
    # One read of each of the two layers' counters: torch's are the model's own, ours are the pass's, on the host.
    reads = {row["provider"]: (row["device_reads_per_batch"], row["host_reads_per_batch"]) for row in rows}
    assert (reads[TORCH], reads[OURS], reads[MERGE], reads[POPULATION]) == (
        ("2", "0"),
        ("0", "2"),
        ("0", "0"),
        ("0", "0"),
    )
    printed = capsys.readouterr().out
    assert all(name in printed for name in PROVIDERS)
    assert "times as fast as torch update_bn, asked >= 1" in printed
    assert "met: 0 device reads per batch, asked <= 0" in printed


@pytest.mark.gpu
@pytest.mark.parametrize("source", ["device", "host"])
def test_on_a_gpu_no_batch_waits_for_the_device(tmp_path: Path, source: str) -> None:
    status, rows = run(tmp_path / "results.csv", "--device", "cuda", "--batches-from", source)
    assert status == 0
    reads = {(row["provider"], row["precision"]): row["device_reads_per_batch"] for row in rows}
    for precision in ("fp32", "bf16_autocast"):
        assert [reads[name, precision] for name in (TORCH, OURS, MERGE, POPULATION)] == ["2", "0", "0", "0"]
    assert all(float(row["launches_per_batch"]) > 0 for row in rows if row["checked"] == "yes")


def as_population(model: nn.Module, batches: Sequence[Tensor], device: torch.device | None) -> None:
    fastswa.update_bn(batches, model, device, estimator="population")


def weighted(model: nn.Module, batches: Sequence[Tensor], device: torch.device | None) -> None:
    fastswa.update_bn(batches, model, device, estimator="weighted")


def merged(model: nn.Module, batches: Sequence[Tensor], device: torch.device | None) -> None:
    """Right but for the last bits."""
    fastswa.update_bn(batches, model, device, engine="merge")


def last_channel_spoilt(model: nn.Module, batches: Sequence[Tensor], device: torch.device | None) -> None:
    as_population(model, batches, device)
    list(model.modules())[-3].running_var[-1] = float("nan")


def counters_left(model: nn.Module, batches: Sequence[Tensor], device: torch.device | None) -> None:
    merged(model, batches, device)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.num_batches_tracked.zero_()


def nothing(model: nn.Module, batches: Sequence[Tensor], device: torch.device | None) -> None:
    """Leaves the statistics as it found them."""


def breaks(model: nn.Module, batches: Sequence[Tensor], device: torch.device | None) -> None:
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize(
    ("name", "over", "reason", "status"),
    [
        (OURS, as_population, "wrong: off by ", 1),
        (OURS, weighted, "wrong: off by ", 1),
        (OURS, merged, f"wrong: not the bits of {TORCH}", 1),
        (OURS, breaks, "wrong: raised RuntimeError: no such kernel", 1),
        (MERGE, nothing, "wrong: off by ", 1),
        (MERGE, counters_left, "wrong: the counters are [0] after 3 batches", 1),
        (POPULATION, last_channel_spoilt, "wrong: off by nan", 1),
        (TORCH, as_population, "wrong: off by ", 0),
        (FVCORE, weighted, "wrong: off by ", 0),
        (FVCORE, breaks, "skipped: RuntimeError: no such kernel", 0),
    ],
)
def test_a_wrong_result_gets_no_time(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    over: Callable[[nn.Module, Sequence[Tensor], torch.device | None], None],
    reason: str,
    status: int,
) -> None:
    monkeypatch.setitem(PROVIDERS, name, replace(PROVIDERS[name], over=over))
    result, rows = run(tmp_path / "results.csv")
    assert result == status
    for row in rows:
        if row["provider"] == name:
            assert row["checked"].startswith(reason)
            assert not row["p50_ms"]
            assert not row["device_reads_per_batch"]
        else:
            assert row["p50_ms"] or row["checked"] == "skipped: fvcore is not installed"


def test_the_right_bits_of_torch_are_accepted() -> None:
    workload = prepare("mlp", "fp32", "device", CPU)
    verdicts = verify(workload, {**PROVIDERS, "again": replace(PROVIDERS[TORCH], same_bits=True)})
    assert verdicts.words["again"] == "yes"
    assert verdicts.seconds > 0


def test_a_missing_library_is_skipped_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fvcore", None)
    monkeypatch.delitem(sys.modules, "fvcore.nn.precise_bn", raising=False)
    monkeypatch.delitem(sys.modules, "fvcore.nn", raising=False)
    status, rows = run(tmp_path / "results.csv")
    assert status == 0
    checked = {row["provider"]: row["checked"] for row in rows}
    assert checked.pop(FVCORE) == "skipped: fvcore is not installed"
    assert set(checked.values()) == {"yes"}


def test_reads_of_a_device_are_told_from_others() -> None:
    workload = prepare("mlp", "fp32", "device", CPU)

    def reads_thrice(model: nn.Module, batches: Sequence[Tensor], device: torch.device | None) -> None:
        for batch in batches:
            model(batch)
            model[0].weight[0, 0].item()
            if model[1].num_batches_tracked >= 0:
                float(torch.ones(()))
        model[0].bias[0].item()  # once in a pass, so it is no batch's

    assert counts.reads(Provider(reads_thrice), workload) == (2, 1)


def test_what_is_measured_where() -> None:
    def chosen(device: str, **options: Any) -> list[tuple[str, str, str]]:
        return update_bn.comparisons(
            Namespace(device=device, **{"cases": None, "precisions": None, "batches_from": None, **options})
        )

    assert chosen("cpu") == [(case, "fp32", "device") for case in ("mlp", "preresnet164", "resnet50_batch8")]
    assert len(chosen("cuda")) == 9
    assert chosen("cuda")[-1] == ("resnet50_batch256", "bf16_autocast", "host")
    assert chosen("cpu", cases=["resnet50_batch256"], precisions=["bf16_autocast"], batches_from=["host"]) == [
        ("resnet50_batch256", "bf16_autocast", "host")
    ]
