"""What one process holds of tensors that several hold together: the only file that knows DTensor.

Whoever shards a model has imported DTensor, so it is looked up among the loaded modules, and nobody else pays for it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, distributed, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

held = attrgetter("_local_tensor")
"""The object in which a DTensor keeps this process's part; FSDP2 puts another in its place when the part moves."""


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor: held by several processes together, each a part or a replica.

    Args:
        tensor: any.

    Example:
        >>> is_sharded(torch.zeros(2))
        False
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, without gradients: itself, or its part of a DTensor, which may be empty.

    Args:
        tensor: any.

    Returns:
        A tensor that shares its memory. No process asks another.

    Example:
        >>> local(torch.nn.Parameter(torch.ones(2)))
        tensor([1., 1.])
    """
    part: Tensor = held(tensor) if is_sharded(tensor) else tensor
    return part.detach()


def layout(tensor: Tensor) -> tuple[Any, ...]:
    """The shape of the whole tensor, and how processes share it: equal for tensors whose parts are alike.

    Args:
        tensor: any.

    Example:
        >>> layout(torch.zeros(2, 3))
        (torch.Size([2, 3]), None, None)
    """
    return (tensor.shape, *((tensor.placements, tensor.device_mesh) if is_sharded(tensor) else (None, None)))


def first_elements(tensors: Sequence[Tensor]) -> list[int]:
    """The numbers of the first elements that this process holds, among all elements of all tensors.

    Replicas have the same numbers on every process. So has an element wherever it is held, if its tensor is cut along
    its rows over one dimension of a mesh, as by FSDP2; otherwise each part's numbers begin with the tensor's own.

    Args:
        tensors: any. Of complex ones each element counts twice.

    Returns:
        A number for each.

    Example:
        >>> first_elements([torch.zeros(2, 3), torch.zeros(4)])
        [0, 6]
    """
    numbers, number = [], 0
    for tensor in tensors:
        scale = 2 if tensor.is_complex() else 1
        numbers.append(number + scale * _first_row(tensor) * math.prod(tensor.shape[1:]))
        number += scale * tensor.numel()
    return numbers


def _first_row(tensor: Tensor) -> int:
    coordinate = tensor.device_mesh.get_coordinate() if is_sharded(tensor) else None
    if not is_sharded(tensor) or coordinate is None:
        return 0
    cuts = [(dim, cut) for dim, cut in enumerate(tensor.placements) if cut.is_shard()]
    if len(cuts) != 1 or not cuts[0][1].is_shard(0):
        return 0
    dim = cuts[0][0]
    return min(coordinate[dim] * -(-tensor.shape[0] // tensor.device_mesh.size(dim)), tensor.shape[0])


def refusal(tensor: Tensor) -> str | None:
    """Why the parts of a tensor can't be averaged each by itself.

    Args:
        tensor: any.

    Returns:
        The reason in words, or None.
    """
    if is_sharded(tensor) and any(placement.is_partial() for placement in tensor.placements):
        return f"is placed as {tensor.placements}, a sum still to be made over processes; redistribute it first"
    return None


def module_refusal(module: nn.Module) -> str | None:
    """Why a module's parts can't be averaged each by itself, whatever its tensors are.

    Args:
        module: any.

    Returns:
        The reason in words, or None.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return None
    for name, part in module.named_modules():
        if isinstance(part, fsdp.FullyShardedDataParallel):
            return (
                f"{repr(name) if name else 'the model'} is FullyShardedDataParallel, whose parameters are pieces of no "
                "known shape and place; shard it by torch.distributed.fsdp.fully_shard (FSDP2)"
            )
    return None


def placed(part: Tensor, like: Tensor) -> Tensor:
    """A part as the DTensor that it is a part of.

    Args:
        part: of the shape of `local(like)`, whatever its dtype and device.
        like: a DTensor, whose mesh, placements and shape the result gets; for any other tensor, `part` is handed out.

    Returns:
        A DTensor around `part` itself. No process asks another.
    """
    if not is_sharded(like):
        return part
    kind = type(like)
    # from_local guesses the whole shape as if all parts were equal, and would move the part to the mesh's device; so it
    # makes what only serves to be taken apart.
    mold = kind.from_local(torch.empty_like(part, device="meta"), like.device_mesh, like.placements)
    names, context = mold.__tensor_flatten__()  # type: ignore[no-untyped-call]
    parts = {**{name: getattr(mold, name) for name in names}, "_local_tensor": part}
    whole: Tensor = kind.__tensor_unflatten__(parts, context, like.shape, like.stride())  # type: ignore[no-untyped-call]
    return whole


def cut(whole: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor: of a DTensor placed like another, or cut from one that every process has whole.

    Args:
        whole: of the shape of `like`.
        like: any; where it is no DTensor, `whole` is handed out.

    Returns:
        A tensor of the shape of `local(like)`. No process asks another.
    """
    if is_sharded(whole) or not is_sharded(like):
        return local(whole)
    from torch.distributed.tensor import distribute_tensor

    # Without a source rank each process cuts its own.
    return held(distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None))  # type: ignore[no-any-return]


def gathered(tensor: Tensor) -> Tensor:
    """A whole tensor; a DTensor is gathered on all processes of its mesh, which must all call this.

    Args:
        tensor: any.
    """
    if not is_sharded(tensor):
        return tensor
    # The processes talk through the mesh's device, where the part may not be.
    whole = placed(local(tensor).to(tensor.device_mesh.device_type), tensor)
    assert is_sharded(whole)
    return whole.full_tensor()


def is_first(tensors: Iterable[Tensor]) -> bool:
    """Whether this process is the first of every mesh that tensors are placed on; so is every one where none is.

    Args:
        tensors: any.
    """
    meshes = (tensor.device_mesh for tensor in tensors if is_sharded(tensor))
    return not any(any(mesh.get_coordinate() or [1]) for mesh in meshes)


def groups(tensors: Iterable[Tensor]) -> Sequence[distributed.ProcessGroup]:
    """The groups of processes, one for each dimension, of the mesh with the most processes that tensors are placed on.

    Args:
        tensors: any.

    Returns:
        What one process tells its first group, and each member of that its second, and so on, all processes know.
    """
    meshes = [tensor.device_mesh for tensor in tensors if is_sharded(tensor) and tensor.device_mesh.get_coordinate()]
    return max(meshes, key=lambda mesh: mesh.size()).get_all_groups() if meshes else []


def reshard(module: nn.Module) -> None:
    """Let FSDP2 give up the whole parameters that a forward pass left in a module; no process asks another.

    Args:
        module: any.
    """
    # FSDP2 does that before each state_dict, in whatever state an exception left it; FSDPModule.reshard does not.
    module.state_dict(keep_vars=True)
