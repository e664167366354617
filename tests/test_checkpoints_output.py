"""What average_checkpoints leaves behind when it fails, the memory it takes, what it needs, and its command."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastswa
from fastswa import __main__ as command
from fastswa import average_checkpoints
from fastswa.checkpoints import average, files
from tests.checkpoint_files import folder_of, load, save_nested, save_safetensors, save_torch

ONE = {"weight": torch.ones(4), "bias": torch.ones(2), "steps": torch.tensor(1)}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("failure", ["interrupt", "error", "sync", "replace"])
def test_a_failure_leaves_the_old_output(
    failure: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_torch(ONE, tmp_path, "one")
    (tmp_path / f"mean{suffix}").write_bytes(b"old")
    before = folder_of(tmp_path)
    expected: type[BaseException] = OSError
    if failure in ("interrupt", "error"):
        expected = KeyboardInterrupt if failure == "interrupt" else ZeroDivisionError
        calls = []

        def mean(*arguments: Any) -> torch.Tensor:
            calls.append(arguments)
            if len(calls) == 2:
                assert len(folder_of(tmp_path)) == 3, "the test must fail while the temporary file is there"
                raise expected
            return original(*arguments)

        original = average.float64_mean
        monkeypatch.setattr(average, "float64_mean", mean)
    else:

        def refuse(*arguments: Any) -> None:
            raise OSError("no space")

        monkeypatch.setattr(os, {"sync": "fsync", "replace": "replace"}[failure], refuse)
    with pytest.raises(expected, match=r"mean.* could not be written: no space" if expected is OSError else None):
        average_checkpoints([path], tmp_path / f"mean{suffix}")
    assert folder_of(tmp_path) == before


KILLED = """
import os, signal, sys
from fastswa.checkpoints import average, files
original = average.float64_mean
calls = []
def mean(*arguments):
    calls.append(arguments)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)
average.float64_mean = mean
average.average_checkpoints(sys.argv[1:2], sys.argv[2])
"""


def test_a_process_that_is_killed_leaves_the_old_output(tmp_path: Path) -> None:
    path = save_torch(ONE, tmp_path, "one")
    (tmp_path / "mean.safetensors").write_bytes(b"old")
    result = subprocess.run([sys.executable, "-c", KILLED, path, tmp_path / "mean.safetensors"], check=False)
    assert result.returncode == -signal.SIGKILL
    assert (tmp_path / "mean.safetensors").read_bytes() == b"old"


FULL = """
import resource, signal, sys
import fastswa
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    fastswa.average_checkpoints(sys.argv[1:2], sys.argv[2])
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_full_disk_leaves_nothing(suffix: str, tmp_path: Path) -> None:
    path = save_torch({"weight": torch.ones(50_000)}, tmp_path, "one")
    program = [sys.executable, "-c", FULL, path, tmp_path / f"mean{suffix}"]
    output = subprocess.run(program, check=True, capture_output=True, text=True).stdout
    assert f"mean{suffix} could not be written: [Errno 27] File too large" in output
    assert folder_of(tmp_path).keys() == {"one.pth"}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_new_file_has_the_permissions_of_any_other(suffix: str, tmp_path: Path) -> None:
    path = save_torch(ONE, tmp_path, "one")
    average_checkpoints([path], tmp_path / f"mean{suffix}")
    assert (tmp_path / f"mean{suffix}").stat().st_mode == path.stat().st_mode


WITHOUT_SAFETENSORS = """
import sys
sys.modules["safetensors"] = None
import fastswa
fastswa.average_checkpoints([sys.argv[1]], sys.argv[2])
try:
    fastswa.average_checkpoints([sys.argv[2]], sys.argv[2])
except ImportError as error:
    print(error)
"""


def test_safetensors_is_needed_for_such_inputs_alone(tmp_path: Path) -> None:
    program = [sys.executable, "-c", WITHOUT_SAFETENSORS, save_torch(ONE, tmp_path, "one"), tmp_path / "m.safetensors"]
    output = subprocess.run(program, check=True, capture_output=True, text=True).stdout
    assert output == f"{tmp_path}/m.safetensors needs safetensors: pip install fastswa[safetensors]\n"
    assert torch.equal(load(tmp_path / "m.safetensors")["weight"], ONE["weight"])


def test_the_bar_needs_tqdm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(average, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"progress=True needs tqdm: pip install fastswa\[progress\]"):
        average_checkpoints([save_torch(ONE, tmp_path, "one")], tmp_path / "mean.pt", progress=True)


