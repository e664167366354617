"""Checkpoint files of every kind, and the mean of their tensors by numpy and rational arithmetic."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

State = dict[str, Any]


def state(seed: int) -> dict[str, Tensor]:
    """One tensor of each sort; several are longer than what is read at once in these tests."""
    torch.manual_seed(seed)
    return {
        "matrix": torch.randn(40, 30),
        "transposed": torch.randn(30, 40).t(),
        "convolution": torch.randn(6, 5, 3, 3).to(memory_format=torch.channels_last),
        "expanded": torch.randn(4).expand(50, 4),
        "scalar": torch.randn(()),
        "empty": torch.empty(0, 3),
        "half": torch.randn(300).half(),
        "brain": torch.randn(17, 20).bfloat16(),
        "double": torch.randn(7, 11).double(),
        "complex": torch.randn(130, dtype=torch.complex64),
        "counter": torch.tensor(100 + seed),
        "mask": torch.randn(200) > 0,
        "codes": torch.randint(0, 255, (40, 30), dtype=torch.uint8).t(),
    }


def save_torch(tensors: Mapping[str, Any], folder: Path, name: str) -> Path:
    torch.save(dict(tensors), folder / f"{name}.pth")
    return folder / f"{name}.pth"


def save_legacy(tensors: Mapping[str, Any], folder: Path, name: str) -> Path:
    # As torch wrote files before 1.6.
    torch.save(dict(tensors), folder / f"{name}.bin", _use_new_zipfile_serialization=False)
    return folder / f"{name}.bin"


def save_nested(tensors: Mapping[str, Any], folder: Path, name: str) -> Path:
    model = {"state_dict": dict(tensors), "args": {"width": 3}}
    torch.save({"epoch": 3, "loss": torch.ones(()), "model": model}, folder / f"{name}.ckpt")
    return folder / f"{name}.ckpt"


def save_safetensors(tensors: Mapping[str, Tensor], folder: Path, name: str) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


def save_sharded(tensors: Mapping[str, Tensor], folder: Path, name: str) -> Path:
    """Three shards beside their index; the folder itself is the checkpoint."""
    return _shards(tensors, folder / name, "safetensors", save_safetensors).parent


def save_sharded_torch(tensors: Mapping[str, Tensor], folder: Path, name: str) -> Path:
    """The same by torch.save; the index is the checkpoint."""
    return _shards(tensors, folder / name, "bin", save_legacy)


def _shards(
    tensors: Mapping[str, Tensor], folder: Path, suffix: str, save: Callable[[Mapping[str, Tensor], Path, str], Path]
) -> Path:
    folder.mkdir()
    names = list(tensors)
    places = {}
    for shard in range(3):
        held = names[shard::3]
        path = save({key: tensors[key] for key in held}, folder, f"model-{shard}")
        places |= dict.fromkeys(held, path.name)
    index = folder / f"model.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {key: places[key] for key in names}}))
    return index


KINDS: dict[str, Callable[[Mapping[str, Any], Path, str], Path]] = {
    "torch": save_torch,
    "legacy": save_legacy,
    "nested": save_nested,
    "safetensors": save_safetensors,
    "sharded": save_sharded,
    "sharded_torch": save_sharded_torch,
}


def folder_of(path: Path) -> dict[str, bytes]:
    """Every file under a folder and what is in it."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def load(path: Path) -> dict[str, Any]:
    """A file as its library reads it."""
    if path.suffix == ".safetensors":
        return dict(load_file(path))
    return dict(torch.load(path, weights_only=True))


def mean(tensors: Sequence[Tensor], weights: Sequence[float], dtype: torch.dtype) -> Tensor:
    """The mean in float64 by numpy, in the order given, rounded once."""
    if tensors[0].is_complex():
        parts = [mean([getattr(each, part) for each in tensors], weights, dtype.to_real()) for part in ("real", "imag")]
        return torch.complex(*parts)
    total = np.float64(weights[0]) * tensors[0].double().numpy()
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total = total + np.float64(weight) * tensor.double().numpy()
    total = np.asarray(total / float(sum(map(Fraction, weights))))
    # numpy rounds once to its own dtypes; it has no bfloat16.
    if dtype == torch.bfloat16:
        flat = [nearest(value, dtype) for value in total.reshape(-1).tolist()]
        return torch.tensor(flat, dtype=torch.float64).reshape(total.shape).to(dtype)
    return torch.from_numpy(total.astype(str(dtype).removeprefix("torch.")))


def nearest(value: float, dtype: torch.dtype) -> float:
    """The number of a dtype that is nearest to a finite one, ties to even, by rational arithmetic."""
    information = torch.finfo(dtype)
    # The distance of the dtype's numbers around the value: no less than that of its subnormal ones.
    unit = Fraction(max(2.0 ** (math.frexp(value)[1] - 1), information.smallest_normal)) * Fraction(information.eps)
    # Fractions are rounded to even too.
    return float(round(Fraction(value) / unit) * unit)
