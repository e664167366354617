"""The models whose tensor shapes the benchmarks use: parameters and buffers, no layers and no forward pass.

An update sees a model as a list of tensors, so the shapes are the whole case. Each is written out from the
architecture's definition, which keeps model zoos out of the requirements; the counts are checked by a test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

Entry = tuple[str, tuple[int, ...], str]
"""A tensor's name, its shape, and its kind: "parameter", "buffer" (float) or "counter" (int64)."""


def _norm(name: str, channels: int) -> Iterator[Entry]:
    yield f"{name}.weight", (channels,), "parameter"
    yield f"{name}.bias", (channels,), "parameter"


def _batch_norm(name: str, channels: int) -> Iterator[Entry]:
    yield from _norm(name, channels)
    yield f"{name}.running_mean", (channels,), "buffer"
    yield f"{name}.running_var", (channels,), "buffer"
    yield f"{name}.num_batches_tracked", (), "counter"


def _conv(name: str, inputs: int, outputs: int, size: int) -> Iterator[Entry]:
    yield f"{name}.weight", (outputs, inputs, size, size), "parameter"


def _linear(name: str, inputs: int, outputs: int, bias: bool = True) -> Iterator[Entry]:
    yield f"{name}.weight", (outputs, inputs), "parameter"
    if bias:
        yield f"{name}.bias", (outputs,), "parameter"


def resnet20() -> Iterator[Entry]:
    """ResNet-20 for CIFAR-10 with parameter-free shortcuts (He et al. 2016, section 4.2)."""
    yield from _conv("stem", 3, 16, 3)
    yield from _batch_norm("stem_norm", 16)
    width = 16
    for stage, channels in enumerate((16, 32, 64)):
        for block in range(3):
            name = f"stage{stage}.{block}"
            yield from _conv(f"{name}.conv1", width, channels, 3)
            yield from _batch_norm(f"{name}.norm1", channels)
            yield from _conv(f"{name}.conv2", channels, channels, 3)
            yield from _batch_norm(f"{name}.norm2", channels)
            width = channels
    yield from _linear("head", 64, 10)


def preresnet164() -> Iterator[Entry]:
    """Pre-activation ResNet-164 with bottleneck blocks for CIFAR-100, as in the SWA paper's code."""
    yield from _conv("stem", 3, 16, 3)
    width = 16
    for stage, channels in enumerate((16, 32, 64)):
        for block in range(18):
            name = f"stage{stage}.{block}"
            yield from _batch_norm(f"{name}.norm1", width)
            yield from _conv(f"{name}.conv1", width, channels, 1)
            yield from _batch_norm(f"{name}.norm2", channels)
            yield from _conv(f"{name}.conv2", channels, channels, 3)
            yield from _batch_norm(f"{name}.norm3", channels)
            yield from _conv(f"{name}.conv3", channels, 4 * channels, 1)
            if block == 0:
                yield from _conv(f"{name}.shortcut", width, 4 * channels, 1)
            width = 4 * channels
    yield from _batch_norm("norm", width)
    yield from _linear("head", width, 100)


