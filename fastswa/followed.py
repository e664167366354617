"""The tensors that averages follow: which of a model's, under which names, and whether they changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from fastswa import shards
from fastswa.module_update import check_values
from fastswa.pairing import canonical, named_tensors
from fastswa.watch import TensorWatch

Model = nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
Patterns = str | Sequence[str] | Callable[[str], bool] | None


@dataclass(frozen=True)
class Followed:
    """A tensor, once, however many names it has.

    Args:
        names: canonical names, the first one first.
        tensor: the model's own.
        averaged: whether it is averaged; otherwise it is copied.
        saved: whether a state_dict of the model holds it.
        buffer: whether it is a module's buffer.
    """

    names: tuple[str, ...]
    tensor: Tensor
    averaged: bool
    saved: bool
    buffer: bool

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]

    @property
    def local(self) -> Tensor:
        """What this process holds of the tensor, without gradients."""
        return shards.local(self.tensor)


class Selection:
    """Chooses tensors of a model, and notices when they change.

    Args:
        model: a module, a mapping or pairs (name, tensor).
        include: names to follow: a pattern as in a shell ("layers.*"), several, or a function of the name; all if left
            out.
        exclude: names not to follow, likewise.
        trainable_only: leave out parameters that need no gradient.
        buffers: "copy", "average" or "ignore".

    Raises:
        ValueError: nothing to average; a tensor that holds no values yet, named.
        TypeError: a tensor that can't be followed, named.
    """

    def __init__(self, model: Model, include: Patterns, exclude: Patterns, trainable_only: bool, buffers: str) -> None:
        self._module = model if isinstance(model, nn.Module) else None
        if buffers not in ("copy", "average", "ignore"):
            raise ValueError(f"buffers must be 'copy', 'average' or 'ignore', got {buffers!r}")
        # A mapping itself, whose tensors may be replaced, or what an iterable gave.
        self._pairs: Mapping[str, Tensor] = {}
        self._more: dict[str, Tensor] = {}
        if isinstance(model, nn.Module):
            reason = shards.module_refusal(model)
            if reason is not None:
                raise TypeError(reason)
            check_values(model, "the model")
        else:
            self._pairs = model if isinstance(model, Mapping) else dict(model)
        self._include, self._exclude = include, exclude
        self._trainable_only = trainable_only
        self._buffers = buffers
        self._watch: TensorWatch | None = None
        self.followed: list[Followed] = []
        """What is followed, in the order in which neighbours in memory are of a kind."""
        self.refresh()
        if not any(each.averaged for each in self.followed):
            raise ValueError("no tensor is averaged; look at include, exclude and trainable_only")

    def unchanged(self) -> bool:
        """Whether the model holds the same tensors, in the same memory, as when last looked at."""
        return (
            self._watch is not None
            and self._watch.unchanged()
            and len(self._held) == len(self._pairs)
            and all(self._pairs.get(name) is tensor for name, tensor in self._held.items())
        )

    def look(self, advice: str = "accept it by refresh()") -> None:
        """Take up the tensors that now have the names and shapes that are followed.

        Args:
            advice: what to do about a model that changed, for the error.

        Raises:
            ValueError: a tensor appeared, disappeared or changed its shape or kind; names the first. Nothing changed.
            RuntimeError: a tensor is not sharded at present; names the first. Nothing changed.
        """
        self._refuse_unsharded()
        now = self._select()
        before = {each.name: each for each in self.followed}
        present = {each.name: each for each in now}
        for name in (*present, *before):
            if name not in present or name not in before:
                what = "is no longer in the model" if name not in present else "has appeared in the model"
                raise ValueError(f"{name!r} {what}; {advice}")
        for name, each in before.items():
            shape = tuple(present[name].tensor.shape)
            if shape != tuple(each.tensor.shape):
                raise ValueError(f"{name!r} had shape {tuple(each.tensor.shape)} and now has {shape}; {advice}")
            if shards.layout(present[name].tensor) != shards.layout(each.tensor):
                raise ValueError(f"{name!r} is placed on the processes otherwise than before; {advice}")
        self.followed = [present[each.name] for each in self.followed]
        self._watch = self._new_watch()

    def refresh(self) -> None:
        """Take up whatever is in the model now.

        Raises:
            RuntimeError: a tensor is not sharded at present; names the first. Nothing changed.
        """
        self._refuse_unsharded()
        self.followed = sorted(self._select(), key=_neighbourhood)
        self._watch = self._new_watch()

    def add(self, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        """Follow further tensors of a mapping or of pairs.

        Args:
            tensors: by names that are not followed yet.

        Raises:
            ValueError: a name that is followed already.
        """
        more = dict(tensors.items() if isinstance(tensors, Mapping) else tensors)
        taken = {name for each in self.followed for name in each.names}
        known = next((name for name in more if name in taken), None)
        if known is not None:
            raise ValueError(f"{known!r} is followed already")
        before = self._more
        self._more = {**before, **more}
        try:
            self.refresh()
        except Exception:
            self._more = before
            raise

    def __getstate__(self) -> dict[str, Any]:
        # A copy's tensors have other memory.
        return {**self.__dict__, "_watch": None}

    @property
    def tensors(self) -> list[Tensor]:
        """What this process holds of the tensors that are followed, without gradients."""
        return [each.local for each in self.followed]

    @property
    def module(self) -> nn.Module | None:
        """The module, if it is one that is followed."""
        return self._module

    def _new_watch(self) -> TensorWatch:
        self._held = dict(self._pairs)
        holder = nn.Module()
        others = (*self._pairs.values(), *self._more.values())
        holder._buffers.update({str(number): tensor for number, tensor in enumerate(others)})
        if self._module is not None:
            holder._modules["followed"] = self._module
        return TensorWatch(holder)

    def _refuse_unsharded(self) -> None:
        """Refuse what FSDP2 puts in its parameters' place between a forward and a backward pass."""
        sharded = {each.name: each.tensor for each in self.followed if shards.is_sharded(each.tensor)}
        if self._module is None or not sharded:
            return
        for name, parameter in named_tensors(self._module, "_parameters"):
            known = sharded.get(canonical(name))
            # Another shape is the user's doing.
            if known is None or parameter.shape != known.shape:
                continue
            if shards.layout(parameter) != shards.layout(known):
                raise RuntimeError(
                    f"{canonical(name)!r} is not sharded now as it was at first: finish the backward pass before, or "
                    "call reshard() on each FSDP module after a forward pass that has none"
                )

    def _select(self) -> list[Followed]:
        found: dict[int, Followed] = {}
        for name, tensor, is_buffer, saved in self._named():
            if not _matches(self._include, name, True) or _matches(self._exclude, name, False):
                continue
            if is_buffer and self._buffers == "ignore":
                continue
            if self._trainable_only and not is_buffer and not tensor.requires_grad:
                continue
            if tensor.layout != torch.strided:
                raise TypeError(f"{name!r} is {tensor.layout} and can't be averaged; exclude it")
            reason = shards.refusal(tensor)
            if reason is not None:
                raise TypeError(f"{name!r} {reason}")
            floating = tensor.is_floating_point() or tensor.is_complex()
            averaged = floating and (not is_buffer or self._buffers == "average")
            known = found.get(id(tensor))
            names = (*known.names, name) if known else (name,)
            found[id(tensor)] = Followed(names, tensor, averaged, saved, is_buffer)
        return list(found.values())

    def _named(self) -> Iterable[tuple[str, Tensor, bool, bool]]:
        for name, tensor in (*self._pairs.items(), *self._more.items()):
            yield name, tensor, False, True
        if self._module is None:
            return
        saved = {canonical(name) for name in self._module.state_dict(keep_vars=True)}
        for name, parameter in named_tensors(self._module, "_parameters"):
            yield canonical(name), parameter, False, canonical(name) in saved
        for name, buffer in named_tensors(self._module, "_buffers"):
            yield canonical(name), buffer, True, canonical(name) in saved


