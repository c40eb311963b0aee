"""Passes the grid of tokens, or the memory of MRLA-base, to blocks in timm's own loops over them."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import nn

from timm_mrla.layers import Grid, layer_attentions, recompute
from timm_mrla.models._graft import Host


class SelfWithOverrides:
    """Stands in for `self` in one call of a timm method, with some attributes replaced.

    timm's `forward_features` calls `self.blocks(x)`, but a block with layer attention needs the grid of its tokens too.
    Storing the grid on the model would mix up two threads with images of two sizes, and a copy of the method would have
    to follow each release of timm. So timm's own method runs, with another `self`:

        call = SelfWithOverrides(vit, blocks=with_grid(vit.blocks, (14, 14)))
        VisionTransformer.forward_features(call, images)  # reads `blocks` from call, and everything else from vit
    """

    def __init__(self, module: nn.Module, **overrides: Any) -> None:
        self._module = module
        for name, value in overrides.items():  # dynamo of torch 2.9 cannot trace an update of self.__dict__
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class FunctionList(list[Callable[..., Any]]):
    """Functions in place of an `nn.Sequential`: timm calls it or loops over it."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        for fn in self:
            x = fn(x)
        return x


def with_grid(blocks: Iterable[nn.Module], feat_size: tuple[int, int]) -> FunctionList:
    """Blocks as functions of tokens; those with layer attention get the grid (H, W) of the tokens."""
    return FunctionList([partial(b, feat_size=feat_size) if hasattr(b, 'mrla') else b for b in blocks])


def with_memory(
    blocks: Iterable[nn.Module], grad_checkpointing: bool, depth: int | None = None, feat_size: Grid = None
) -> FunctionList:
    """Blocks of MRLA-base as functions of one tensor, to be called once each and in order.

    The memory is emptied after every `depth` blocks, if given. The grid (H, W) of tokens is `feat_size`, or the first
    argument of each call after the tokens.
    """
    memory = []

    def call(i: int, block: nn.Module, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if depth and i % depth == 0:
            memory.clear()
        run = partial(recompute, block, block) if grad_checkpointing else block
        if not hasattr(block, 'mrla'):
            return run(x, *args, **kwargs)
        x, *memory[:] = run(x, *memory, feat_size=args[0] if args else feat_size, **kwargs)
        return x

    return FunctionList([partial(call, i, block) for i, block in enumerate(blocks)])


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
        call = self.stand_in(self.patch_embed.dynamic_feat_size(x.shape[-2:]))
        return self.stock.forward_features(call, x, *args, **kwargs)

    def forward_intermediates(self, x: torch.Tensor, *args, **kwargs) -> Any:
        """timm's method, with the grid for the blocks."""
        call = self.stand_in(self.patch_embed.dynamic_feat_size(x.shape[-2:]))
        return self.stock.forward_intermediates(call, x, *args, **kwargs)
