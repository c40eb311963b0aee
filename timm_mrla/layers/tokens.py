"""MRLA on tokens [B, P + H * W, C]: P prefix tokens (class, distillation, registers), then a grid of H x W patches."""

import torch
from torch import nn

from timm_mrla.layers.layer_attention import Memory, MrlaBase, MrlaLight

__all__ = ['MrlaBaseTokens', 'MrlaLightTokens', 'to_map', 'to_tokens']


def to_map(x: torch.Tensor, feat_size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B, P + H * W, C] -> prefix tokens [B, P, C], patches as a map [B, C, H, W]."""
    B, N, C = x.shape
    H, W = feat_size
    return x[:, : N - H * W], x[:, N - H * W :].transpose(1, 2).reshape(B, C, H, W)


def to_tokens(prefix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Prefix tokens [B, P, C], a map [B, C, H, W] -> tokens [B, P + H * W, C]."""
    return torch.cat([prefix, x.flatten(2).transpose(1, 2)], dim=1)


class _Tokens:
    """Norms x and o, retrieves on the map of the patches, and adds the result to x.

    A prefix token has no place on the map: it gets its normed self added, where a patch gets what it retrieved.
    """

    def __init__(
        self,
        dim: int,
        dim_head: int,
        norm_x: type[nn.Module],
        norm_o: type[nn.Module] | None = None,
        device=None,
        dtype=None,
        **kwargs,
    ) -> None:
        """
        Args:
            dim: Width of a token, C.
            dim_head: Channels per head, d; divides dim, or ValueError is raised.
            norm_x: Norm of the block's output before it is read.
            norm_o: Norm of the block's input before it is read.
            **kwargs: The arguments of the layer attention on maps.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__(dim, dim_head, **kwargs, **dd)
        self.norm_x = norm_x(dim, **dd)
        self.norm_o = norm_o(dim, **dd) if norm_o else nn.Identity()

    def gates(self) -> list[nn.Parameter]:
        """The parameters that, at zero, make it add exactly nothing while a gradient still reaches them."""
        return list(self.norm_x.parameters())

    def branch(
        self,
        x: torch.Tensor,
        o: torch.Tensor | None,
        feat_size: tuple[int, int],
        memory: Memory,
    ) -> tuple[torch.Tensor, Memory]:
        """What is added to x, but for drop_path, and the memory for the next block."""
        prefix, x = to_map(self.norm_x(x), feat_size)
        if o is not None:
            _, o = to_map(self.norm_o(o), feat_size)
        m, memory = super().branch(x, o, memory)
        return to_tokens(prefix, m), memory

    def forward(
        self,
        x: torch.Tensor,
        o: torch.Tensor,
        feat_size: tuple[int, int],
        memory: Memory,
    ) -> tuple[torch.Tensor, Memory]:
        """
        Args:
            x: Output of the block, [B, P + H * W, C].
            o: Input of the block, [B, P + H * W, C].
            feat_size: The grid (H, W).
            memory: Keys and values of the stage's blocks so far.

        Returns:
            x with what was retrieved added to it, and the memory for the next block.
        """
        return self.add_branch(x, o, feat_size, memory)


class MrlaLightTokens(_Tokens, MrlaLight):
    """MRLA-light on tokens."""

    def gates(self) -> list[nn.Parameter]:
        """As above, with lam, through which the block's input passes."""
        return [*super().gates(), self.lam]


class MrlaBaseTokens(_Tokens, MrlaBase):
    """MRLA-base on tokens."""
