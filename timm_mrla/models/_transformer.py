"""Vision transformers of timm with layer attention: timm's own methods run, and blocks get the grid of the tokens."""

from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import nn

from timm_mrla.layers import Grid, layer_attentions
from timm_mrla.models._graft import Host, LightBlock
from timm_mrla.models._loops import SelfWithOverrides, with_grid


class TokenBlock(LightBlock):
    """A block with MRLA-light. Without `feat_size`, it assumes the model's own grid, for users' loops over blocks."""

    own_grid: Grid = None  # None if the model takes images of several sizes

    def forward(self, x: torch.Tensor, *args, feat_size: Grid = None, **kwargs) -> torch.Tensor:
        if feat_size is None and self.own_grid is None:
            raise ValueError(
                f'{x.shape[1]} tokens do not tell their grid, as the model takes images of several sizes: call the '
                'block as block(x, feat_size=(H, W)), with the rows and columns of its patches; a wrapper gets them if '
                'it has the attribute `mrla` of its block'
            )
        return super().forward(x, *args, feat_size=feat_size or self.own_grid, **kwargs)


class GridHost(Host):
    """A vision transformer with `patch_embed` and `blocks`, which passes the grid of the tokens to its blocks."""

    @classmethod
    def convert(cls, module: nn.Module) -> None:
        """Change the class of a transformer of timm's to this class."""
        super().convert(module)
        module.set_own_tokens()

    def own_grid(self) -> Grid:
        """The grid (H, W) of the model's own input size; None if it takes other sizes too."""
        stem = self.patch_embed
        return stem.grid_size if isinstance(stem, PatchEmbed) and stem.strict_img_size else None

    def set_own_tokens(self) -> None:
        """Tell blocks the model's number of prefix tokens, and the grid that they assume by default."""
        for layer in layer_attentions(self.blocks).values():
            layer.num_prefix_tokens = self.num_prefix_tokens
        for block in self.blocks.modules():
            if isinstance(block, TokenBlock):
                block.own_grid = self.own_grid()

    def set_input_size(self, *args, **kwargs) -> None:
        """Change the input size as timm does, and the grid that blocks assume."""
        super().set_input_size(*args, **kwargs)
        self.set_own_tokens()

    @staticmethod
    def unsupported(module: nn.Module) -> str:
        """The reason why the blocks of a module support no layer attention; empty if they do."""
        if rate := getattr(getattr(module, 'patch_drop', None), 'prob', 0.0):
            return f'patch_drop_rate {rate} drops patches, and layer attention needs all of them, use 0'
        return ''

    def stand_in(self, feat_size: tuple[int, int]) -> SelfWithOverrides:
        """The `self` of timm's methods for one forward pass on a grid (H, W)."""
        return SelfWithOverrides(self, blocks=with_grid(self.blocks, feat_size))

    def finish(self, call: SelfWithOverrides, x: torch.Tensor) -> torch.Tensor:
        """Change the tokens [B, P + N, C] that timm's method returns, if a subclass must."""
        return x

    def _start(self, x: torch.Tensor) -> SelfWithOverrides:
        drops = getattr(getattr(self, 'patch_drop', None), 'training', False)
        if drops and (reason := self.unsupported(self)):  # patch_drop was set after the model was built
            raise ValueError(reason)
        return self.stand_in(self.patch_embed.dynamic_feat_size(x.shape[-2:]))

    def forward_features(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """timm's method, with the grid for the blocks."""
        call = self._start(x)
        return self.finish(call, self.stock.forward_features(call, x, *args, **kwargs))

    def forward_intermediates(self, x: torch.Tensor, *args, **kwargs) -> Any:
        """timm's method, with the grid for the blocks."""
        call = self._start(x)
        out = self.stock.forward_intermediates(call, x, *args, **kwargs)
        if isinstance(out, tuple):
            return self.finish(call, out[0]), out[1]
        if isinstance(out, dict) and 'image_features' in out:
            out['image_features'] = self.finish(call, out['image_features'])
        return out
