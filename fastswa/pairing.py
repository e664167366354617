"""Which tensor of a model belongs to which tensor of its average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

Named = Sequence[tuple[str, Tensor]]


@dataclass(frozen=True)
class Pair:
    """A tensor of the average and the model's tensor that it follows.

    Args:
        name: in the averaged module.
        average: the tensor to be written.
        source: the tensor to be read, of the same shape.
    """

    name: str
    average: Tensor
    source: Tensor


def canonical(name: str) -> str:
    """A tensor's name without what DistributedDataParallel, torch.compile and activation checkpointing put into it.

    Args:
        name: as `named_parameters` gives it.

    Returns:
        The name without a leading "module.", without "_orig_mod." and without "_checkpoint_wrapped_module.".

    Example:
        >>> canonical("module._orig_mod.layer.weight")
        'layer.weight'
    """
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "").removeprefix("module.")


def named_tensors(module: nn.Module, *kinds: str) -> list[tuple[str, Tensor]]:
    """The tensors of a module, each under all its names, in less than half of the time that torch's iterators take.

    Args:
        module: whose parts' tensors are meant too.
        *kinds: "_parameters", "_buffers" or both.

    Returns:
        Names and tensors, kind by kind in the module's order.

    Example:
        >>> [name for name, _ in named_tensors(nn.Sequential(nn.Linear(2, 2)), "_parameters", "_buffers")]
        ['0.weight', '0.bias']
    """
    found: list[tuple[str, Tensor]] = []
    for kind in kinds:
        _collect(module, "", kind, found)
    return found


def pair_parameters(averaged: nn.Module, model: nn.Module) -> list[Pair]:
    """Pair the parameters of an averaged module with a model's.

    By name where the names agree, after DistributedDataParallel's and torch.compile's prefixes are dropped; else by
    order where every shape agrees. A tied parameter is one pair, however many names it has.

    Args:
        averaged: the module whose parameters are averages.
        model: the module that is being trained.

    Returns:
        One pair for each parameter of `averaged`, in its order.

    Raises:
        ValueError: names the first parameter that is missing, left over, or of another shape.
    """
    return _pair(
        "parameter",
        named_tensors(averaged, "_parameters"),
        named_tensors(model, "_parameters"),
    )


def pair_buffers(averaged: nn.Module, model: nn.Module) -> list[Pair]:
    """Pair the buffers of an averaged module with a model's, by the rules of `pair_parameters`.

    Args:
        averaged: the module whose buffers follow.
        model: the module that is being trained.

    Returns:
        One pair for each buffer of `averaged`, in its order.

    Raises:
        ValueError: names the first buffer that is missing, left over, or of another shape.
    """
    return _pair(
        "buffer",
        named_tensors(averaged, "_buffers"),
        named_tensors(model, "_buffers"),
    )


def pair_names(averaged: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> list[Pair]:
    """Pair chosen tensors of an average with a model's by canonical name; the model may have more.

    Args:
        averaged: averages by name.
        model: tensors by name.

    Returns:
        One pair for each tensor of `averaged`, in its order, however many names it has.

    Raises:
        ValueError: names the first tensor that the model has not, has in another shape, or ties otherwise.

    Example:
        >>> average, model = {"a": torch.zeros(2)}, {"_orig_mod.a": torch.ones(2), "b": torch.ones(1)}
        >>> [pair.name for pair in pair_names(average, model)]
        ['a']
    """
    sources = dict(_canonical(list(model.items())))
    pairs: dict[int, Pair] = {}
    for name, average in averaged.items():
        source = sources.get(canonical(name))
        if source is None:
            raise ValueError(f"the model has no {name!r}; update from the model that the average was made of")
        first = pairs.setdefault(id(average), Pair(name, average, source))
        if first.source is not source:
            raise ValueError(f"{first.name!r} and {name!r} are one tensor in the average and two in the model")
    return check_shapes("tensor", list(pairs.values()))


def check_shapes(kind: str, pairs: list[Pair]) -> list[Pair]:
    """Refuse pairs of different shapes.

    Args:
        kind: what the tensors are, for the error.
        pairs: to check.

    Returns:
        The pairs.

    Raises:
        ValueError: names the first.
    """
    for pair in pairs:
        if pair.average.shape != pair.source.shape:
            raise ValueError(
                f"{kind} {pair.name!r} has shape {tuple(pair.average.shape)} in the average but "
                f"{tuple(pair.source.shape)} in the model; update from the model that the average was made of"
            )
    return pairs


def _collect(part: nn.Module, prefix: str, kind: str, found: list[tuple[str, Tensor]]) -> None:
    for name, tensor in getattr(part, kind).items():
        if tensor is not None:
            found.append((prefix + name, tensor))
    for name, inner in part._modules.items():
        if inner is not None:
            _collect(inner, prefix + name + ".", kind, found)


def _pair(kind: str, averaged: Named, model: Named) -> list[Pair]:
    pairs = _by_name(averaged, model)
    if pairs is None:
        pairs = _by_name(_canonical(averaged), _canonical(model))
    if pairs is None:
        pairs = _by_order(kind, averaged, model)
    return check_shapes(kind, pairs)


def _canonical(tensors: Named) -> Named:
    return [(canonical(name), tensor) for name, tensor in tensors]


def _unique(tensors: Named) -> Named:
    first: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in tensors:
        first.setdefault(id(tensor), (name, tensor))
    return list(first.values())


def _by_name(averaged: Named, model: Named) -> list[Pair] | None:
    sources = dict(model)
    names = [name for name, _ in averaged]
    if len(sources) != len(model) or len(set(names)) != len(names) or sources.keys() != set(names):
        return None
    pairs = [Pair(name, average, sources[name]) for name, average in _unique(averaged)]
    # A tensor tied in the average alone would follow one of the model's tensors and lose the other.
    untied = {id(source) for source in sources.values()} - {id(pair.source) for pair in pairs}
    return None if untied else pairs


def _by_order(kind: str, averaged: Named, model: Named) -> list[Pair]:
    ours, theirs = _unique(averaged), _unique(model)
    if [tensor.shape for _, tensor in ours] == [tensor.shape for _, tensor in theirs]:
        return [Pair(name, average, source) for (name, average), (_, source) in zip(ours, theirs, strict=True)]
    ours, theirs = _canonical(ours), _canonical(theirs)
    known = {name for name, _ in ours}
    found = dict(theirs)
    missing = next((name for name, _ in ours if name not in found), None)
    extra = next((name for name, _ in theirs if name not in known), None)
    parts = []
    if missing:
        parts.append(f"the model has no {kind} {missing!r}")
    if extra:
        parts.append(f"the average has no {kind} {extra!r}")
    if not parts:
        parts = [
            f"{name!r} has shape {tuple(tensor.shape)} in the average but {tuple(found[name].shape)} in the model"
            for name, tensor in ours
            if tensor.shape != found[name].shape
        ][:1] or ["their weights are tied differently"]
    difference = " and ".join(parts)
    raise ValueError(
        f"the average holds {len(ours)} {kind}s and the model {len(theirs)}: {difference}. "
        "Update from the model that the average was made of, or make a new AveragedModel"
    )
