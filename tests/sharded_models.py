"""A small transformer, sharded in several ways, and the single process that its averages must equal bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import functional

from fastswa import EMA, LAWA, SWA, WeightAverages
from fastswa.rules import Rule

RULES: dict[str, Rule] = {"swa": SWA(), "ema": EMA(0.8), "latest": LAWA(2)}


class Block(nn.Module):
    """Attention, a small network, and a gate of one row, so that other ranks hold none of it."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.gate = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        query, key, value = self.attention(normed).chunk(3, -1)
        x = x + functional.scaled_dot_product_attention(query, key, value)
        return x + self.gate(x).sigmoid() * self.down(self.up(normed).relu())


class Transformer(nn.Module):
    """Sizes that no 2 or 4 divides, a head tied to the embedding, a frozen first layer, buffers.

    Args:
        width: of the embedding.
        hidden: of the networks.
    """

    def __init__(self, width: int = 6, hidden: int = 7) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.layers = nn.ModuleList(Block(width, hidden) for _ in range(2))
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.layers[0].requires_grad_(False)
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            self.scale.mul_(1.5)
            self.calls.add_(1)
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def transformer(**sizes: int) -> Transformer:
    """The same one in every process."""
    torch.manual_seed(0)
    return Transformer(**sizes)


def line(world: int) -> DeviceMesh:
    """All processes in a row."""
    return init_device_mesh("cpu", (world,), mesh_dim_names=("shard",))


def fsdp(model: Transformer, mesh: DeviceMesh, **options: object) -> Transformer:
    """Shard each layer and the rest."""
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def training(model: nn.Module, rank: int) -> Callable[[int], None]:
    """A function that makes training step number n, on data that differ by rank."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5, momentum=0.9)

    def step(number: int) -> None:
        generator = torch.Generator().manual_seed(100 * number + rank)
        tokens = torch.randint(11, (3, 5), generator=generator)
        logits = model(tokens)
        functional.cross_entropy(logits.flatten(0, 1), tokens.roll(1, 1).flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def evaluate(model: nn.Module) -> torch.Tensor:
    """A forward pass without a backward pass."""
    with torch.no_grad():
        return model(torch.arange(10).view(2, 5))


def whole(tensor: Tensor) -> Tensor:
    """A tensor as one process alone would have it; all ranks must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """A model's state as one process alone would have it, by its names; all ranks must ask."""
    state = {name: whole(tensor).clone() for name, tensor in model.state_dict().items()}
    return {name.replace("_orig_mod.", "").removeprefix("module."): tensor for name, tensor in state.items()}


@torch.no_grad()
def write(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give a model values that every rank has whole."""
    for name, tensor in model.state_dict().items():
        value = values[name]
        if isinstance(tensor, DTensor):
            value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor.copy_(value)


def collectives(work: Callable[[], object]) -> int:
    """How many collectives something takes."""
    with CommDebugMode() as mode:
        work()
    return mode.get_total_counts()


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names and the same bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def assert_same_averages(averages: WeightAverages, alone: WeightAverages, rank: int) -> None:
    """What is gathered on the first rank, and every part, equals the averages of a process alone, bit for bit."""
    assert averages.n_averaged == alone.n_averaged
    for name in averages.rules:
        expected, parts = alone.weights(name), averages.weights(name)
        shared = any(isinstance(part, DTensor) for part in parts.values())
        assert_equal(averages.weights(name, full=True), {} if shared and rank else expected)
        assert_equal({key: whole(part) for key, part in parts.items()}, expected)


def assert_follows(
    model: nn.Module, alone: nn.Module, rank: int, steps: int = 10, data: int | None = None, **options: object
) -> WeightAverages:
    """Training steps on several ranks, averaged by parts and, gathered after each step, by a process alone."""
    averages = WeightAverages(model, RULES, **options)
    write(alone, whole_state(model))
    expected = WeightAverages(alone, RULES, **options)
    step = training(model, rank if data is None else data)
    for number in range(steps):
        step(number)
        assert collectives(averages.update) == 0
        write(alone, whole_state(model))
        expected.update()
    # They would be seen.
    assert collectives(lambda: distributed.all_reduce(torch.ones(1))) == 1
    assert_same_averages(averages, expected, rank)
    return averages
