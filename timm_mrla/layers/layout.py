"""How a tensor holds a map [B, C, H, W]: NCHW, NHWC, or NLC, as tokens [B, P + H * W, C], prefix tokens first."""

import torch

Grid = tuple[int, int] | None  # (H, W), of tokens

LAYOUTS = ('NCHW', 'NHWC', 'NLC')


def to_map(x: torch.Tensor, layout: str, feat_size: Grid = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The map [B, C, H, W] in x, one of LAYOUTS, and the prefix [B, P, C] of tokens that have one."""
    if layout == 'NCHW':
        return x, None
    if layout == 'NHWC':
        return x.permute(0, 3, 1, 2), None
    if feat_size is None:
        raise ValueError(f'tokens {[*x.shape]} do not tell the grid of their patches: call with feat_size=(H, W)')
    H, W = feat_size
    P = x.shape[1] - H * W
    x, prefix = (x[:, P:], x[:, :P]) if isinstance(P, torch.fx.Proxy) or P else (x, None)  # a proxy is any number
    # other ways to the same values give one image strides of which torch's batch norm computes wrong gradients
    x = x.unflatten(1, (H, W)).permute(0, 3, 1, 2)
    # exporters take an example batch of one for the only batch where a convolution reads such a view; the flag, because
    # is_exporting() is true of torch.compile too, in torch 2.9
    return x.contiguous() if torch.compiler._is_exporting_flag else x, prefix


def from_map(x: torch.Tensor, layout: str, prefix: torch.Tensor | None = None) -> torch.Tensor:
    """A map [B, C, H, W] in a layout, tokens after their prefix [B, P, C]."""
    if layout == 'NCHW':
        return x
    if layout == 'NHWC':
        return x.permute(0, 2, 3, 1)
    x = x.permute(0, 2, 3, 1).flatten(1, 2)
    return x if prefix is None else torch.cat([prefix, x], dim=1)
