"""Queries and keys of layer attention, and what follows from them: the gate of MRLA-light, the scores of MRLA-base."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

Memory = tuple[torch.Tensor, ...]  # key, value, key, value, ...


class QueryKey(nn.Conv2d):
    """The 1-d convolutions of query and key, for any number of channels. Its own class, so that pruners can skip it."""


class _Heads(nn.Module):
    """Base class: computes the query and the key of a map for each head."""

    def __init__(self, dim: int, dim_head: int, device=None, dtype=None) -> None:
        """The arguments are those of the layer. Raises ValueError if dim_head does not divide dim."""
        super().__init__()
        if dim_head < 1 or dim % dim_head:
            raise ValueError(f'dim {dim} is not divisible by dim_head {dim_head}')
        self.num_heads = dim // dim_head
        size = int(abs((math.log2(dim) + 1) / 2)) // 2 * 2 + 1  # kernel size, as in ECA-Net, arXiv:1910.03151
        # one 2-d convolution for query and key, over an image of height B: 1-d convolutions take several times as long
        self.qk = QueryKey(1, 2, (1, size), padding=(0, size // 2), bias=False, device=device, dtype=dtype)

    def query_key(self, x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Query / sqrt(d) and key [B, heads, d] of a map [B, C, H, W]. dim is C, which pruning may have changed."""
        if dim % self.num_heads:
            raise ValueError(f'{dim} channels are no multiple of the {self.num_heads} heads; prune to one that is')
        # sum, not mean, because its gradient is a view and not a map; float32, because float16 overflows on large maps
        y = x.sum((2, 3), dtype=torch.promote_types(x.dtype, torch.float32)) / (x.shape[2] * x.shape[3])
        y, B = y.to(x.dtype), x.shape[0]
        is_empty = not (isinstance(B, torch.fx.Proxy) or torch.jit.is_tracing()) and B == 0
        if is_empty:
            y = F.pad(y, (0, 0, 0, 1))  # torch refuses an image of height 0
        qk = self.qk(y[None, None]).unflatten(-1, (self.num_heads, dim // self.num_heads))[0]
        if is_empty:
            qk = qk[:, :0]
        return qk[0] * (dim // self.num_heads) ** -0.5, qk[1]

    def per_channel(self, weights: torch.Tensor, dim: int) -> torch.Tensor:
        """Repeat the weights of heads [B, heads] for their channels: [B, C, 1, 1]."""
        return weights.unsqueeze(-1).expand(-1, -1, dim // self.num_heads).flatten(1)[:, :, None, None]


class Gate(_Heads):
    """The gate of MRLA-light, `sigmoid(<q, k> / sqrt(d))`: map [B, C, H, W] and dim (C) -> gate [B, heads]."""

    def forward(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.mul(*self.query_key(x, dim)).sum(-1).sigmoid()


class Scores(_Heads):
    """The scores of MRLA-base: `<q_t, k_s> / sqrt(d)` for the blocks s <= t of the stage, before the softmax over s.

    Map [B, C, H, W], dim (C) and the keys of blocks s < t -> scores [B, heads, t + 1] and the key of block t. MrlaBase
    applies the softmax: here, its name in a traced graph would end in `attn.softmax`, and timm and others would take it
    for attention between tokens.
    """

    def forward(self, x: torch.Tensor, dim: int, keys: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = self.query_key(x, dim)
        return torch.stack([(q * key).sum(-1) for key in (*keys, k)], dim=-1), k
