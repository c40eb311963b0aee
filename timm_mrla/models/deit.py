"""DeiT with multi-head recurrent layer attention (MRLA)

Papers:
* `Cross-Layer Retrospective Retrieving via Layer Attention` - https://arxiv.org/abs/2302.03985
* `Training data-efficient image transformers & distillation through attention` - https://arxiv.org/abs/2012.12877
"""

import re
from functools import partial

import torch
from timm.layers import LayerNorm
from timm.models import VisionTransformer, VisionTransformerDistilled, generate_default_cfgs
from timm.models.vision_transformer import Block
from timm.models.vision_transformer import checkpoint_filter_fn as vit_checkpoint_filter_fn
from torch import nn

from timm_mrla.layers import Memory
from timm_mrla.models._builder import build_mrla, model_cfg, register_model
from timm_mrla.models._transformer import LayerAttentionTransformer, base_tokens, light_tokens
from timm_mrla.models._weights import convert_state_dict, warm_start_cfgs

__all__ = ['MrlaVisionTransformer', 'MrlaVisionTransformerDistilled']


class MrlaBlock(Block):
    """timm's block followed by layer attention: `x, memory = block(x, feat_size, memory)`."""

    def __init__(
        self,
        dim: int,
        *args,
        mrla_layer: type[nn.Module],
        norm_layer: type[nn.Module] = LayerNorm,
        device=None,
        dtype=None,
        **kwargs,
    ) -> None:
        """
        Args:
            dim: Width of a token.
            mrla_layer: Layer attention on tokens, called with the width and the norm of the tokens it reads.
            norm_layer: Norm of the tokens that attention, MLP and layer attention read.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__(dim, *args, norm_layer=norm_layer, **kwargs, **dd)
        self.mrla = mrla_layer(dim, norm_layer, **dd)

    def forward(
        self,
        x: torch.Tensor,
        feat_size: tuple[int, int],
        memory: Memory,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, Memory]:
        o = x
        x = super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        return self.mrla(x, o, feat_size, memory)


class _Mrla(LayerAttentionTransformer):
    """timm's vision transformer with a layer attention in each block."""

    def __init__(self, *args, mrla_layer: type[nn.Module], mrla_stage_depth: int | None = None, **kwargs) -> None:
        """
        Args:
            *args: As in timm's model.
            mrla_layer: Layer attention on tokens, called with the width and the norm of the tokens it reads.
            mrla_stage_depth: Blocks after which layer attention starts with an empty memory. None for all blocks.
            **kwargs: As in timm's model.
        """
        if mrla_stage_depth is not None and mrla_stage_depth < 1:
            raise ValueError(f'mrla_stage_depth {mrla_stage_depth} is less than 1')
        super().__init__(*args, block_fn=partial(MrlaBlock, mrla_layer=mrla_layer), **kwargs)
        self.mrla_stage_depth = mrla_stage_depth or len(self.blocks)


class MrlaVisionTransformer(_Mrla, VisionTransformer):
    """timm's vision transformer with layer attention."""


class MrlaVisionTransformerDistilled(_Mrla, VisionTransformerDistilled):
    """timm's distilled vision transformer with layer attention."""


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Convert a checkpoint of the authors' code; resample patch and position embeddings as timm does."""
    state_dict = vit_checkpoint_filter_fn(convert_state_dict(state_dict), model)
    if isinstance(model.norm, nn.Identity):  # a model that pools its patches has its last norm after that
        state_dict = {re.sub(r'^norm\.', 'fc_norm.', name): tensor for name, tensor in state_dict.items()}
    return state_dict


def _create_deit(variant: str, pretrained: bool = False, distilled: bool = False, **kwargs) -> nn.Module:
    return build_mrla(
        MrlaVisionTransformerDistilled if distilled else MrlaVisionTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=kwargs.pop('out_indices', 3), feature_cls='getter'),
        **kwargs,
    )


_cfg = partial(model_cfg, crop_pct=0.9, fixed_input_size=True, first_conv='patch_embed.proj', classifier='head')

