"""What transformers share: layer attention in the form of the paper's DeiT, and a loop that hands on its memory."""

from collections.abc import Callable
from typing import Any

import torch
from timm.models._features import feature_take_indices  # how timm reads `indices`; not exported
from torch import nn

from timm_mrla.layers import MrlaBaseTokens, MrlaLightTokens
from timm_mrla.models._block import run_block

__all__ = ['LayerAttentionTransformer', 'base_tokens', 'light_tokens']


def light_tokens(dim: int, norm_layer: Callable[..., nn.Module], **kwargs) -> MrlaLightTokens:
    """MRLA-light as the paper's DeiT has it, for tokens of width dim, with norm_layer for what it reads."""
    return MrlaLightTokens(dim, dim_head=16, norm_x=norm_layer, norm_o=norm_layer, act_v=nn.GELU, **kwargs)


def base_tokens(dim: int, norm_layer: Callable[..., nn.Module], **kwargs) -> MrlaBaseTokens:
    """MRLA-base as the paper's DeiT has it, for tokens of width dim, with norm_layer for what it reads."""
    return MrlaBaseTokens(dim, dim_head=16, norm_x=norm_layer, **kwargs)


class LayerAttentionTransformer:
    """For a VisionTransformer of timm's with blocks `x, memory = block(x, feat_size, memory, attn_mask, is_causal)`."""

    mrla_stage_depth: int  # blocks after which the memory starts anew

    def __init__(self, *args, patch_drop_rate: float = 0.0, **kwargs) -> None:
        """
        Args:
            *args: As in timm's model.
            patch_drop_rate: 0, since a grid with dropped patches is no map.
            **kwargs: As in timm's model.
        """
        if patch_drop_rate:
            raise ValueError(f'patch_drop_rate {patch_drop_rate}: layer attention needs every patch, use 0')
        super().__init__(*args, **kwargs)

    def forward_blocks(
        self,
        x: torch.Tensor,
        feat_size: tuple[int, int],
        num_blocks: int,
        take: Callable[[int, torch.Tensor], None],
        attn_mask: torch.Tensor | None,
        is_causal: bool,
    ) -> torch.Tensor:
        """Run the first blocks.

        Args:
            x: Tokens [B, P + H * W, C].
            feat_size: The grid (H, W).
            num_blocks: How many blocks to run.
            take: Called with the index and the output of each.
            attn_mask: Mask of the self-attention.
            is_causal: Causal self-attention.

        Returns:
            Tokens [B, P + H * W, C].
        """
        for i, block in zip(range(num_blocks), self.blocks, strict=False):
            if i % self.mrla_stage_depth == 0:
                memory = []
            args = (x, feat_size, memory, attn_mask, is_causal)
            x, memory = run_block(block, *args, grad_checkpointing=self.grad_checkpointing)
            take(i, x)
        return x

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]] | dict[str, Any]:
        """timm's method of this name, written again because its loop hands the blocks neither grid nor memory.

        Args:
            x: Images [B, C, H, W].
            indices: The last n blocks if int, all if None, the given ones if a sequence.
            return_prefix_tokens: Return the prefix tokens [B, P, C] beside each intermediate.
            norm: Apply the final norm to the intermediates.
            stop_early: Stop after the last block asked for.
            output_fmt: 'NCHW' for maps, 'NLC' for tokens without prefix.
            intermediates_only: Return the intermediates alone.
            output_dict: Return a dictionary of 'image_features', 'image_intermediates', 'image_intermediates_prefix'.
            attn_mask: Mask of the self-attention.
            is_causal: Causal self-attention.

        Returns:
            The final features [B, P + N, C] and the intermediates, or what the arguments above ask for instead.
        """
        if output_fmt not in ('NCHW', 'NLC'):
            raise ValueError(f"output_fmt {output_fmt!r} is neither 'NCHW' nor 'NLC'")
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        feat_size = self.patch_embed.dynamic_feat_size(x.shape[-2:])

        taken = []

        def take(i: int, y: torch.Tensor) -> None:
            if i in take_indices:
                taken.append(self.norm(y) if norm else y)

        x = self.norm_pre(self._pos_embed(self.patch_embed(x)))
        num_blocks = max_index + 1 if stop_early else len(self.blocks)
        x = self.forward_blocks(x, feat_size, num_blocks, take, attn_mask, is_causal)

        prefix = [y[:, : self.num_prefix_tokens] for y in taken]
        intermediates = [y[:, self.num_prefix_tokens :] for y in taken]
        if output_fmt == 'NCHW':
            intermediates = [y.transpose(1, 2).unflatten(2, feat_size).contiguous() for y in intermediates]
        return_prefix_tokens = return_prefix_tokens and self.num_prefix_tokens > 0

        if output_dict:
            out = {'image_intermediates': intermediates}
            if return_prefix_tokens:
                out['image_intermediates_prefix'] = prefix
            if not intermediates_only:
                out['image_features'] = self.norm(x)
            return out
        if return_prefix_tokens:
            intermediates = list(zip(intermediates, prefix, strict=True))
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def forward_features(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """Images [B, C, H, W] -> normed tokens [B, P + N, C]."""
        return self.forward_intermediates(x, 1, output_fmt='NLC', attn_mask=attn_mask, is_causal=is_causal)[0]
