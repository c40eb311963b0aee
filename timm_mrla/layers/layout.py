"""How a tensor holds a map [B, C, H, W]: NCHW, NHWC, or NLC, as tokens [B, P + H * W, C], prefix tokens first."""

import torch

__all__ = ['LAYOUTS', 'from_map', 'to_map']

LAYOUTS = ('NCHW', 'NHWC', 'NLC')


def to_map(
    x: torch.Tensor,
    layout: str,
    feat_size: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The map [B, C, H, W] in x, and of tokens the prefix [B, P, C], which is not in it.

    Args:
        x: The tensor.
        layout: One of LAYOUTS.
        feat_size: The grid (H, W) of tokens.
    """
    if layout == 'NCHW':
        return x, None
    if layout == 'NHWC':
        return x.permute(0, 3, 1, 2), None
    B, N, C = x.shape
    H, W = feat_size
    return x[:, N - H * W :].transpose(1, 2).reshape(B, C, H, W), x[:, : N - H * W]


def from_map(x: torch.Tensor, layout: str, prefix: torch.Tensor | None = None) -> torch.Tensor:
    """A map [B, C, H, W] in a layout, tokens after their prefix [B, P, C]."""
    if layout == 'NCHW':
        return x
    if layout == 'NHWC':
        return x.permute(0, 2, 3, 1)
    return torch.cat([prefix, x.flatten(2).transpose(1, 2)], dim=1)
