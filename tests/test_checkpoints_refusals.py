"""What average_checkpoints refuses, and that nothing is written then."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastswa import average_checkpoints
from tests.checkpoint_files import folder_of, save_legacy, save_sharded, save_torch

ONE = {"weight": torch.ones(4), "bias": torch.ones(2), "steps": torch.tensor(1)}


def changed(**entries: Any) -> dict[str, Any]:
    return {**ONE, **entries}


def lacking(name: str) -> dict[str, Any]:
    return {key: value for key, value in ONE.items() if key != name}


FILES: dict[str, tuple[dict[str, Any], str]] = {
    "missing": (lacking("bias"), r"b\.pth lacks 1 entries that .*a\.pth has, such as 'bias'; average"),
    "extra": (changed(more=torch.ones(1)), r"b\.pth has 1 only for itself, such as 'more'; average"),
    "renamed": (
        {f"module.{name}": value for name, value in ONE.items()},
        r"b\.pth lacks 3 entries that .*a\.pth has, such as 'weight' and has 3 only .* 'module\.weight'",
    ),
    "shape": (changed(bias=torch.ones(2, 1)), r"'bias' in .*b\.pth has shape \(2, 1\), but \(2,\) in .*a\.pth"),
    "kind": (changed(bias=torch.ones(2).int()), r"'bias' in .*b\.pth is of integers or bools, but floating-point in"),
    "complex": (changed(bias=torch.ones(2) * 1j), r"'bias' in .*b\.pth is complex, but floating-point in .*a\.pth"),
    "object": (changed(bias=[1.0, 1.0]), r"'bias' in .*b\.pth is no tensor, but floating-point in .*a\.pth"),
    "float8": (changed(bias=torch.ones(2).to(torch.float8_e4m3fn)), r"'bias' in .*b\.pth is of torch.float8_e4m3fn: "),
    "sparse": (changed(bias=torch.ones(2).to_sparse()), r"'bias' in .*b\.pth is no plain tensor \(.*sparse_coo"),
    "nested": ({"epoch": 1, "state_dict": ONE, "ema": {"model": {"w": ONE["bias"]}}}, r"b\.pth is a nested checkpoint; "
     r"give the key \(--key\) of a state dict: 'state_dict' \(3 tensors\), 'ema.model' \(1 tensors\)$"),
    "loss_beside": ({"loss": torch.ones(()), "model": ONE}, r"b\.pth is a nested checkpoint; .* 'model' \(3 t"),
    "no_tensors": ({"epoch": 1}, r"b\.pth holds no tensors by name; is it a checkpoint\?$"),
    "numbers": ({0: torch.ones(1)}, r"b\.pth holds 0 among the names of its tensors; names are strings$"),
    "arguments": ({**ONE, "args": argparse.Namespace()}, r"b\.pth holds objects .*: argparse\.Namespace; save its"),
}  # fmt: skip


@pytest.mark.parametrize("order", ["first", "last"])
@pytest.mark.parametrize("name", FILES)
def test_checkpoints_that_do_not_match_are_refused_by_name(name: str, order: str, tmp_path: Path) -> None:
    entries, message = FILES[name]
    paths = [save_torch(ONE, tmp_path, "a"), save_torch(entries, tmp_path, "b")]
    (tmp_path / "mean.pt").write_bytes(b"old")
    before = folder_of(tmp_path)
    if order == "last":
        paths.reverse()
    elif name in ("missing", "extra", "renamed", "shape", "kind", "complex", "object"):
        # Which of the two is at fault can't be known: the last one is the pattern.
        message = r"(a|b)\.pth"
    with pytest.raises(ValueError, match=message):
        average_checkpoints(paths, tmp_path / "mean.pt")
    assert folder_of(tmp_path) == before


def cut(path: Path, size: int) -> Path:
    os.truncate(path, size)
    return path


def text(folder: Path, name: str, content: str = "hello") -> Path:
    (folder / name).write_text(content)
    return folder / name


def without_shard(folder: Path) -> Path:
    path = save_sharded(ONE, folder, "sharded")
    (path / "model-1.safetensors").unlink()
    return path


def wrong_index(folder: Path) -> Path:
    path = save_sharded(ONE, folder, "sharded") / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["ghost"] = "model-1.safetensors"
    path.write_text(json.dumps(index))
    return path


def safetensors_file(folder: Path) -> Path:
    average_checkpoints([save_torch(ONE, folder, "one")], folder / "one.safetensors")
    return folder / "one.safetensors"


def script(folder: Path) -> Path:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(folder / "script.pt"))
    return folder / "script.pt"


def integers(folder: Path) -> Path:
    return save_torch({"steps": torch.tensor(1)}, folder, "integers")


INPUTS: dict[str, tuple[Callable[[Path], Path], dict[str, Any], type[Exception], str]] = {
    "no_file": (lambda folder: folder / "none.pt", {}, FileNotFoundError, r"none\.pt does not exist; check the path"),
    "text": (lambda folder: text(folder, "x.pt"), {}, ValueError, r"x\.pt can't be read by torch\.load"),
    "empty": (lambda folder: text(folder, "x.pt", ""), {}, ValueError, r"x\.pt can't be read by torch\.load"),
    "cut": (lambda folder: cut(save_torch(ONE, folder, "x"), 900), {}, ValueError, r"x\.pth can't be read.*cut short"),
    "cut_legacy": (lambda folder: cut(save_legacy(ONE, folder, "x"), 300), {}, ValueError, r"x\.bin can't be read"),
    "script": (script, {}, ValueError, r"script\.pt can't be read.*TorchScript"),
    "text_safetensors": (lambda folder: text(folder, "x.safetensors"), {}, ValueError, r"x\.safetensors is cut short"),
    "cut_safetensors": (lambda f: cut(safetensors_file(f), 300), {}, ValueError, r"one\.safetensors is cut short or"),
    "suffix": (lambda folder: text(folder, "x.txt"), {}, ValueError, r"x\.txt is not read by its name; a checkpoint"),
    "no_index": (lambda folder: text(folder, "x.index.json", "[1]"), {}, ValueError, r"x\.index\.json is no index"),
    "no_shard": (without_shard, {}, FileNotFoundError, r"model-1\.safetensors does not exist"),
    "wrong_index": (wrong_index, {}, ValueError, r"safetensors\.index\.json says .* holds 'ghost', but it does"),
    "empty_folder": (lambda folder: folder / "out", {}, FileNotFoundError, r"out holds no checkpoint; give the path"),
    "full_folder": (lambda folder: text(safetensors_file(folder).parent, "x.safetensors").parent, {}, ValueError,
     r"holds several checkpoints: one\.safetensors, x\.safetensors; give the path of one"),
    "key_of_flat": (safetensors_file, {"key": "model"}, ValueError, r"key 'model' is for files by torch\.save; "),
    "no_such_key": (lambda folder: save_torch({"a": ONE}, folder, "x"), {"key": "b"}, ValueError,
     r"x\.pth has no state dict at the key 'b'; one is at: 'a' \(3 tensors\)"),
    "integers": (integers, {}, ValueError, r"integers\.pth holds no floating-point tensors, so there is nothing to"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", INPUTS)
def test_files_that_are_no_checkpoints_are_named(name: str, tmp_path: Path) -> None:
    make, options, error, message = INPUTS[name]
    (tmp_path / "out").mkdir()
    path = make(tmp_path)
    before = folder_of(tmp_path)
    with pytest.raises(error, match=message):
        average_checkpoints([path], tmp_path / "out" / "mean.pt", **options)
    assert folder_of(tmp_path) == before


ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no_paths": ({"paths": []}, ValueError, "no paths; give at least one"),
    "one_path": ({"paths": "a.pt"}, TypeError, "paths must be a sequence of paths, got the one path 'a.pt'"),
    "suffix": ({"output": "mean.bin"}, ValueError, r"output mean\.bin must end with \.pt or \.safetensors"),
    "no_folder": (
        {"output": "no/mean.pt"},
        FileNotFoundError,
        r"the folder no of output mean\.pt does not exist; make",
    ),
    "a_folder": ({"output": "folder.pt"}, ValueError, r"output folder\.pt is a folder"),
    "count": ({"weights": [1.0]}, ValueError, "1 weights for 2 checkpoints; give one for each"),
    "sum_0": ({"weights": [1.0, -1.0]}, ValueError, r"a sum other than 0, got \[1\.0, -1\.0\]"),
    "all_0": ({"weights": [0, 0]}, ValueError, r"a sum other than 0, got \[0, 0\]"),
    "rounded_0": ({"weights": [0.1, 0.2, -0.3], "paths": ["one.pth"] * 3}, ValueError, "a sum other than 0"),
    "nan": ({"weights": [1.0, float("nan")]}, ValueError, "weights must be finite"),
    "infinite": ({"weights": [1.0, float("inf")]}, ValueError, "weights must be finite"),
    "overflow": ({"weights": [1e308, 1e308]}, ValueError, "weights must be finite and have"),
    "dtype": ({"dtype": torch.int64}, ValueError, "dtype must be one of torch.float32, .*, got torch.int64"),
    "complex128": (
        {"dtype": torch.float64, "output": "x.safetensors"},
        ValueError,
        r"'c' is of torch\.complex128, which",
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, error, message = ARGUMENTS[name]
    monkeypatch.chdir(tmp_path)
    Path("folder.pt").mkdir()
    save_torch({"a": torch.ones(2), "c": torch.ones(2) * 1j}, Path(), "one")
    before = folder_of(tmp_path)
    arguments: dict[str, Any] = {"paths": ["one.pth"] * 2, "output": "mean.pt", **options}
    with pytest.raises(error, match=message):
        average_checkpoints(**arguments)
    assert folder_of(tmp_path) == before