_sizes = ('tiny', 'small', 'base')
default_cfgs = generate_default_cfgs(
    {
        **warm_start_cfgs({f'deit_{size}_mrla': f'deit_{size}_patch16_224' for size in _sizes}, ['fb_in1k']),
        **{f'deit_{size}_mrla.*': _cfg() for size in _sizes},
        **warm_start_cfgs({f'deit_{size}_mrlab': f'deit_{size}_patch16_224' for size in _sizes}, ['fb_in1k']),
        **{f'deit_{size}_mrlab.*': _cfg() for size in _sizes},
        **warm_start_cfgs(
            {f'deit_{size}_distilled_mrla': f'deit_{size}_distilled_patch16_224' for size in _sizes}, ['fb_in1k']
        ),
        **{f'deit_{size}_distilled_mrla.*': _cfg(classifier=('head', 'head_dist')) for size in _sizes},
    }
)


@register_model
def deit_tiny_mrla(pretrained: bool = False, **kwargs) -> MrlaVisionTransformer:
    """DeiT-tiny with MRLA-light."""
    model_args = dict(patch_size=16, embed_dim=192, depth=12, num_heads=3, mrla_layer=light_tokens)
    return _create_deit('deit_tiny_mrla', pretrained, **dict(model_args, **kwargs))


@register_model
def deit_small_mrla(pretrained: bool = False, **kwargs) -> MrlaVisionTransformer:
    """DeiT-small with MRLA-light."""
    model_args = dict(patch_size=16, embed_dim=384, depth=12, num_heads=6, mrla_layer=light_tokens)
    return _create_deit('deit_small_mrla', pretrained, **dict(model_args, **kwargs))


@register_model
def deit_base_mrla(pretrained: bool = False, **kwargs) -> MrlaVisionTransformer:
    """DeiT-base with MRLA-light."""
    model_args = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12, mrla_layer=light_tokens)
    return _create_deit('deit_base_mrla', pretrained, **dict(model_args, **kwargs))


@register_model
def deit_tiny_mrlab(pretrained: bool = False, **kwargs) -> MrlaVisionTransformer:
    """DeiT-tiny with MRLA-base."""
    model_args = dict(patch_size=16, embed_dim=192, depth=12, num_heads=3, mrla_layer=base_tokens, mrla_stage_depth=4)
    return _create_deit('deit_tiny_mrlab', pretrained, **dict(model_args, **kwargs))


@register_model
def deit_small_mrlab(pretrained: bool = False, **kwargs) -> MrlaVisionTransformer:
    """DeiT-small with MRLA-base."""
    model_args = dict(patch_size=16, embed_dim=384, depth=12, num_heads=6, mrla_layer=base_tokens, mrla_stage_depth=4)
    return _create_deit('deit_small_mrlab', pretrained, **dict(model_args, **kwargs))


@register_model
def deit_base_mrlab(pretrained: bool = False, **kwargs) -> MrlaVisionTransformer:
    """DeiT-base with MRLA-base."""
    model_args = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12, mrla_layer=base_tokens, mrla_stage_depth=4)
    return _create_deit('deit_base_mrlab', pretrained, **dict(model_args, **kwargs))


@register_model
def deit_tiny_distilled_mrla(pretrained: bool = False, **kwargs) -> MrlaVisionTransformerDistilled:
    """Distilled DeiT-tiny with MRLA-light."""
    model_args = dict(patch_size=16, embed_dim=192, depth=12, num_heads=3, mrla_layer=light_tokens)
    return _create_deit('deit_tiny_distilled_mrla', pretrained, distilled=True, **dict(model_args, **kwargs))


@register_model
def deit_small_distilled_mrla(pretrained: bool = False, **kwargs) -> MrlaVisionTransformerDistilled:
    """Distilled DeiT-small with MRLA-light."""
    model_args = dict(patch_size=16, embed_dim=384, depth=12, num_heads=6, mrla_layer=light_tokens)
    return _create_deit('deit_small_distilled_mrla', pretrained, distilled=True, **dict(model_args, **kwargs))


@register_model
def deit_base_distilled_mrla(pretrained: bool = False, **kwargs) -> MrlaVisionTransformerDistilled:
    """Distilled DeiT-base with MRLA-light."""
    model_args = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12, mrla_layer=light_tokens)
    return _create_deit('deit_base_distilled_mrla', pretrained, distilled=True, **dict(model_args, **kwargs))
