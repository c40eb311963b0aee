"""ResNet with multi-head recurrent layer attention (MRLA)

Papers:
* `Cross-Layer Retrospective Retrieving via Layer Attention` - https://arxiv.org/abs/2302.03985
* `Deep Residual Learning for Image Recognition` - https://arxiv.org/abs/1512.03385
"""

import re
from functools import partial
from typing import Any

import torch
from timm.models import BasicBlock, Bottleneck, ResNet, generate_default_cfgs
from torch import nn

from timm_mrla.layers import Memory, MrlaBase, MrlaLight
from timm_mrla.models._block import run_block
from timm_mrla.models._builder import build_mrla, model_cfg, register_model
from timm_mrla.models._weights import convert_state_dict, warm_start_cfgs

__all__ = ['MrlaResNet']


class _MrlaBlock:
    """A residual block followed by layer attention: `x, memory = block(x, memory)`.

    timm's blocks keep their shortcut to themselves, and layer attention reads it: hence the forward passes below.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        *args,
        mrla_layer: type[nn.Module],
        mrla_drop_path: float | None = None,
        norm_layer: type[nn.Module] = nn.BatchNorm2d,
        drop_path: nn.Module | None = None,
        device=None,
        dtype=None,
        **kwargs,
    ) -> None:
        """
        Args:
            inplanes: Input channels.
            planes: Output channels over the block's expansion.
            mrla_layer: Layer attention, called with the output channels.
            mrla_drop_path: Stochastic depth rate of layer attention, that of drop_path if None.
            norm_layer: Norm of the residual and of what layer attention retrieves.
            drop_path: Stochastic depth of the residual.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__(inplanes, planes, *args, norm_layer=norm_layer, drop_path=drop_path, **kwargs, **dd)
        if mrla_drop_path is None:
            mrla_drop_path = drop_path.drop_prob if drop_path is not None else 0.0
        self.mrla = mrla_layer(planes * self.expansion, norm_layer=norm_layer, drop_path=mrla_drop_path, **dd)

    def merge(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        act: nn.Module,
        memory: Memory,
    ) -> tuple[torch.Tensor, Memory]:
        """The end of timm's block, from its last norm on, and layer attention."""
        if self.se is not None:
            residual = self.se(residual)
        if self.drop_path is not None:
            residual = self.drop_path(residual)
        o = x if self.downsample is None else self.downsample(x)
        residual += o
        return self.mrla(act(residual), o, memory)


class MrlaBasicBlock(_MrlaBlock, BasicBlock):
    """Basic block with layer attention."""

    def forward(self, x: torch.Tensor, memory: Memory) -> tuple[torch.Tensor, Memory]:
        residual = self.aa(self.act1(self.drop_block(self.bn1(self.conv1(x)))))
        residual = self.bn2(self.conv2(residual))
        return self.merge(x, residual, self.act2, memory)


class MrlaBottleneck(_MrlaBlock, Bottleneck):
    """Bottleneck block with layer attention."""

    def forward(self, x: torch.Tensor, memory: Memory) -> tuple[torch.Tensor, Memory]:
        residual = self.act1(self.bn1(self.conv1(x)))
        residual = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(residual)))))
        residual = self.bn3(self.conv3(residual))
        return self.merge(x, residual, self.act3, memory)


class MrlaStage(nn.Sequential):
    """The blocks of a stage, the memory of layer attention handed from one to the next."""

    grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        memory = []
        for block in self:
            x, memory = run_block(block, x, memory, grad_checkpointing=self.grad_checkpointing)
        return x


class MrlaResNet(ResNet):
    """timm's ResNet, with a layer attention in each block and a memory in each stage."""

    def __init__(
        self,
        *args,
        mrla_layer: type[nn.Module],
        mrla_drop_path: float | None = None,
        block_args: dict[str, Any] | None = None,
        **kwargs,
    ) -> None:
        """
        Args:
            *args: As in timm's ResNet, block being MrlaBasicBlock or MrlaBottleneck.
            mrla_layer: Layer attention, called with a block's output channels.
            mrla_drop_path: Constant stochastic depth rate of layer attention, 0.2 in the paper. None for the rate of
                the block's residual, as drop_path_rate gives it.
            block_args: Extra arguments of the blocks.
            **kwargs: As in timm's ResNet.
        """
        if mrla_drop_path is not None and not 0.0 <= mrla_drop_path < 1.0:
            raise ValueError(f'mrla_drop_path {mrla_drop_path} is not in [0, 1)')
        block_args = dict(block_args or {}, mrla_layer=mrla_layer, mrla_drop_path=mrla_drop_path)
        super().__init__(*args, block_args=block_args, **kwargs)
        for name, stage in self.named_children():
            if name.startswith('layer'):
                setattr(self, name, MrlaStage(*stage))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Checkpoint each block; timm's own checkpointing would chain blocks without their memory."""
        for module in self.children():
            if isinstance(module, MrlaStage):
                module.grad_checkpointing = enable


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Convert a checkpoint of the authors' code, whose MRLA-base calls the stages `stages.0` to `stages.3`."""
    return {
        re.sub(r'^stages\.(\d)\.', lambda m: f'layer{int(m[1]) + 1}.', name): tensor
        for name, tensor in convert_state_dict(state_dict).items()
    }


