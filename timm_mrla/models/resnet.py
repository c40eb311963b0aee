"""ResNet and related models with MRLA-light and MRLA-base, as in the paper."""

from functools import partial

import torch
from timm.models import BasicBlock, Bottleneck, ResNet, get_pretrained_cfg, model_entrypoint
from torch import nn

from timm_mrla.models._graft import BaseBlock, Host, LightBlock, Recipe
from timm_mrla.models._loops import SelfWithOverrides, with_memory
from timm_mrla.models._registry import register_entrypoint
from timm_mrla.models._weights import without_weights


class _ShortcutBlock(LightBlock):
    """A block with MRLA-light, which reads the shortcut after its downsample, if there is one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.downsample is None:
            return super().forward(x)
        o = self.downsample(x)  # only once, because its batch norm updates running statistics
        return self.mrla(self.stock.forward(SelfWithOverrides(self, downsample=lambda x: o), x), o)


class MrlaBaseStage(nn.Sequential):
    """The blocks of a stage with MRLA-base."""

    grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return with_memory(self, self.grad_checkpointing)(x)


class MrlaBaseResNet(Host, ResNet):
    """timm's ResNet with MRLA-base."""

    @classmethod
    def convert(cls, module: nn.Module) -> None:
        """Change the classes of a ResNet and of its stages."""
        super().convert(module)
        for name, stage in module.named_children():
            if name.startswith('layer'):
                stage.__class__ = MrlaBaseStage

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Checkpoint each block; timm's own checkpointing would not pass the memory on."""
        for module in self.children():
            if isinstance(module, MrlaBaseStage):
                module.grad_checkpointing = enable


_recipe = partial(Recipe, 'post', init_v=partial(nn.init.kaiming_normal_, mode='fan_out', nonlinearity='relu'))
_base = partial(_recipe, hosts=(MrlaBaseResNet,))

_ShortcutBlock.define(__name__, {BasicBlock: _recipe('bn2'), Bottleneck: _recipe('bn3')})
BaseBlock.define(__name__, {BasicBlock: _base('bn2'), Bottleneck: _base('bn3')})
for name in ('resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152'):
    # no warm starts, because the ReLU after the norm passes no gradient where the norm is at zero
    cfgs = {'': without_weights(get_pretrained_cfg(name), first_conv='conv1.0')}
    args = dict(stem_type='deep', stem_width=32)
    register_entrypoint(__name__, f'{name}_mrlab', model_entrypoint(name), BaseBlock, cfgs, **args)
