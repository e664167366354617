"""What the tests of planes share."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from tests.models import train_step


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Many small operations: on a busy machine threads would wait for each other at each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def points_of(model: nn.Module, count: int = 3) -> list[nn.Module]:
    """Copies of a model after each of some training steps."""
    points = []
    for _ in range(count):
        train_step(model)
        points.append(copy.deepcopy(model))
    return points
