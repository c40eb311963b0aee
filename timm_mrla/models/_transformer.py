"""Vision transformers of timm with layer attention: their blocks get the grid of the tokens in timm's own loops."""

from typing import Any

import torch
from torch import nn

from timm_mrla.layers import Grid
from timm_mrla.models._graft import Host, LightBlock
from timm_mrla.models._loops import SelfWithOverrides, with_grid


class TokenBlock(LightBlock):
    """A block of a vision transformer, followed by MRLA-light.

    Where no grid is given, it assumes that of the model's own input size. So a user's own loop over the blocks works,
    such as in code for masked image modelling and in feature extractors.
    """

    own_tokens: tuple[int, int, int] | None = None  # prefix tokens, rows and columns of the grid

    def forward(self, x: torch.Tensor, *args, feat_size: Grid = None, **kwargs) -> torch.Tensor:
        if feat_size is None:
            P, H, W = self.own_tokens or (0, 0, 0)
            if x.shape[1] != P + H * W:
                raise ValueError(
                    f'{x.shape[1]} tokens are not the {P} prefix tokens and {H} x {W} patches of this model: call the '
                    'block as block(x, feat_size=(H, W)), with the rows and columns of its patches'
                )
            feat_size = H, W
        return super().forward(x, *args, feat_size=feat_size, **kwargs)


class GridHost(Host):
    """A vision transformer with `patch_embed` and `blocks`."""

    @classmethod
    def adopt(cls, module: nn.Module) -> None:
        """Make a transformer one of this class, and tell its blocks their grid."""
        super().adopt(module)
        module.tell_grid()

    def tell_grid(self) -> None:
        """Tell the blocks the grid of the model's own input size."""
        grid = self.patch_embed.grid_size
        for block in self.blocks.modules():
            if isinstance(block, TokenBlock):
                block.own_tokens = grid and (self.num_prefix_tokens, *grid)

    def set_input_size(self, *args, **kwargs) -> None:
        """timm's method, after which the blocks know the new grid."""
        super().set_input_size(*args, **kwargs)
        self.tell_grid()

    @staticmethod
    def refusal(module: nn.Module) -> str:
        """Why its blocks can have no layer attention; empty if they can."""
        if rate := getattr(getattr(module, 'patch_drop', None), 'prob', 0.0):
            return f'patch_drop_rate {rate} drops patches, and layer attention needs all of them, use 0'
        return ''

    def call(self, feat_size: tuple[int, int]) -> SelfWithOverrides:
        """What stands in for the transformer in a forward pass on a grid (H, W)."""
        return SelfWithOverrides(self, blocks=with_grid(self.blocks, feat_size, self.patch_embed.grid_size))

    def finish(self, call: SelfWithOverrides, x: torch.Tensor) -> torch.Tensor:
        """The result of a forward pass, from the tokens [B, P + N, C] that timm's method returns."""
        return x

    def _start(self, x: torch.Tensor) -> SelfWithOverrides:
        drops = getattr(getattr(self, 'patch_drop', None), 'training', False)
        if drops and (refusal := self.refusal(self)):  # set after the model was built
            raise ValueError(refusal)
        return self.call(self.patch_embed.dynamic_feat_size(x.shape[-2:]))

    def forward_features(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """timm's method, the grid handed to the blocks."""
        call = self._start(x)
        return self.finish(call, self.stock.forward_features(call, x, *args, **kwargs))

    def forward_intermediates(self, x: torch.Tensor, *args, **kwargs) -> Any:
        """timm's method, the grid handed to the blocks."""
        call = self._start(x)
        out = self.stock.forward_intermediates(call, x, *args, **kwargs)
        if isinstance(out, tuple):
            return self.finish(call, out[0]), out[1]
        if isinstance(out, dict) and 'image_features' in out:
            out['image_features'] = self.finish(call, out['image_features'])
        return out
