"""Converts between maps [B, C, H, W] and the layouts NCHW, NHWC and NLC: tokens [B, P + H * W, C], prefix first."""

import torch

Grid = tuple[int, int] | None  # (H, W) of tokens

LAYOUTS = ('NCHW', 'NHWC', 'NLC')


def is_exporting() -> bool:
    """Whether torch.export runs; torch's own function is True under torch.compile too, in torch 2.9."""
    return getattr(torch.compiler, '_is_exporting_flag', False)


def to_map(x: torch.Tensor, layout: str, feat_size: Grid = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Split x, in one of LAYOUTS, into its map [B, C, H, W] and its prefix tokens [B, P, C], None if there are none."""
    if layout == 'NCHW':
        return x, None
    if layout == 'NHWC':
        return x.permute(0, 3, 1, 2), None
    if feat_size is None:
        raise ValueError(
            f'tokens {[*x.shape]} do not tell the grid of their patches: pass its rows and columns as '
            'feat_size=(H, W); a wrapper of a block gets them if it has the attribute `mrla` of the block'
        )
    H, W = feat_size
    P = x.shape[1] - H * W
    x, prefix = (x[:, P:], x[:, :P]) if isinstance(P, torch.fx.Proxy) or P else (x, None)  # a proxy: P is unknown
    # keep this order: others give a batch of one image strides with which torch's batch norm computes wrong gradients
    x = x.unflatten(1, (H, W)).permute(0, 3, 1, 2)
    # contiguous, because a convolution of such a view makes exporters fix the batch size to an example batch of one
    return x.contiguous() if is_exporting() else x, prefix


def from_map(x: torch.Tensor, layout: str, prefix: torch.Tensor | None = None) -> torch.Tensor:
    """Convert a map [B, C, H, W] to a layout; in NLC, the prefix tokens [B, P, C] come first."""
    if layout == 'NCHW':
        return x
    if layout == 'NHWC':
        return x.permute(0, 2, 3, 1)
    x = x.permute(0, 2, 3, 1).flatten(1, 2)
    return x if prefix is None else torch.cat([prefix, x], dim=1)
