"""Transformers whose blocks don't know the grid of their tokens: they hand it to them, in timm's own loops."""

from typing import Any

import torch
from torch import nn

from timm_mrla.models._graft import Host
from timm_mrla.models._loops import View, with_grid


class GridHost(Host):
    """A transformer of timm's with `patch_embed` and `blocks`."""

    @staticmethod
    def refusal(module: nn.Module) -> str:
        """Why its blocks can have no layer attention; empty if they can."""
        if rate := getattr(getattr(module, 'patch_drop', None), 'prob', 0.0):
            return f'patch_drop_rate {rate} drops patches, and layer attention needs all of them, use 0'
        return ''

    def call(self, feat_size: tuple[int, int]) -> View:
        """The transformer as a forward pass on a grid (H, W) sees it."""
        return View(self, blocks=with_grid(self.blocks, feat_size))

    def finish(self, call: View, x: torch.Tensor) -> torch.Tensor:
        """What a forward pass makes of the tokens [B, P + N, C] that timm's own returns."""
        return x

    def forward_features(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """timm's method, the grid handed to the blocks."""
        call = self.call(self.patch_embed.dynamic_feat_size(x.shape[-2:]))
        return self.finish(call, self.stock.forward_features(call, x, *args, **kwargs))

    def forward_intermediates(self, x: torch.Tensor, *args, **kwargs) -> Any:
        """timm's method, the grid handed to the blocks."""
        call = self.call(self.patch_embed.dynamic_feat_size(x.shape[-2:]))
        out = self.stock.forward_intermediates(call, x, *args, **kwargs)
        if isinstance(out, tuple):
            return self.finish(call, out[0]), out[1]
        if isinstance(out, dict) and 'image_features' in out:
            out['image_features'] = self.finish(call, out['image_features'])
        return out
