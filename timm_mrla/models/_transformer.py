"""Vision transformers of timm with layer attention: timm's own methods run, and blocks get the grid of the tokens."""

from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import nn

from timm_mrla.layers import layer_attentions
from timm_mrla.models._graft import Host
from timm_mrla.models._loops import SelfWithOverrides, with_grid


class GridHost(Host):
    """A vision transformer with `patch_embed` and `blocks`, which passes the grid of the tokens to its blocks."""

    @classmethod
    def convert(cls, module: nn.Module) -> None:
        """Change the class of a transformer of timm's to this class."""
        super().convert(module)
        module.set_own_tokens()

    def set_own_tokens(self) -> None:
        """Tell layers the model's number of prefix tokens, and its grid, which they assume in users' loops."""
        stem = self.patch_embed
        takes_one_size = isinstance(stem, PatchEmbed) and stem.strict_img_size
        for layer in layer_attentions(self.blocks).values():
            layer.num_prefix_tokens = self.num_prefix_tokens
            layer.grid = stem.grid_size if takes_one_size else None

    def set_input_size(self, *args, **kwargs) -> None:
        """Change the input size as timm does, and the grid that layers assume."""
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

    def forward_features(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """timm's method, with the grid for the blocks."""
        return self.stock.forward_features(self._stand_in_for(x), x, *args, **kwargs)

    def forward_intermediates(self, x: torch.Tensor, *args, **kwargs) -> Any:
        """timm's method, with the grid for the blocks."""
        return self.stock.forward_intermediates(self._stand_in_for(x), x, *args, **kwargs)

    def _stand_in_for(self, x: torch.Tensor) -> SelfWithOverrides:
        return self.stand_in(self.patch_embed.dynamic_feat_size(x.shape[-2:]))
