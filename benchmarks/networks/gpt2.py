"""GPT-2 of 124 million parameters, for training."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, scaled_dot_product_attention


class Block(nn.Module):
    """Causal self-attention and a multi-layer perceptron, each after a LayerNorm and added to its input.

    Args:
        width: of a token's vector.
        heads: of the attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp1 = nn.Linear(width, 4 * width)
        self.mlp2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).reshape(batch, length, width))
        residual: Tensor = self.mlp2(gelu(self.mlp1(self.norm2(x)), approximate="tanh"))
        return x + residual


class GPT2(nn.Module):
    """A decoder whose output head is tied to the token embedding; without dropout.

    Args:
        layers: blocks.
        width: of a token's vector.
        heads: of the attention.
        vocabulary: tokens.
        context: the longest sequence.

    Example:
        >>> GPT2(layers=1, width=8, heads=2, vocabulary=50, context=16)(torch.zeros(3, 5, dtype=torch.int64)).shape
        torch.Size([3, 5, 50])

    References:
        Radford et al. 2019, Language Models are Unsupervised Multitask Learners.
    """

    def __init__(
        self, layers: int = 12, width: int = 768, heads: int = 12, vocabulary: int = 50257, context: int = 1024
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for weight in (self.token_embedding.weight, self.position_embedding.weight):
            # As published: with torch's deviation of 1 the tied head would give scores of the size of the width.
            nn.init.normal_(weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.blocks(self.token_embedding(tokens) + self.position_embedding(positions))
        return linear(self.norm(x), self.token_embedding.weight)
