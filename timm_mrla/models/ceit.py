"""CeiT with MRLA-light, as in the paper, on timm's vision transformer, because timm has no CeiT.

Paper: `Incorporating Convolution Designs into Visual Transformers` - https://arxiv.org/abs/2103.11816
"""

from collections import OrderedDict
from functools import partial

import torch
from timm.layers import LayerNorm, PatchEmbed, resample_abs_pos_embed, to_2tuple, trunc_normal_
from timm.models import PretrainedCfg, VisionTransformer, build_model_with_cfg
from timm.models._input import get_pretrained_grid_size  # not exported
from timm.models.vision_transformer import Block
from timm.models.vision_transformer import checkpoint_filter_fn as vit_checkpoint_filter_fn
from torch import nn

from timm_mrla.layers import Grid, MrlaLight, from_map, recompute, to_map
from timm_mrla.models._loops import FunctionList, GridHost, SelfWithOverrides
from timm_mrla.models._registry import register_entrypoint


class ImageToTokens(PatchEmbed):
    """The stem of CeiT, of stem_width channels: a 7x7 convolution and a max-pool of stride 2, then the patches."""

    def __init__(self, *args, stem_width: int = 64, device=None, dtype=None, **kwargs) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(*args, **kwargs, **dd)
        stride, remainder = divmod(self.patch_size[0], 4)
        if remainder:
            raise ValueError(f'patch_size {self.patch_size[0]} is not a multiple of 4, the stride of the stem')
        conv, width = self.proj, stem_width
        layers = OrderedDict(
            conv=nn.Conv2d(conv.in_channels, width, 7, stride=2, padding=3, bias=False, **dd),
            bn=nn.BatchNorm2d(width, **dd),
            pool=nn.MaxPool2d(3, stride=2, padding=1),
            proj=nn.Conv2d(width, conv.out_channels, stride, stride=stride, bias=conv.bias is not None, **dd),
        )
        self.proj = nn.Sequential(layers)

    def set_input_size(self, img_size: tuple[int, int] | None = None, patch_size: int | None = None) -> None:
        """Change the image size. The patch size stays, because timm cannot resample this stem."""
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise ValueError(f'patch_size {patch_size}: CeiT cannot change its {self.patch_size}, build another model')
        super().set_input_size(img_size=img_size)


class LeFF(nn.Module):
    """Locally-enhanced feed-forward: an MLP on patches with a depthwise convolution and batch norms."""

    def __init__(
        self, in_features, hidden_features, act_layer, norm_layer=None, bias=True, drop=0.0, device=None, dtype=None
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if norm_layer is not None:
            raise ValueError(f'norm_layer {norm_layer}: LeFF has BatchNorms')
        self.conv1 = nn.Conv2d(in_features, hidden_features, 1, bias=bias, **dd)
        self.bn1 = nn.BatchNorm2d(hidden_features, **dd)
        self.conv2 = nn.Conv2d(hidden_features, hidden_features, 3, padding=1, groups=hidden_features, bias=bias, **dd)
        self.bn2 = nn.BatchNorm2d(hidden_features, **dd)
        self.conv3 = nn.Conv2d(hidden_features, in_features, 1, bias=bias, **dd)
        self.bn3 = nn.BatchNorm2d(in_features, **dd)
        self.act = act_layer()
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor, feat_size: tuple[int, int]) -> torch.Tensor:
        """Tokens [B, P + H * W, C], grid (H, W) -> tokens [B, P + H * W, C]."""
        x, prefix = to_map(x, 'NLC', feat_size)
        x = self.act(self.bn1(self.conv1(x)))
        x = self.act(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        return self.drop(from_map(x, 'NLC', prefix))


class CeitBlock(Block):
    """timm's block with LeFF as MLP, MRLA-light, and a norm before the first shortcut."""

    def __init__(self, dim: int, *args, norm_layer=LayerNorm, drop_path=0.0, device=None, dtype=None, **kwargs) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(dim, *args, norm_layer=norm_layer, drop_path=drop_path, **kwargs, **dd)
        self.mrla = MrlaLight(dim, 32, norm_layer, 'pre', 'NLC', drop_path, **dd)
        self.mrla.norm_o, self.mrla.norm_v = nn.Identity(), nn.BatchNorm2d(dim, **dd)  # as in the paper's CeiT

    def forward(self, x: torch.Tensor, feat_size: Grid = None, **kwargs) -> torch.Tensor:
        x = o = self.norm1(x)
        x = x + self.drop_path1(self.ls1(self.attn(x, **kwargs)))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x), feat_size)))
        return self.mrla(x, o, feat_size)


