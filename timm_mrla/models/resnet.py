"""ResNet and its kin with multi-head recurrent layer attention (MRLA)

Papers:
* `Cross-Layer Retrospective Retrieving via Layer Attention` - https://arxiv.org/abs/2302.03985
* `Deep Residual Learning for Image Recognition` - https://arxiv.org/abs/1512.03385
"""

import re
from functools import partial

import torch
from timm.models import BasicBlock, Bottleneck, ResNet
from torch import nn

from timm_mrla.models._base import chain
from timm_mrla.models._graft import BaseBlock, Host, LightBlock, View
from timm_mrla.models._registry import register_base, register_light

_init_v = partial(nn.init.kaiming_normal_, mode='fan_out', nonlinearity='relu')


class _ShortcutBlock(LightBlock):
    """A block whose shortcut may go through a downsample: its output there is what layer attention reads."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        o = x if self.downsample is None else self.downsample(x)
        call = View(self, downsample=lambda x: o)
        return self.mrla(super(LightBlock, self).forward.__func__(call, x), o)


class MrlaBasicBlock(_ShortcutBlock, BasicBlock, form='post', norm='bn2', init_v=_init_v):
    """timm's basic block, followed by MRLA-light."""


class MrlaBottleneck(_ShortcutBlock, Bottleneck, form='post', norm='bn3', init_v=_init_v):
    """timm's bottleneck, followed by MRLA-light."""


class MrlaBaseStage(nn.Sequential):
    """The blocks of a stage with MRLA-base."""

    grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return chain(self, self.grad_checkpointing)(x)


class MrlaBaseResNet(Host, ResNet):
    """timm's ResNet with MRLA-base."""

    @classmethod
    def adopt(cls, module: nn.Module) -> None:
        """Make a ResNet one of this class, its stages too."""
        super().adopt(module)
        for name, stage in module.named_children():
            if name.startswith('layer'):
                stage.__class__ = MrlaBaseStage

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Checkpoint each block; timm's own checkpointing would chain blocks without their memory."""
        for module in self.children():
            if isinstance(module, MrlaBaseStage):
                module.grad_checkpointing = enable


class MrlaBaseBasicBlock(BaseBlock, BasicBlock, form='post', norm='bn2', init_v=_init_v, hosts=(MrlaBaseResNet,)):
    """timm's basic block, followed by MRLA-base."""


class MrlaBaseBottleneck(BaseBlock, Bottleneck, form='post', norm='bn3', init_v=_init_v, hosts=(MrlaBaseResNet,)):
    """timm's bottleneck, followed by MRLA-base."""


def _authors_stages(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """The authors' MRLA-base calls the stages `stages.0` to `stages.3`."""
    return {re.sub(r'^stages\.(\d)\.', lambda m: f'layer{int(m[1]) + 1}.', k): v for k, v in state_dict.items()}


default_cfgs = {}
register_light(__name__)
register_base(
    __name__,
    {f'resnet{depth}': f'resnet{depth}' for depth in (18, 34, 50, 101, 152)},
    warm=False,  # the ReLU after the norm passes no gradient where the norm is at zero
    filter_fn=_authors_stages,
    model_args={'stem_type': 'deep', 'stem_width': 32},
    first_conv='conv1.0',
)
