"""The tensors of modules and state dicts by name, and which of them belong together."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fastswa.module_update import check_values
from fastswa.pairing import canonical, named_tensors

Weights = nn.Module | Mapping[str, Tensor]
"""A module (of an AveragedModel the averaged one), or a mapping name -> tensor such as a state dict."""

ROLES = ("w1", "w2", "w3")
"""What errors call the points that a plane goes through."""

STATISTICS = ("running_mean", "running_var")
"""How BatchNorm statistics are called in a mapping, which does not say what is a parameter."""


@dataclass(frozen=True)
class NamedWeights:
    """The tensors of a module or of a mapping.

    Args:
        role: what errors call it.
        tensors: by canonical name, without gradients; complex ones as real numbers with one more dimension. Tied ones
            under each of their names. Of buffers those that a state dict holds.
        parameters: names of the parameters, or None for a mapping, which does not say.
    """

    role: str
    tensors: dict[str, Tensor]
    parameters: frozenset[str] | None

    def measures(self, name: str) -> bool:
        """Whether a floating tensor is a parameter, as far as is known.

        Args:
            name: canonical.
        """
        return name.split(".")[-1] not in STATISTICS if self.parameters is None else name in self.parameters

    @property
    def floating(self) -> dict[str, Tensor]:
        """The tensors that can be combined."""
        return {name: tensor for name, tensor in self.tensors.items() if tensor.is_floating_point()}

    @property
    def integers(self) -> dict[str, Tensor]:
        """The other tensors."""
        return {name: tensor for name, tensor in self.tensors.items() if not tensor.is_floating_point()}


@dataclass(frozen=True)
class Entry:
    """A tensor of all points, once, however many names it has.

    Args:
        names: that it has in any of the points.
        points: the tensor of each point; of one shape.
    """

    names: tuple[str, ...]
    points: tuple[Tensor, ...]


def read(weights: Weights, role: str) -> NamedWeights:
    """Take a module or a mapping as named tensors.

    Args:
        weights: to read; its tensors are not copied.
        role: what errors call it.

    Returns:
        The tensors.

    Raises:
        TypeError: neither a module nor a mapping of dense tensors; names the entry.
        ValueError: a tensor without values, or two under one canonical name; names it.
    """
    parameters = None
    if isinstance(weights, AveragedModel):
        weights = weights.module
    if isinstance(weights, nn.Module):
        check_values(weights, role)
        saved = weights.state_dict(keep_vars=True).keys()
        named: Sequence[tuple[str, object]] = named_tensors(weights, "_parameters")
        parameters = frozenset(canonical(name) for name, _ in named)
        buffers = named_tensors(weights, "_buffers")
        named = [*named, *((name, buffer) for name, buffer in buffers if name in saved)]
    elif isinstance(weights, Mapping):
        # What modules store beside tensors.
        named = [(name, value) for name, value in weights.items() if not name.endswith("_extra_state")]
    else:
        raise TypeError(f"{role} must be a module or a mapping name -> tensor, got {type(weights).__name__}")
    tensors: dict[str, Tensor] = {}
    for name, value in named:
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name!r} of {role} is {type(value).__name__}, not a tensor; give the entry of a checkpoint that "
                "holds the state dict"
            )
        if value.layout != torch.strided or value.is_meta:
            raise TypeError(f"{name!r} of {role} is {'meta' if value.is_meta else value.layout}, not a dense tensor")
        if canonical(name) in tensors:
            raise ValueError(f"{role} has two tensors named {canonical(name)!r} without 'module.' and '_orig_mod.'")
        value = value.detach()
        tensors[canonical(name)] = torch.view_as_real(value) if value.is_complex() else value
    return NamedWeights(role, tensors, parameters)


def match(points: Sequence[NamedWeights]) -> list[Entry]:
    """Put the floating tensors of several points together by name.

    A name that a point lacks is found under another that is tied to it, as where a state dict was stored without
    duplicates.

    Args:
        points: at least one.

    Returns:
        One entry for each tensor, tied ones once where they are tied in every point.

    Raises:
        ValueError: a name or a shape that the points do not share; names it and the points.
    """
    floating = [point.floating for point in points]
    aliases: dict[str, set[str]] = {}
    for tensors in floating:
        for names in _tied(tensors):
            for name in names:
                aliases.setdefault(name, set()).update(names)
    entries: dict[tuple[object, ...], Entry] = {}
    for name in aliases:
        found: list[Tensor] = []
        for point, tensors in zip(points, floating, strict=True):
            present = next((each for each in (name, *sorted(aliases[name])) if each in tensors), None)
            if present is None:
                other = next(other.role for other, held in zip(points, floating, strict=True) if name in held)
                raise ValueError(f"{point.role} has no floating tensor {name!r}, but {other} has")
            tensor = tensors[present]
            if found and tensor.shape != found[0].shape:
                raise ValueError(
                    f"{name!r} has shape {tuple(tensor.shape)} in {point.role} but {tuple(found[0].shape)} "
                    f"in {points[0].role}"
                )
            found.append(tensor)
        key = tuple(memory(tensor) or name for tensor in found)
        known = entries.get(key)
        entries[key] = Entry((*known.names, name) if known else (name,), tuple(found))
    return list(entries.values())


def find(entries: Sequence[Entry], weights: NamedWeights, known: Container[str]) -> list[list[Tensor]]:
    """The tensors of further weights that belong to entries.

    Args:
        entries: of the points; each is looked for under all its names.
        weights: to look through.
        known: names of all floating tensors of the points; `weights` may have no other parameters.

    Returns:
        For each entry its tensor; several where a tensor that is tied in the points is not tied here.

    Raises:
        ValueError: a name or a shape that differs, or a tensor that is tied here but not in the points; names it.
    """
    floating, claimed = weights.floating, dict[object, str]()
    here = {memory(tensor) for name, tensor in floating.items() if name in known}
    others = [name for name, tensor in floating.items() if name not in known and memory(tensor) not in here]
    extra = next(filter(weights.measures, others), None)
    if extra is not None:
        raise ValueError(f"{weights.role} has a parameter {extra!r}, but {ROLES[0]} has none of that name")
    found = []
    for entry in entries:
        own = {memory(floating[name]) or name: floating[name] for name in entry.names if name in floating}
        name, shape = entry.names[0], entry.points[0].shape
        if not own:
            raise ValueError(f"{weights.role} has no floating tensor {name!r}, but {ROLES[0]} has")
        for key, tensor in own.items():
            if tensor.shape != shape:
                raise ValueError(
                    f"{name!r} has shape {tuple(tensor.shape)} in {weights.role} but {tuple(shape)} in {ROLES[0]}"
                )
            if key in claimed:
                raise ValueError(f"{claimed[key]!r} and {name!r} are tied in {weights.role} but not in the points")
            claimed[key] = name
        found.append(list(own.values()))
    return found


def memory(tensor: Tensor) -> tuple[object, ...] | None:
    """Where a tensor's values are: equal for tied tensors, which share all of them.

    Args:
        tensor: dense.

    Returns:
        Something to compare, or None for a tensor without elements.
    """
    if not tensor.numel():
        return None
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _tied(tensors: Mapping[str, Tensor]) -> Iterable[list[str]]:
    groups: dict[object, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(memory(tensor) or name, []).append(name)
    return groups.values()
