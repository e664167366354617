"""What README says to write for more than one GPU, run as it stands by processes of test_sharded.py."""

from __future__ import annotations

from types import CodeType
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.utils.data import DataLoader, TensorDataset

import fastswa
from fastswa import SWA, WeightAverages
from tests.code_blocks import ROOT, code_blocks
from tests.processes import Ranks
from tests.ranks_cases import Mean, assert_equal_on_all_ranks
from tests.sharded_models import assert_equal, evaluate, training, transformer, whole


def block(name: str) -> CodeType:
    """The first of README's blocks that uses a name."""
    return next(each for each in code_blocks(ROOT / "README.md") if name in each.co_names)


def case_sharded_model(ranks: Ranks) -> None:
    model = transformer()
    seen: list[torch.Tensor] = []

    def train(model: nn.Module, averages: WeightAverages) -> None:
        step = training(model, ranks.rank)
        for number in range(3):
            step(number)
            averages.update()

    names: dict[str, Any] = {**vars(fastswa), "model": model, "train": train}
    names["evaluate"] = lambda model: seen.append(evaluate(model))
    # README's SWA begins later than this training ends.
    names["SWA"] = lambda start: SWA(start=start // 100)
    directory = ranks.directory / "readme"
    directory.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        exec(block("fully_shard"), names)
        assert (directory / "checkpoint").is_dir()
    averages = names["averages"]
    assert averages.n_averaged == {"ema": 3, "swa": 2}
    ema = {name: whole(tensor) for name, tensor in averages.weights("ema").items()}
    assert_equal(names["weights"], {} if ranks.rank else ema)
    alone = transformer()
    alone.load_state_dict(ema)
    assert torch.equal(seen[0], evaluate(alone))


def case_ranks_that_train_alone(ranks: Ranks) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    torch.manual_seed(ranks.rank)
    data = TensorDataset(torch.randn(24 + 8 * ranks.rank, 4), torch.randn(24 + 8 * ranks.rank, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    samples = [24.0 + 8 * rank for rank in range(ranks.world)]
    means = {name: Mean.of(parameter, ranks, samples) for name, parameter in model.named_parameters()}
    names = {**vars(fastswa), "torch": torch, "model": model, "own_loader": DataLoader(data, batch_size=8)}
    exec(block("average_across_ranks_"), names)
    for name, parameter in model.named_parameters():
        means[name].assert_close(parameter, ranks)
    assert_equal_on_all_ranks({name: tensor.detach() for name, tensor in model.state_dict().items()}, ranks)
    assert distributed.get_world_size() == ranks.world
    assert (model[1].running_var != 1).all()
