"""update_bn on compiled models: one graph, no break, no recompilation for a batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters

import fastswa
from fastswa import backends
from tests.batch_norm import (
    Residual,
    assert_buffers_equal,
    assert_statistics_close,
    batches,
    norms,
    statistics,
    trained,
)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend that notes which of its graphs runs when."""

    def __init__(self, backend: str) -> None:
        self._compile = lookup_backend(backend)
        self._made = 0
        self.runs: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        number, compiled = self._made, self._compile(graph, inputs)
        self._made += 1

        def run(*arguments: object) -> object:
            self.runs.append(number)
            return compiled(*arguments)

        return run


@pytest.mark.parametrize(
    ("form", "estimator"),
    [
        ("torch.compile", "torch"),
        ("torch.compile", "weighted"),
        ("Module.compile", "torch"),
        ("compiled forward", "torch"),
    ],
)
def test_a_compiled_model_runs_its_graph(form: str, estimator: str) -> None:
    model = trained(Residual())
    expected = deepcopy(model)
    data = batches(8)
    fastswa.update_bn(data, expected, estimator=estimator)

    # AOTAutograd, because it is where buffers that share memory could break the graph; no C++ compiler is needed.
    graphs = Graphs("aot_eager")
    options = {}
    called: nn.Module = model
    if form == "torch.compile":
        called = torch.compile(model, backend=graphs, dynamic=True)
    elif form == "Module.compile":
        model.compile(backend=graphs, dynamic=True)
    else:
        options["forward"] = torch.compile(lambda model, batch: model(batch), backend=graphs, dynamic=True)
    for _ in range(2):
        report = fastswa.update_bn(data, called, estimator=estimator, **options)
    # Each batch ran one whole graph, the same for all: for the short last one too, because sizes are dynamic.
    assert len(graphs.runs) == 16
    assert len(set(graphs.runs)) == 1
    assert not counters["graph_break"]
    assert report.layers == tuple(name for name, part in model.named_modules() if part in norms(model))
    # A few float32 roundings in BatchNorm's own cumulative average.
    assert_statistics_close(model, statistics(expected), 1e-6)
    assert all(int(layer.num_batches_tracked) == 8 for layer in norms(model))


def test_everything_else_gives_what_it_gives_uncompiled() -> None:
    model = trained(Residual())
    data = batches(8)
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        compiled(data[0])  # A graph without hooks is there already.
    for options in ({"engine": "eager"}, {"estimator": "population"}, {"sweeps": 2}, {"rtol": 1e-9}):
        expected = deepcopy(model)
        fastswa.update_bn(data, expected, **options)
        fastswa.update_bn(data, compiled, **options)
        if options.get("engine") == "eager":
            assert_buffers_equal(model, expected)
        # A few float32 roundings in the graph's own order of operations.
        assert_statistics_close(model, statistics(expected), 1e-5)


def test_a_layer_that_is_called_twice_in_a_graph(caplog: pytest.LogCaptureFixture) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.norm(x) * 2 + 1)

    model, expected = Twice(), Twice()
    data = [torch.randn(8, 3) + number for number in range(4)]
    fastswa.update_bn(data, expected)
    backends.say_once.cache_clear()
    with caplog.at_level(logging.DEBUG, "fastswa"):
        fastswa.update_bn(iter(data), torch.compile(model, backend="aot_eager"))
    assert "calls a BatchNorm layer twice" in caplog.text
    # A few float32 roundings in BatchNorm's own cumulative average.
    assert_statistics_close(model, statistics(expected), 1e-6)
    assert int(model.norm.num_batches_tracked) == 8


@pytest.mark.gpu
def test_a_compiled_model_on_a_gpu() -> None:
    model = trained(Residual()).cuda()
    expected = deepcopy(model)
    data = [batch.cuda() for batch in batches(8)]
    fastswa.update_bn(data, expected)
    graphs = Graphs("inductor")
    fastswa.update_bn(data, torch.compile(model, backend=graphs, dynamic=True))
    assert len(graphs.runs) == 8
    assert len(set(graphs.runs)) == 1
    assert not counters["graph_break"]
    # Inductor's BatchNorm sums in another order than cuDNN's.
    assert_statistics_close(model, statistics(expected), 1e-4)
