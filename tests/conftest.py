"""Kernels run in Triton's interpreter, on CPU tensors, unless the GPU tests were asked for with `-m gpu`.

An environment variable, read when Triton is imported, chooses the interpreter, so one process can't do both. It differs
from a GPU in one way that the tests must allow for: it cuts float32 to bfloat16 off instead of rounding to nearest even
(see tests/numerics.py).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.torchvision_operators import declare


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("markexpr") != "gpu":
        assert "triton" not in sys.modules, "triton was imported before the interpreter was chosen"
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    # A GPU machine may lack what the other files import.
    if config.getoption("markexpr") == "gpu" and collection_path.suffix == ".py":
        text = collection_path.read_text()
        return None if "mark.gpu" in text or "kernel_device" in text else True
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("markexpr") == "gpu" and torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and pytest -m gpu"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernel_device(request: pytest.FixtureRequest) -> str:
    """Where a kernel test runs: on the CPU in the interpreter, or on a GPU."""
    return str(request.param)


@pytest.fixture(scope="session")
def torchvision_imports() -> None:
    """timm, diffusers and others import torchvision, which may not load beside this torch."""
    declare()
