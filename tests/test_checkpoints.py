"""The mean of checkpoint files against numpy's float64, bit for bit, from every kind of file into every kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastswa import average_checkpoints
from fastswa.checkpoints import files
from fastswa.checkpoints.float64_mean import round_once
from fastswa.checkpoints.output import SAFETENSORS_NAMES
from tests.checkpoint_files import KINDS, load, mean, nearest, save_safetensors, save_torch, state

OUTPUTS = [".pt", ".safetensors"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    # So that the tests' tensors are read in several pieces and the files are opened several times.
    monkeypatch.setattr(files, "PIECE", 64)
    monkeypatch.setattr(files, "WINDOW", 5000)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Same bits, shape and dtype."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    found, expected = (each.contiguous().reshape(-1).view(torch.uint8) for each in (found, expected))
    assert torch.equal(found, expected)


def assert_mean(found: dict[str, Any], states: list[dict[str, Tensor]], weights: list[float] | None = None) -> None:
    """The mean of the states by numpy; what has none, from the last one."""
    assert found.keys() == states[-1].keys()
    for name, last in states[-1].items():
        expected = last
        if last.is_floating_point() or last.is_complex():
            expected = mean([each[name] for each in states], weights or [1.0] * len(states), last.dtype)
        assert_same(found[name], expected)


@pytest.mark.parametrize("suffix", OUTPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_is_that_of_float64_rounded_once(kind: str, suffix: str, tmp_path: Path) -> None:
    states = [state(seed) for seed in range(3)]
    paths = [KINDS[kind](each, tmp_path, str(index)) for index, each in enumerate(states)]
    key = "model.state_dict" if kind == "nested" else None
    report = average_checkpoints(paths, tmp_path / f"mean{suffix}", key=key)
    found = load(tmp_path / f"mean{suffix}")
    assert_mean(found, states)
    kept = ("counter", "mask", "codes")
    # A .safetensors input has an order of its own.
    assert set(report.kept) == set(kept)
    assert set(report.averaged) == states[0].keys() - set(kept)
    assert report.not_finite == ()
    assert report.weights == (1 / 3, 1 / 3, 1 / 3)
    assert report.bytes == (tmp_path / f"mean{suffix}").stat().st_size
    if suffix == ".pt" and "safe" not in kind and kind != "sharded":
        assert list(found) == list(states[0])
        assert report.kept == kept


def test_kinds_may_be_mixed_and_files_come_twice(tmp_path: Path) -> None:
    states = [state(seed) for seed in range(len(KINDS) - 1)]
    kinds = [kind for kind in KINDS if kind != "nested"]
    paths = [KINDS[kind](each, tmp_path, kind) for kind, each in zip(kinds, states, strict=True)]
    average_checkpoints([*paths, paths[0]], tmp_path / "mean.pt")
    assert_mean(load(tmp_path / "mean.pt"), [*states, states[0]])


@pytest.mark.parametrize("weights", [[3.0, 1.0, 0.5], [0.1, 0.2, 0.3], [-1.0, 2.0, 1.0], [2, 2, 2]], ids=str)
def test_weights_are_divided_by_their_sum(weights: list[float], tmp_path: Path) -> None:
    states = [state(seed) for seed in range(3)]
    paths = [save_torch(each, tmp_path, str(index)) for index, each in enumerate(states)]
    report = average_checkpoints([str(path) for path in paths], str(tmp_path / "mean.pt"), weights=weights)
    assert_mean(load(tmp_path / "mean.pt"), states, weights)
    assert report.weights == pytest.approx([weight / sum(weights) for weight in weights])


def test_a_checkpoint_of_weight_0_is_not_averaged_but_may_be_the_last(tmp_path: Path) -> None:
    states = [state(seed) for seed in range(2)]
    spoilt = {**state(2), "matrix": torch.full((40, 30), float("nan"))}
    paths = [save_torch(each, tmp_path, str(index)) for index, each in enumerate([*states, spoilt])]
    report = average_checkpoints(paths, tmp_path / "mean.pt", weights=[1, 3, 0])
    found = load(tmp_path / "mean.pt")
    for name in ("matrix", "half", "complex"):
        assert_same(found[name], mean([each[name] for each in states], [1, 3], states[0][name].dtype))
    assert int(found["counter"]) == 102
    assert report.not_finite == ()


def test_the_mean_of_one_is_a_copy_in_another_format(tmp_path: Path) -> None:
    # Zeros have signs.
    one = {**state(0), "zeros": torch.tensor([0.0, -0.0])}
    average_checkpoints([save_torch(one, tmp_path, "one")], tmp_path / "one.safetensors")
    average_checkpoints([tmp_path / "one.safetensors"], tmp_path / "one.pt")
    for suffix in OUTPUTS:
        found = load(tmp_path / f"one{suffix}")
        assert found.keys() == one.keys()
        for name, tensor in one.items():
            assert_same(found[name], tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_another_dtype_is_rounded_to_once(dtype: torch.dtype, tmp_path: Path) -> None:
    states = [state(seed) for seed in range(3)]
    paths = [save_torch(each, tmp_path, str(index)) for index, each in enumerate(states)]
    average_checkpoints(paths, tmp_path / "mean.pt", dtype=dtype)
    found = load(tmp_path / "mean.pt")
    for name in ("matrix", "half", "brain", "double", "scalar", "empty"):
        assert_same(found[name], mean([each[name] for each in states], [1, 1, 1], dtype))
    # torch's complex32 is experimental.
    wide = torch.complex128 if dtype == torch.float64 else torch.complex64
    assert_same(found["complex"], mean([each["complex"] for each in states], [1, 1, 1], wide))
    assert found["counter"].dtype == torch.int64


def test_dtypes_may_differ_and_the_last_decides(tmp_path: Path) -> None:
    tensors = [torch.randn(500).to(dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    paths = [save_torch({"weight": each}, tmp_path, str(index)) for index, each in enumerate(tensors)]
    average_checkpoints(paths, tmp_path / "mean.pt")
    assert_same(load(tmp_path / "mean.pt")["weight"], mean(tensors, [1, 1, 1], torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_once_is_rounding_to_the_nearest(dtype: torch.dtype) -> None:
    information = torch.finfo(dtype)
    near = torch.tensor([0.0, 2.0**-40, -(2.0**-40), 2.0**-30, -(2.0**-30), 2.0**-24], dtype=torch.float64)
    # Numbers of the dtype and the ties between them, in all magnitudes and among the subnormal ones, and beside them.
    steps = torch.arange(-10.0, 60.0, dtype=torch.float64) / 2
    ties = [scale * (1 + information.eps * steps) for scale in (2.0**-9, 1.0, 3.0, 1024.0, information.max / 2)]
    ties.append(information.smallest_normal * information.eps * steps)
    # Around the tie between the largest number and infinity, and beyond what float32 holds.
    ties.append(information.max * (1 + information.eps * torch.arange(-1, 2, dtype=torch.float64) / 4))
    ties.append(torch.tensor([1e300, 1e-300, 5e-324, 1e39, 1e-45], dtype=torch.float64))
    values = torch.cat([*((tie[:, None] * (1 + near)).flatten() for tie in ties), torch.randn(1000).double()])
    values = torch.cat([values, -values])
    expected = torch.tensor([nearest(value, dtype) for value in values.tolist()], dtype=torch.float64).to(dtype)
    assert torch.equal(round_once(values, dtype), expected)
    # What torch does differs, or this would prove nothing.
    assert not torch.equal(values.to(dtype), expected)
    special = torch.tensor([float("inf"), float("-inf"), 0.0, -0.0], dtype=torch.float64)
    assert_same(round_once(special, dtype), special.to(dtype))
    assert round_once(torch.tensor([float("nan"), -float("nan")], dtype=torch.float64), dtype).isnan().all()


def test_means_that_are_not_finite_are_reported(tmp_path: Path) -> None:
    tensors = {"large": torch.full((300,), 60000.0), "nan": torch.ones(300), "fine": torch.full((300,), 3e38)}
    tensors["nan"][299] = float("nan")
    path = save_torch(tensors, tmp_path, "one")
    assert average_checkpoints([path], tmp_path / "mean.pt").not_finite == ("nan",)
    tensors = {"large": torch.full((300,), 1e5), "fine": torch.full((300,), 65504.0)}
    report = average_checkpoints([save_torch(tensors, tmp_path, "one")], tmp_path / "mean.pt", dtype=torch.float16)
    assert report.not_finite == ("large",)


def test_entries_that_are_no_tensors_are_the_last_ones(tmp_path: Path) -> None:
    extra: list[dict[str, Any]] = [
        {
            "weight": torch.ones(2) * step,
            "steps": step,
            "layer._extra_state": {"scale": torch.tensor(step)},
            "none": None,
        }
        for step in (1.0, 2.0)
    ]
    paths = [save_torch({**each, "more": torch.ones(1)}, tmp_path, str(index)) for index, each in enumerate(extra)]
    report = average_checkpoints(paths, tmp_path / "mean.pt")
    found = load(tmp_path / "mean.pt")
    assert found["weight"].tolist() == [1.5, 1.5]
    assert (found["steps"], found["layer._extra_state"]["scale"].item(), found["none"]) == (2.0, 2.0, None)
    assert report.kept == ("steps", "layer._extra_state", "none")
    with pytest.raises(ValueError, match=r"'steps' is a float, which no \.safetensors file holds; write a \.pt file"):
        average_checkpoints(paths, tmp_path / "mean.safetensors")
    assert not (tmp_path / "mean.safetensors").exists()


class Tied(nn.Module):
    """An embedding and a head that are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 20)
        self.norm = nn.BatchNorm1d(20)
        self.head = nn.Linear(20, 50, bias=False)
        self.head.weight = self.embedding.weight


