"""A model that holds other weights for a while."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastswa import SWA, WeightAverages
from tests.models import train_step


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["exchanged", "written"])
def test_autocast_sees_an_average_and_that_it_is_gone(dtype: torch.dtype) -> None:
    model, x = nn.Linear(4, 3), torch.ones(1, 4)
    averages = WeightAverages(model, SWA(), dtype=dtype)
    for _ in range(2):
        train_step(model)
        averages.update()
    nn.init.normal_(model.weight, 3)

    def predictions() -> list[Tensor]:
        """Of the model, its average, and the model again."""
        found = [model(x)]
        with averages.swapped():
            found.append(model(x))
        return [*found, model(x)]

    exact = predictions()
    with torch.autocast("cpu", torch.bfloat16):
        cast = predictions()
    for narrow, wide in zip(cast, exact, strict=True):
        # bfloat16 roundings, of half a step of 2^-7, of 5 numbers below 8 and of their sum below 32.
        assert torch.allclose(narrow.float(), wide, rtol=0, atol=(5 * 8 + 32) * 2**-8)
    # The average is further off than that.
    assert (exact[0] - exact[1]).abs().min() > 1