class LayerwiseClassAttention(Block):
    """Attention of the last layer's class token to those of all layers: [B, layers, C] -> [B, 1, C]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        last = x[:, -1:] + self.drop_path1(self.ls1(self.attn(self.norm1(x))[:, -1:]))
        return last + self.drop_path2(self.ls2(self.mlp(self.norm2(last))))


def _check_pool(global_pool: str | None) -> None:
    if global_pool not in (None, '', 'token'):
        raise ValueError(f"global_pool {global_pool!r}: CeiT reads the class token of its layers, use 'token' or ''")


class Ceit(GridHost, VisionTransformer):
    """timm's vision transformer with the stem and the blocks above."""

    def __init__(self, *args, num_heads: int = 3, global_pool: str = 'token', weight_init: str = '', **kwargs) -> None:
        dd = {name: kwargs.get(name) for name in ('device', 'dtype')}
        _check_pool(global_pool)
        layers = dict(embed_layer=ImageToTokens, block_fn=CeitBlock, mlp_layer=LeFF, weight_init='skip')
        super().__init__(*args, num_heads=num_heads, global_pool=global_pool, **layers, **kwargs)
        if self.cls_token is None:
            raise ValueError('class_token False: the layer-wise attention of CeiT reads it, use True')
        if reason := self.unsupported(self):
            raise ValueError(reason)
        self.pos_layer_embed = nn.Parameter(torch.empty(1, len(self.blocks), self.embed_dim, **dd))
        self.lca = LayerwiseClassAttention(self.embed_dim, num_heads, qkv_bias=True, **dd)
        self.set_own_tokens()
        self.weight_init_mode = 'reset' if weight_init == 'skip' else weight_init
        if weight_init != 'skip':
            self.init_weights(needs_reset=False)

    def init_weights(self, mode: str = '', needs_reset: bool = True) -> None:
        """Initialize as timm does, and the position embedding of the layers."""
        trunc_normal_(self.pos_layer_embed, std=0.02)
        super().init_weights(mode, needs_reset)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay."""
        return super().no_weight_decay() | {'pos_layer_embed'}

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Reset the head, and the pooling if given: 'token' or ''."""
        _check_pool(global_pool)
        super().reset_classifier(num_classes, global_pool)

    def prune_intermediate_layers(self, indices=1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Remove layers as timm does; without a head, the attention over layers is removed too."""
        taken = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head:
            self.lca = self.pos_layer_embed = None
        return taken

    def stand_in(self, feat_size: tuple[int, int]) -> SelfWithOverrides:
        """The `self` of timm's methods for one forward pass on a grid (H, W).

        The final norm replaces the class token by the result of the attention over the class tokens of all layers.
        """
        tokens = []

        def keep(block: nn.Module, x: torch.Tensor, **kwargs) -> torch.Tensor:
            run = partial(recompute, block, block) if self.grad_checkpointing else block
            x = run(x, feat_size=feat_size, **kwargs)
            tokens.append(x[:, :1].clone())  # a view would keep all of x alive
            return x

        def norm(x: torch.Tensor) -> torch.Tensor:
            if self.lca is None:
                return self.norm(x)
            last = self.lca(torch.cat(tokens, dim=1) + self.pos_layer_embed[:, : len(tokens)])
            return torch.cat([self.norm(last), self.norm(x)[:, 1:]], dim=1)

        blocks = FunctionList([partial(keep, block) for block in self.blocks])
        return SelfWithOverrides(self, blocks=blocks, norm=norm, grad_checkpointing=False)


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Resample position embeddings as timm does."""
    if (embed := state_dict.get('pos_embed')) is not None:  # timm infers the grid of a checkpoint from a patch kernel
        stem = model.patch_embed
        grid = get_pretrained_grid_size(model, torch.empty(1, 1, *stem.patch_size, device='meta'), embed.shape[1] - 1)
        state_dict['pos_embed'] = resample_abs_pos_embed(embed, stem.grid_size, grid)
    return vit_checkpoint_filter_fn(state_dict, model)


def _ceit(pretrained: bool = False, **kwargs) -> Ceit:
    """CeiT with MrlaLight."""
    feature_cfg = dict(out_indices=kwargs.pop('out_indices', 3), feature_cls='getter')
    return build_model_with_cfg(
        Ceit, 'ceit', pretrained, pretrained_filter_fn=checkpoint_filter_fn, feature_cfg=feature_cfg, **kwargs
    )


_cfg = PretrainedCfg(crop_pct=0.9, fixed_input_size=True, first_conv='patch_embed.proj.conv', classifier='head')

for size, width in (('tiny', 192), ('small', 384), ('base', 768)):
    args = dict(embed_dim=width, num_heads=width // 64)
    register_entrypoint(__name__, f'ceit_{size}_mrla', _ceit, None, {'': _cfg}, **args)