def _create_resnet(variant: str, pretrained: bool = False, **kwargs) -> MrlaResNet:
    return build_mrla(MrlaResNet, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


_cfg = partial(
    model_cfg, pool_size=(7, 7), crop_pct=0.875, interpolation='bilinear', first_conv='conv1', classifier='fc'
)

_depths = (18, 34, 50, 101, 152)
default_cfgs = generate_default_cfgs(
    {
        # not for MRLA-base, whose ReLU after the norm passes no gradient where the norm is at zero
        **warm_start_cfgs(
            {f'resnet{depth}_mrla': f'resnet{depth}' for depth in _depths},
            tags=('a1_in1k', 'a3_in1k', 'tv_in1k', 'tv2_in1k'),
        ),
        **{f'resnet{depth}_mrla.*': _cfg() for depth in _depths},
        **{f'resnet{depth}_mrlab': _cfg(first_conv='conv1.0') for depth in _depths},
    }
)

_light = {'mrla_layer': partial(MrlaLight, dim_head=32)}
_base = {
    'mrla_layer': partial(MrlaBase, dim_head=16, act_layer=partial(nn.ReLU, inplace=True)),
    'stem_type': 'deep',
    'stem_width': 32,
}


@register_model
def resnet18_mrla(pretrained: bool = False, **kwargs) -> MrlaResNet:
    """ResNet-18 with MRLA-light."""
    model_args = dict(block=MrlaBasicBlock, layers=(2, 2, 2, 2), **_light)
    return _create_resnet('resnet18_mrla', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet34_mrla(pretrained: bool = False, **kwargs) -> MrlaResNet:
    """ResNet-34 with MRLA-light."""
    model_args = dict(block=MrlaBasicBlock, layers=(3, 4, 6, 3), **_light)
    return _create_resnet('resnet34_mrla', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet50_mrla(pretrained: bool = False, **kwargs) -> MrlaResNet:
    """ResNet-50 with MRLA-light."""
    model_args = dict(block=MrlaBottleneck, layers=(3, 4, 6, 3), **_light)
    return _create_resnet('resnet50_mrla', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet101_mrla(pretrained: bool = False, **kwargs) -> MrlaResNet:
    """ResNet-101 with MRLA-light."""
    model_args = dict(block=MrlaBottleneck, layers=(3, 4, 23, 3), **_light)
    return _create_resnet('resnet101_mrla', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet152_mrla(pretrained: bool = False, **kwargs) -> MrlaResNet:
    """ResNet-152 with MRLA-light."""
    model_args = dict(block=MrlaBottleneck, layers=(3, 8, 36, 3), **_light)
    return _create_resnet('resnet152_mrla', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet18_mrlab(pretrained: bool = False, **kwargs) -> MrlaResNet:
    """ResNet-18 with MRLA-base."""
    model_args = dict(block=MrlaBasicBlock, layers=(2, 2, 2, 2), **_base)
    return _create_resnet('resnet18_mrlab', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet34_mrlab(pretrained: bool = False, **kwargs) -> MrlaResNet:
    """ResNet-34 with MRLA-base."""
    model_args = dict(block=MrlaBasicBlock, layers=(3, 4, 6, 3), **_base)
    return _create_resnet('resnet34_mrlab', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet50_mrlab(pretrained: bool = False, **kwargs) -> MrlaResNet:
    """ResNet-50 with MRLA-base."""
    model_args = dict(block=MrlaBottleneck, layers=(3, 4, 6, 3), **_base)
    return _create_resnet('resnet50_mrlab', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet101_mrlab(pretrained: bool = False, **kwargs) -> MrlaResNet:
    """ResNet-101 with MRLA-base."""
    model_args = dict(block=MrlaBottleneck, layers=(3, 4, 23, 3), **_base)
    return _create_resnet('resnet101_mrlab', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet152_mrlab(pretrained: bool = False, **kwargs) -> MrlaResNet:
    """ResNet-152 with MRLA-base."""
    model_args = dict(block=MrlaBottleneck, layers=(3, 8, 36, 3), **_base)
    return _create_resnet('resnet152_mrlab', pretrained, **dict(model_args, **kwargs))
