"""Tables of addresses that let one launch serve many tensors, and the shape of that launch.

A table is an int64 array on the device with one row for each chunk of a tensor: the address to read, the number of
elements, the number of the first element, the K addresses to write. Rows of averages come first, then rows of plain
copies, which have one address to write and count in bytes. A table costs 24 + 8K bytes for each chunk, 0.2 % of the
traffic that the chunk itself causes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .pairs import dense_view, same_layout


@dataclass(frozen=True)
class LaunchConfig:
    """The shape of one launch.

    Args:
        chunk: elements of a table row; a multiple of `block`.
        block: elements that a program loads at once; a power of two.
        num_warps: warps of a program.
        programs_per_multiprocessor: the persistent grid is at most this many times the multiprocessors.
    """

    chunk: int = 2048
    block: int = 1024
    num_warps: int = 4
    programs_per_multiprocessor: int = 16

    @classmethod
    def for_elements(cls, elements: int, averages: int = 1, wide: bool = False) -> LaunchConfig:
        """Longer chunks for large models, where short ones would need a table of many megabytes.

        Args:
            elements: of all sources together.
            averages: that follow each source.
            wide: whether the arithmetic is float64.

        Returns:
            Chunks of 2048 elements up to 64 Mi elements, of 16384 above. Blocks of 1024 elements, or 512 where more
            than 4 averages in float64 would not fit into a thread's registers.
        """
        return cls(2048 if elements <= 1 << 26 else 16384, 512 if wide and averages > 4 else 1024)

    def grid(self, rows: int, device: torch.device) -> int:
        """The number of programs for a table.

        Args:
            rows: of the table.
            device: where it is launched.

        Returns:
            One program a row, up to what keeps every multiprocessor busy; a program then takes several rows.
        """
        if device.type != "cuda":
            return rows
        properties = torch.cuda.get_device_properties(device)
        return min(rows, properties.multi_processor_count * self.programs_per_multiprocessor)


def refusal(device: torch.device) -> str | None:
    """Why the kernels can't run on a device.

    Args:
        device: where the averages are.

    Returns:
        The reason in words, or None where they can run.

    Example:
        >>> refusal(torch.device("mps"))
        'the kernels run on CUDA and ROCm devices, not on mps'
    """
    if find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda":
        return None
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"the kernels run on CUDA and ROCm devices, not on {device.type}"


def layout_refusal(average: Tensor, source: Tensor) -> str | None:
    """Why a kernel can't walk an average and its source as two equal stretches of memory.

    Args:
        average: the tensor to be written.
        source: the tensor to be read, of the same shape.

    Returns:
        The reason in words, or None where it can.
    """
    if average.device != source.device:
        return f"the average is on {average.device} and its source on {source.device}"
    if source.is_neg() or source.is_conj():
        return "the source is a negated or conjugated view"
    if not same_layout(average, source):
        return "the average and its source have different strides"
    if dense_view(average) is None:
        return "its elements are not dense in memory"
    return None


def build(
    averages: Sequence[Sequence[Tensor]],
    sources: Sequence[Tensor],
    first_elements: Sequence[int],
    copy_to: Sequence[Tensor],
    copy_from: Sequence[Tensor],
    config: LaunchConfig,
) -> tuple[Tensor, int]:
    """The table of one launch, on the device of its tensors.

    Args:
        averages: K lists of tensors of one dtype on one device, each dense.
        sources: tensors of one dtype, of the averages' layout; one for each average of a list.
        first_elements: number of the first element of each source, for its random bits.
        copy_to: tensors of any dtype, to become equal to `copy_from` bit for bit.
        copy_from: tensors of the dtype and layout of `copy_to`.
        config: its `chunk` is the most elements a row may have.

    Returns:
        The table (rows x (3 + K), int64), and how many of its rows are averages.
    """
    lerp_rows = _rows(averages, sources, first_elements, config.chunk, in_bytes=False)
    # A copy has one target; what stands in the other columns is not read.
    targets, zeros = [copy_to] * len(averages), [0] * len(copy_to)
    copy_rows = _rows(targets, copy_from, zeros, 4 * config.chunk, in_bytes=True)
    device = (*sources, *copy_from)[0].device
    return torch.from_numpy(np.concatenate([lerp_rows, copy_rows])).to(device), len(lerp_rows)


def _rows(
    targets: Sequence[Sequence[Tensor]],
    sources: Sequence[Tensor],
    first_elements: Sequence[int],
    chunk: int,
    in_bytes: bool,
) -> npt.NDArray[np.int64]:
    count = np.array([tensor.nbytes if in_bytes else tensor.numel() for tensor in sources], dtype=np.int64)
    tensor_of_row, first = cut(count, chunk)
    rows = np.empty((len(tensor_of_row), 3 + len(targets)), dtype=np.int64)
    rows[:, 0] = addresses(sources, tensor_of_row, first, in_bytes)
    rows[:, 1] = np.minimum(chunk, count[tensor_of_row] - first)
    rows[:, 2] = np.array(first_elements, dtype=np.int64)[tensor_of_row] + first
    for column, tensors in enumerate(targets, 3):
        rows[:, column] = addresses(tensors, tensor_of_row, first, in_bytes)
    return rows


def cut(counts: npt.NDArray[np.int64], chunk: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Tensors in chunks, one for each row of a table.

    Args:
        counts: elements of each tensor.
        chunk: the most elements a row may have.

    Returns:
        For each row the number of its tensor, and of the row's first element in that tensor.
    """
    chunks = -(-counts // chunk)
    tensor_of_row = np.repeat(np.arange(len(counts)), chunks)
    return tensor_of_row, (np.arange(len(tensor_of_row)) - np.repeat(np.cumsum(chunks) - chunks, chunks)) * chunk


def addresses(
    tensors: Sequence[Tensor],
    tensor_of_row: npt.NDArray[np.int64],
    first: npt.NDArray[np.int64],
    in_bytes: bool = False,
) -> npt.NDArray[np.int64]:
    """Where each row of a table starts in memory.

    Args:
        tensors: that `cut` cut.
        tensor_of_row: the number of each row's tensor.
        first: the number of each row's first element.
        in_bytes: elements were counted in bytes.

    Returns:
        An address for each row.
    """
    start = np.array([tensor.data_ptr() for tensor in tensors], dtype=np.int64)
    step = np.array([1 if in_bytes else tensor.element_size() for tensor in tensors], dtype=np.int64)
    return np.asarray(start[tensor_of_row] + first * step[tensor_of_row])