MEASURED = """
import re, sys
from pathlib import Path
import numpy, safetensors.torch, torch
import fastswa

def memory(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

# What the first use of anything loads is no part of it.
fastswa.average_checkpoints([sys.argv[1]], sys.argv[2] + ".pt")
start = memory("VmRSS")
fastswa.average_checkpoints(sys.argv[3:], sys.argv[2])
print(memory("VmHWM") - start)
"""
LARGE = 120 << 20


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Three checkpoints of 120 MiB of each kind: one long tensor and several shorter ones."""
    folder = tmp_path_factory.mktemp("large")
    for index in range(3):
        long = torch.full((LARGE // 8,), float(index))
        tensors = {"long": long, **{f"short{part}": long[: LARGE // 64].clone() for part in range(8)}}
        save_torch(tensors, folder, f"{index}")
        save_safetensors(tensors, folder, f"{index}")
    save_torch(ONE, folder, "small")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("target", [".pt", ".safetensors"])
@pytest.mark.parametrize("source", [".pth", ".safetensors"])
def test_memory(source: str, target: str, large: Path) -> None:
    paths = [large / f"{index}{source}" for index in range(3)]
    program = [sys.executable, "-c", MEASURED, large / "small.pth", large / f"mean{target}", *paths]
    peak = int(subprocess.run(program, check=True, capture_output=True, text=True).stdout)
    # What is read of mapped files until they are let go, the output if it must be whole, and 24 MiB for pieces and the
    # allocator. The inputs are 360 MiB.
    assert peak <= files.WINDOW + (LARGE if target == ".pt" else 0) + (24 << 20)
    assert load(large / f"mean{target}")["long"].eq(1).all()


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The command, in this process."""
    monkeypatch.setattr(sys, "argv", ["fastswa", *map(str, arguments)])
    return command.main()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    states = [{**ONE, "weight": torch.full((4,), float(value))} for value in (1, 4)]
    paths = [save_nested(each, tmp_path, str(index)) for index, each in enumerate(states)]
    options = ["-o", tmp_path / "mean.pt", "--key", "model.state_dict", "--weights", "1,2", "--dtype", "bf16"]
    assert run(monkeypatch, "average", *paths, *options) == 0
    output, errors = capsys.readouterr()
    assert f"{tmp_path}/mean.pt: mean of 2 checkpoints, 2 entries, " in output
    assert f"taken from {paths[1]}, not averaged (1): steps\n" in output
    assert errors == ""
    assert torch.equal(load(tmp_path / "mean.pt")["weight"], torch.full((4,), 3.0, dtype=torch.bfloat16))


def test_the_command_warns_of_what_is_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_torch({"weight": torch.tensor([float("nan")])}, tmp_path, "one")
    assert run(monkeypatch, "average", path, "-o", tmp_path / "mean.pt") == 0
    assert capsys.readouterr().err == "warning: NaN or infinity in 1 of the means: weight\n"


def test_the_command_shows_a_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def record(*arguments: Any, progress: bool, **options: Any) -> fastswa.CheckpointReport:
        asked.append(progress)
        return average_checkpoints(*arguments, **options)

    monkeypatch.setattr(fastswa, "average_checkpoints", record)
    for terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        run(monkeypatch, "average", save_torch(ONE, tmp_path, "one"), "-o", tmp_path / "mean.pt")
    assert asked == [True, False]


def test_the_command_fails_in_one_line(tmp_path: Path) -> None:
    save_nested(ONE, tmp_path, "one")
    program = [sys.executable, "-m", "fastswa", "average", tmp_path / "one.ckpt", "-o", tmp_path / "mean.pt"]
    result = subprocess.run(program, check=False, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"python -m fastswa average: error: {tmp_path}/one.ckpt is a nested checkpoint; "
        "give the key (--key) of a state dict: 'model.state_dict' (3 tensors)\n"
    )
    result = subprocess.run([*program, "--weights", "1,x"], check=False, capture_output=True, text=True)
    assert result.returncode == 2
    assert "'1,x' is not numbers with commas between them, such as 1,1,2" in result.stderr


def test_the_command_when_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(average, "float64_mean", interrupt)
    path = save_torch(ONE, tmp_path, "one")
    assert run(monkeypatch, "average", path, "-o", tmp_path / "mean.pt") == 130
    assert capsys.readouterr().err == "python -m fastswa average: interrupted, nothing written\n"
    assert folder_of(tmp_path).keys() == {"one.pth"}
