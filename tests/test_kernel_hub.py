"""The kernels as Hugging Face's `kernels` package loads them: from a folder, under a name of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastswa_kernels
from tests.code_blocks import ROOT

SOURCE = Path(fastswa_kernels.__file__).parent
PROJECT = ROOT / "kernels"
BACKEND = "rocm" if torch.version.hip else "cuda" if torch.version.cuda else "cpu"
"""That `kernels` looks for beside this torch."""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository as the kernel builder would leave it, for the torch in use."""
    variant = tmp_path / "build" / f"torch-{BACKEND}"
    shutil.copytree(SOURCE, variant, ignore=shutil.ignore_patterns("__pycache__"))
    metadata = {
        "id": f"_fastswa_kernels_{BACKEND}_0000000",
        "name": "fastswa-kernels",
        "version": 1,
        "license": "MIT",
        "python-depends": [],
        "backend": {"type": BACKEND},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata))
    return tmp_path


def run(program: str, repository: Path) -> None:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "LOCAL_KERNELS": f"fastswa/fastswa-kernels={repository}",
        "PYTHONPATH": str(ROOT),
        "TRITON_INTERPRET": "1",
    }
    finished = subprocess.run(
        [sys.executable, "-c", program, str(repository)], env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr


def test_the_builder_accepts_the_project() -> None:
    # What kernel-builder parses build.toml with.
    from kernels._rust import Backend, Build

    build = Build.open(PROJECT)
    assert build.general.backends == [Backend.CUDA, Backend.ROCm]
    assert not (PROJECT / "torch-ext" / "fastswa_kernels" / "_ops.py").exists(), "the builder writes it"
    card = (PROJECT / "CARD.md").read_text()
    assert not any(mark in card for mark in ("{{", "{%", "{#")), "the builder would fill it in"


def test_a_local_repository_loads_and_computes(repository: Path) -> None:
    program = """
import sys
from pathlib import Path
import torch
from kernels import get_local_kernel

loaded = get_local_kernel(Path(sys.argv[1]))
assert "triton" not in sys.modules
assert Path(loaded.__file__).is_relative_to(sys.argv[1])
average, source = torch.randn(5000), torch.randn(5000)
largest = torch.maximum(average.abs(), source.abs()).double()
exact = average.double() + 0.3125 * (source.double() - average.double())
loaded.LerpTable([average], [source]).lerp_(0.3125)
# Each of three roundings errs by half an ulp of the larger operand.
assert ((average - exact).abs() <= 1.5 * 2.0**-23 * largest).all()
assert "fastswa_kernels" not in sys.modules and "fastswa" not in sys.modules
"""
    run(program, repository)


def test_the_card_loads_it_by_name_and_its_code_runs(repository: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from tests.code_blocks import run_blocks

names = run_blocks(Path({str(PROJECT / "CARD.md")!r}))
assert Path(names["fastswa_kernels"].__file__).is_relative_to(sys.argv[1])
assert "fastswa_kernels" not in sys.modules and "fastswa" not in sys.modules
"""
    run(program, repository)