def test_tied_tensors(tmp_path: Path) -> None:
    models = [Tied() for _ in range(3)]
    paths = [save_torch(model.state_dict(), tmp_path, str(index)) for index, model in enumerate(models)]
    average_checkpoints(paths, tmp_path / "mean.pt")
    average_checkpoints(paths, tmp_path / "mean.safetensors")
    found = torch.load(tmp_path / "mean.pt", weights_only=True)
    assert found["embedding.weight"].data_ptr() == found["head.weight"].data_ptr()
    expected = mean([model.head.weight.detach() for model in models], [1, 1, 1], torch.float32)
    for suffix in OUTPUTS:
        loaded = Tied()
        loaded.load_state_dict(load(tmp_path / f"mean{suffix}"))
        assert_same(loaded.head.weight.detach(), expected)
    # What is tied in the last checkpoint alone has two means.
    untied = {**models[0].state_dict(), "head.weight": torch.zeros(50, 20)}
    average_checkpoints([save_torch(untied, tmp_path, "untied"), paths[1]], tmp_path / "mean.pt")
    found = torch.load(tmp_path / "mean.pt", weights_only=True)
    assert_same(found["head.weight"], models[1].head.weight.detach() / 2)
    assert not torch.equal(found["head.weight"], found["embedding.weight"])