def resnet50() -> Iterator[Entry]:
    """ResNet-50 for ImageNet (He et al. 2016)."""
    yield from _conv("stem", 3, 64, 7)
    yield from _batch_norm("stem_norm", 64)
    width = 64
    for stage, (channels, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(blocks):
            name = f"stage{stage}.{block}"
            yield from _conv(f"{name}.conv1", width, channels, 1)
            yield from _batch_norm(f"{name}.norm1", channels)
            yield from _conv(f"{name}.conv2", channels, channels, 3)
            yield from _batch_norm(f"{name}.norm2", channels)
            yield from _conv(f"{name}.conv3", channels, 4 * channels, 1)
            yield from _batch_norm(f"{name}.norm3", 4 * channels)
            if block == 0:
                yield from _conv(f"{name}.shortcut", width, 4 * channels, 1)
                yield from _batch_norm(f"{name}.shortcut_norm", 4 * channels)
            width = 4 * channels
    yield from _linear("head", width, 1000)


def vit_b() -> Iterator[Entry]:
    """ViT-B/16 at 224 pixels (Dosovitskiy et al. 2021)."""
    yield "class_token", (1, 1, 768), "parameter"
    yield "position_embedding", (1, 197, 768), "parameter"
    yield from _conv("patch", 3, 768, 16)
    yield "patch.bias", (768,), "parameter"
    for layer in range(12):
        name = f"layer{layer}"
        yield from _norm(f"{name}.norm1", 768)
        yield from _linear(f"{name}.qkv", 768, 3 * 768)
        yield from _linear(f"{name}.projection", 768, 768)
        yield from _norm(f"{name}.norm2", 768)
        yield from _linear(f"{name}.mlp1", 768, 3072)
        yield from _linear(f"{name}.mlp2", 3072, 768)
    yield from _norm("norm", 768)
    yield from _linear("head", 768, 1000)


def gpt2() -> Iterator[Entry]:
    """GPT-2 124M; the output head is tied to the token embedding (Radford et al. 2019)."""
    yield "token_embedding.weight", (50257, 768), "parameter"
    yield "position_embedding.weight", (1024, 768), "parameter"
    for layer in range(12):
        name = f"layer{layer}"
        yield from _norm(f"{name}.norm1", 768)
        yield from _linear(f"{name}.qkv", 768, 3 * 768)
        yield from _linear(f"{name}.projection", 768, 768)
        yield from _norm(f"{name}.norm2", 768)
        yield from _linear(f"{name}.mlp1", 768, 3072)
        yield from _linear(f"{name}.mlp2", 3072, 768)
    yield from _norm("norm", 768)


def llama8b() -> Iterator[Entry]:
    """Llama-3 8B: grouped-query attention, untied head. 8.03 G elements: for a large GPU only."""
    yield "token_embedding.weight", (128256, 4096), "parameter"
    for layer in range(32):
        name = f"layer{layer}"
        yield from _linear(f"{name}.query", 4096, 4096, bias=False)
        yield from _linear(f"{name}.key", 4096, 1024, bias=False)
        yield from _linear(f"{name}.value", 4096, 1024, bias=False)
        yield from _linear(f"{name}.output", 4096, 4096, bias=False)
        yield from _linear(f"{name}.gate", 4096, 14336, bias=False)
        yield from _linear(f"{name}.up", 4096, 14336, bias=False)
        yield from _linear(f"{name}.down", 14336, 4096, bias=False)
        yield f"{name}.norm1.weight", (4096,), "parameter"
        yield f"{name}.norm2.weight", (4096,), "parameter"
    yield "norm.weight", (4096,), "parameter"
    yield "head.weight", (128256, 4096), "parameter"


CASES: dict[str, Callable[[], Iterator[Entry]]] = {
    case.__name__: case for case in (resnet20, preresnet164, resnet50, vit_b, gpt2, llama8b)
}


class Shapes(nn.Module):
    """A module tree that holds a case's tensors under their dotted names, and computes nothing.

    Args:
        case: a key of `CASES`.
        dtype: of the parameters and the float buffers.
        device: where the tensors are made.
    """

    def __init__(self, case: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> None:
        super().__init__()
        for name, shape, kind in CASES[case]():
            owner: nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            if kind == "counter":
                owner.register_buffer(leaf, torch.zeros(shape, dtype=torch.int64, device=device))
            elif kind == "buffer":
                owner.register_buffer(leaf, torch.rand(shape, dtype=dtype, device=device))
            else:
                # Uniform, not normal: eight times quicker to fill 8 G elements, and as good for a lerp.
                values = torch.empty(shape, dtype=dtype, device=device).uniform_(-1.0, 1.0)
                owner.register_parameter(leaf, nn.Parameter(values))