def tensors_of(model: nn.Module | Mapping[str, Tensor]) -> Iterable[Tensor]:
    """The tensors of which some may be followed.

    Args:
        model: a module or a mapping.
    """
    return model.parameters() if isinstance(model, nn.Module) else model.values()


def counterparts(model: Model, followed: Sequence[Followed]) -> list[Tensor]:
    """The tensors of another model by the names that are followed.

    Args:
        model: a module, a mapping or pairs.
        followed: tensors whose first names it has.

    Returns:
        What this process holds of its tensors, in the order of `followed`.

    Raises:
        ValueError: a tensor that the model has not, or has in another shape or otherwise sharded; names it.
    """
    present = Selection(model, None, None, False, "average").followed
    found = {name: each.tensor for each in present for name in each.names}
    for each in followed:
        shape = tuple(found[each.name].shape) if each.name in found else None
        if shape != tuple(each.tensor.shape):
            what = "has no" if shape is None else f"has shape {shape} for"
            raise ValueError(f"the model {what} {each.name!r}, which is averaged in shape {tuple(each.tensor.shape)}")
        if shards.layout(found[each.name]) != shards.layout(each.tensor):
            raise ValueError(f"the model's {each.name!r} is not sharded as its average is; take weights(full=True)")
    return [shards.local(found[each.name]) for each in followed]


def _matches(patterns: Patterns, name: str, default: bool) -> bool:
    if patterns is None:
        return default
    if callable(patterns):
        return patterns(name)
    return any(fnmatchcase(name, pattern) for pattern in ([patterns] if isinstance(patterns, str) else patterns))


def _neighbourhood(each: Followed) -> tuple[Any, ...]:
    # By the size of the whole tensor, so that every process has the same order.
    return not each.averaged, str(each.tensor.dtype), each.tensor.numel()