def test_views_of_one_memory_that_are_not_the_same_are_no_ties(tmp_path: Path) -> None:
    square = torch.randn(20, 20)
    tensors = {"whole": square, "row": square[3], "transposed": square.t()}
    average_checkpoints([save_torch(tensors, tmp_path, "one")], tmp_path / "mean.pt")
    for name, tensor in load(tmp_path / "mean.pt").items():
        assert_same(tensor, tensors[name])


def test_pending_conjugation_and_negation(tmp_path: Path) -> None:
    tensors = {"conjugated": torch.randn(100, dtype=torch.complex64).conj(), "negated": torch._neg_view(torch.ones(3))}
    average_checkpoints([save_torch(tensors, tmp_path, "one")], tmp_path / "mean.pt")
    found = load(tmp_path / "mean.pt")
    assert torch.equal(found["conjugated"], tensors["conjugated"])
    assert found["negated"].tolist() == [-1, -1, -1]


def test_the_versions_of_modules_stay_in_a_torch_file(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    torch.save(model.state_dict(), tmp_path / "one.pt")
    average_checkpoints([tmp_path / "one.pt"], tmp_path / "one.pt")
    found = torch.load(tmp_path / "one.pt", weights_only=True)
    assert found._metadata == model.state_dict()._metadata


@pytest.mark.parametrize("suffix", OUTPUTS)
def test_the_output_may_be_an_input(suffix: str, tmp_path: Path) -> None:
    states = [state(seed) for seed in range(2)]
    paths = [tmp_path / f"{seed}{suffix}" for seed in range(2)]
    for path, each in zip(paths, states, strict=True):
        average_checkpoints([save_torch(each, tmp_path, "one")], path)
    average_checkpoints(paths, paths[0])
    assert_mean(load(paths[0]), states)
    assert_mean(load(paths[1]), states[1:])


def test_a_safetensors_file_says_what_its_library_says_and_is_aligned(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.ones(3, dtype=dtype) for dtype in SAFETENSORS_NAMES}
    headers = []
    average_checkpoints([save_safetensors(tensors, tmp_path, "theirs")], tmp_path / "ours.safetensors")
    for name in ("ours", "theirs"):
        content = (tmp_path / f"{name}.safetensors").read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        places = {key: entry.pop("data_offsets") for key, entry in header.items() if key != "__metadata__"}
        assert length % 8 == 0
        assert all(start % tensors[key].element_size() == 0 for key, (start, _) in places.items())
        headers.append(header)
    assert headers[0].pop("__metadata__") == {"format": "pt"}
    assert headers[0] == headers[1]
    for name, tensor in load(tmp_path / "ours.safetensors").items():
        assert_same(tensor, tensors[name])


def test_keys(tmp_path: Path) -> None:
    inner = {"a.weight": torch.ones(2), "a": torch.zeros(1)}
    torch.save({"ema.v2": {"model": inner}, "other": {"x": torch.ones(3)}, "step": 3}, tmp_path / "nested.pt")
    average_checkpoints([tmp_path / "nested.pt"], tmp_path / "mean.pt", key="ema.v2.model")
    found = load(tmp_path / "mean.pt")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"a.weight": [1, 1], "a": [0]}


def test_a_bar_counts_the_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_torch({"weight": torch.ones(2000)}, tmp_path, "one")
    average_checkpoints([path, path], tmp_path / "mean.pt", progress=True)
    assert "8.00k/8.00k" in capsys.readouterr().err
