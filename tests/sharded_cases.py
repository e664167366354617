"""Averages of models under FSDP2, run by processes of test_sharded.py."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial

from fastswa import EMA, SWA, WeightAverages
from tests.processes import Ranks
from tests.sharded_models import (
    Transformer,
    assert_equal,
    assert_follows,
    assert_same_averages,
    evaluate,
    fsdp,
    line,
    training,
    transformer,
    whole,
    whole_state,
    write,
)


def parts_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of what this rank holds."""
    return {name: (t.to_local() if isinstance(t, DTensor) else t).detach().clone() for name, t in tensors.items()}


def locals_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of what this rank holds of a model, which stays as it is, where FSDP2 would shard it for a state_dict."""
    return parts_of(dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers())))


def sharded(ranks: Ranks) -> Transformer:
    """The transformer, sharded over all ranks."""
    return fsdp(transformer(), line(ranks.world))


def case_averages_equal_a_single_processs(ranks: Ranks) -> None:
    model = sharded(ranks)
    sizes = [parameter.to_local().shape[0] for parameter in model.parameters()]
    # Some ranks hold more rows of a tensor than others, and the last one none of some.
    assert (0 in sizes) == (ranks.rank > 0)
    assert_follows(model, transformer(), ranks.rank)


def case_low_precision_and_no_frozen_layer(ranks: Ranks) -> None:
    rounding = {"dtype": torch.bfloat16, "rounding": "stochastic", "seed": 3}
    for options in ({"dtype": torch.bfloat16}, rounding, {"trainable_only": True, "buffers": "average"}):
        assert_follows(sharded(ranks), transformer(), ranks.rank, 3, **options)


class StopError(Exception):
    """Raised in the body of a context."""


def case_swapping_is_undone_bit_for_bit(ranks: Ranks) -> None:
    model, never = sharded(ranks), sharded(ranks)
    averages = WeightAverages(model, EMA(0.5))
    step, other_step = training(model, ranks.rank), training(never, ranks.rank)
    for number in range(3):
        step(number)
        other_step(number)
        averages.update()
        before, average = locals_of(model), averages.weights()
        with averages.swapped():
            alone = transformer()
            alone.load_state_dict({name: whole(part) for name, part in average.items()})
            # Each rank computes as a process alone would, from gathered weights.
            assert torch.equal(evaluate(model), evaluate(alone))
        assert_equal(locals_of(model), before)
        assert_equal(parts_of(averages.weights()), parts_of(average))
    # The root's average, gathered in the body, does not stay for training.
    step(3)
    other_step(3)
    trained = dict(never.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.to_local(), trained[name].to_local()), name


def case_swapping_is_undone_where_a_forward_pass_fails(ranks: Ranks) -> None:
    model, never = sharded(ranks), sharded(ranks)
    averages = WeightAverages(model, EMA(0.5))
    step, other_step = training(model, ranks.rank), training(never, ranks.rank)
    for number in range(3):
        step(number)
        other_step(number)
        averages.update()
    before = locals_of(model)

    def stop(*_: object) -> None:
        raise StopError

    hook = model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(StopError), averages.swapped():
        evaluate(model)
    hook.remove()
    with pytest.raises(KeyboardInterrupt), averages.swapped():
        raise KeyboardInterrupt
    kept = locals_of(model)
    assert_equal({**kept, "calls": before["calls"]}, before)
    step(3)
    other_step(3)
    trained = dict(never.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.to_local(), trained[name].to_local()), name


def case_whole_parameters_are_refused(ranks: Ranks) -> None:
    model = sharded(ranks)
    averages = WeightAverages(model, EMA(0.5))
    step = training(model, ranks.rank)
    step(0)
    averages.update()
    kept = averages.weights()
    refused = (averages.update, averages.swapped().__enter__, averages.copy_to, averages.refresh)
    evaluate(model)
    assert not isinstance(model.embedding.weight, DTensor)
    for each in refused:
        with pytest.raises(RuntimeError, match=r"'embedding.weight' is not sharded now .* call reshard\(\)"):
            each()
    # What needs no weights of the model goes on.
    assert_equal(parts_of(averages.weights()), parts_of(kept))
    averages.load_state_dict(averages.state_dict())
    model.reshard()
    averages.update()
    loss = model(torch.arange(10).view(2, 5)).square().mean()
    with pytest.raises(RuntimeError, match="finish the backward pass before"):
        averages.update()
    loss.backward()
    averages.update()
    assert averages.n_averaged == {"average": 3}
    # Made between the passes, it follows the shards.
    evaluate(model)
    late = WeightAverages(model, SWA())
    late.update()
    assert isinstance(late.weights()["embedding.weight"], DTensor)


def case_parts_that_move_are_followed(ranks: Ranks) -> None:
    model, alone = sharded(ranks), transformer()
    averages, expected = WeightAverages(model, EMA(0.5)), WeightAverages(alone, EMA(0.5))
    changes = (
        lambda: None,
        model.double,
        model.float,
        lambda: setattr(model.embedding.weight, "_local_tensor", model.embedding.weight.to_local().detach().clone()),
    )
    for change in changes:
        change()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.to_local().mul_(1.1)
        averages.update()
        alone.to(model.embedding.weight.dtype)
        write(alone, whole_state(model))
        expected.update()
        assert_same_averages(averages, expected, ranks.rank)


def case_a_first_forward_pass_may_move_the_parts(ranks: Ranks) -> None:
    # Averages of the weights' dtype change places with them, others are copied.
    for dtype in (torch.float32, torch.float64):
        model = sharded(ranks)
        for layer in model.layers:
            layer.up.weight = nn.Parameter(layer.up.weight.detach().clone(), layer.up.weight.requires_grad)
        averages = WeightAverages(model, SWA(), dtype=dtype)
        averages.update()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.to_local().mul_(2)
        # At its first forward pass, here inside swapped(), FSDP2 pads parts of a replaced parameter that are uneven.
        held, before = model.layers[1].up.weight.to_local(), locals_of(model)
        with averages.swapped():
            evaluate(model)
        moved = model.layers[1].up.weight.to_local().data_ptr() != held.data_ptr()
        assert moved == (ranks.rank == ranks.world - 1)
        assert_equal(locals_of(model), before)


def case_values_may_come_after_the_sharding(ranks: Ranks) -> None:
    with torch.device("meta"):
        model = Transformer()
    fsdp(model, line(ranks.world))
    with pytest.raises(ValueError, match=r"'embedding\.weight' of the model is on the meta device and holds no values"):
        WeightAverages(model, SWA())
    model.to_empty(device="cpu")
    write(model, transformer().state_dict())
    assert_follows(model, transformer(), ranks.rank, 2)


def case_an_average_is_written_into_a_model(ranks: Ranks) -> None:
    model = sharded(ranks)
    averages = WeightAverages(model, EMA(0.5))
    step = training(model, ranks.rank)
    for number in range(2):
        step(number)
        averages.update()
    average = averages.weights()
    other = sharded(ranks)
    averages.copy_to(other)
    assert_equal(locals_of(other), parts_of(average))
    third = sharded(ranks)
    third.load_state_dict(average)
    assert_equal(locals_of(third), parts_of(average))
    with pytest.raises(ValueError, match="is not sharded as its average is; take weights\\(full=True\\)"):
        averages.copy_to(transformer())
    averages.copy_to()
    assert_equal(locals_of(model), parts_of(average))


def case_a_sum_still_to_be_made_is_refused(ranks: Ranks) -> None:
    weight = DTensor.from_local(torch.ones(3), line(ranks.world), [Partial()])
    with pytest.raises(TypeError, match=r"'bias' is placed as .*Partial.*redistribute it first"):
        WeightAverages({"weight": torch.ones(2), "bias": weight}, SWA())
