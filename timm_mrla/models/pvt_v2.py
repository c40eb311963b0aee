"""PVTv2 with multi-head recurrent layer attention (MRLA)

Papers:
* `Cross-Layer Retrospective Retrieving via Layer Attention` - https://arxiv.org/abs/2302.03985
* `PVT v2: Improved Baselines with Pyramid Vision Transformer` - https://arxiv.org/abs/2106.13797

The paper's authors released no PVTv2: this is layer attention as in their DeiT, with a memory for each stage.
"""

from collections.abc import Callable
from functools import partial

import torch
from timm.layers import get_device_dtype
from timm.models import PyramidVisionTransformerV2, generate_default_cfgs, pvt_v2
from timm.models.pvt_v2 import Block, PyramidVisionTransformerStage
from timm.models.pvt_v2 import checkpoint_filter_fn as pvt_checkpoint_filter_fn
from torch import nn

from timm_mrla.layers import Memory
from timm_mrla.models._block import run_block
from timm_mrla.models._builder import build_mrla, model_cfg, register_model
from timm_mrla.models._graft import graft, like
from timm_mrla.models._transformer import base_tokens, light_tokens
from timm_mrla.models._weights import convert_state_dict, warm_start_cfgs

__all__ = ['MrlaPvtBlock', 'MrlaPvtStage']


class MrlaPvtBlock(Block):
    """timm's block followed by layer attention: `x, memory = block(x, feat_size, memory)`."""

    def forward(self, x: torch.Tensor, feat_size: tuple[int, int], memory: Memory) -> tuple[torch.Tensor, Memory]:
        return self.mrla(super().forward(x, feat_size), x, feat_size, memory)


class MrlaPvtStage(PyramidVisionTransformerStage):
    """timm's stage, the memory of layer attention handed from one block to the next."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.downsample is not None:
            x = self.downsample(x)
        B, H, W, C = x.shape
        x = x.reshape(B, -1, C)
        memory = []
        for block in self.blocks:
            x, memory = run_block(block, x, (H, W), memory, grad_checkpointing=self.grad_checkpointing)
        return self.norm(x).reshape(B, H, W, C).permute(0, 3, 1, 2).contiguous()


def _mrla_pvt(stock: Callable[..., nn.Module], mrla_layer: Callable[..., nn.Module], **kwargs) -> nn.Module:
    """timm's PVTv2 with layer attention in each block."""
    model = stock(**kwargs)
    for stage in model.stages:
        for block in stage.blocks:
            mrla = mrla_layer(block.norm1.normalized_shape[0], like(block.norm1), **get_device_dtype(block))
            graft(block, MrlaPvtBlock, mrla=mrla)
        graft(stage, MrlaPvtStage)
    return model


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Convert a checkpoint of PVTv2's authors to timm's names, as timm does."""
    return pvt_checkpoint_filter_fn(convert_state_dict(state_dict), model)


def _create_pvt(
    variant: str,
    stock: Callable[..., nn.Module],
    mrla_layer: Callable[..., nn.Module],
    pretrained: bool = False,
    **kwargs,
) -> PyramidVisionTransformerV2:
    return build_mrla(
        partial(_mrla_pvt, stock, mrla_layer),
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(flatten_sequential=True, out_indices=kwargs.pop('out_indices', (0, 1, 2, 3))),
        **kwargs,
    )


_cfg = partial(model_cfg, pool_size=(7, 7), crop_pct=0.9, first_conv='patch_embed.proj', classifier='head')

default_cfgs = generate_default_cfgs({
    **warm_start_cfgs({f'pvt_v2_b{i}_mrla': f'pvt_v2_b{i}' for i in range(6)}, ['in1k']),
    **{f'pvt_v2_b{i}_mrla.*': _cfg() for i in range(6)},
    **warm_start_cfgs({f'pvt_v2_b{i}_mrlab': f'pvt_v2_b{i}' for i in range(2)}, ['in1k']),
    **{f'pvt_v2_b{i}_mrlab.*': _cfg() for i in range(2)},
})  # fmt: skip


@register_model
def pvt_v2_b0_mrla(pretrained: bool = False, **kwargs) -> PyramidVisionTransformerV2:
    """PVTv2-B0 with MRLA-light."""
    return _create_pvt('pvt_v2_b0_mrla', pvt_v2.pvt_v2_b0, light_tokens, pretrained, **kwargs)


@register_model
def pvt_v2_b1_mrla(pretrained: bool = False, **kwargs) -> PyramidVisionTransformerV2:
    """PVTv2-B1 with MRLA-light."""
    return _create_pvt('pvt_v2_b1_mrla', pvt_v2.pvt_v2_b1, light_tokens, pretrained, **kwargs)


@register_model
def pvt_v2_b2_mrla(pretrained: bool = False, **kwargs) -> PyramidVisionTransformerV2:
    """PVTv2-B2 with MRLA-light."""
    return _create_pvt('pvt_v2_b2_mrla', pvt_v2.pvt_v2_b2, light_tokens, pretrained, **kwargs)


@register_model
def pvt_v2_b3_mrla(pretrained: bool = False, **kwargs) -> PyramidVisionTransformerV2:
    """PVTv2-B3 with MRLA-light."""
    return _create_pvt('pvt_v2_b3_mrla', pvt_v2.pvt_v2_b3, light_tokens, pretrained, **kwargs)


@register_model
def pvt_v2_b4_mrla(pretrained: bool = False, **kwargs) -> PyramidVisionTransformerV2:
    """PVTv2-B4 with MRLA-light."""
    return _create_pvt('pvt_v2_b4_mrla', pvt_v2.pvt_v2_b4, light_tokens, pretrained, **kwargs)


@register_model
def pvt_v2_b5_mrla(pretrained: bool = False, **kwargs) -> PyramidVisionTransformerV2:
    """PVTv2-B5 with MRLA-light."""
    return _create_pvt('pvt_v2_b5_mrla', pvt_v2.pvt_v2_b5, light_tokens, pretrained, **kwargs)


@register_model
def pvt_v2_b0_mrlab(pretrained: bool = False, **kwargs) -> PyramidVisionTransformerV2:
    """PVTv2-B0 with MRLA-base."""
    return _create_pvt('pvt_v2_b0_mrlab', pvt_v2.pvt_v2_b0, base_tokens, pretrained, **kwargs)


@register_model
def pvt_v2_b1_mrlab(pretrained: bool = False, **kwargs) -> PyramidVisionTransformerV2:
    """PVTv2-B1 with MRLA-base."""
    return _create_pvt('pvt_v2_b1_mrlab', pvt_v2.pvt_v2_b1, base_tokens, pretrained, **kwargs)
