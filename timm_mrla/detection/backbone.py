"""Makes a backbone for detectors from a model of timm's: a feature pyramid on its maps, and its frozen layers."""

from functools import partial
from typing import Any

import timm
import torch
from timm.models import model_entrypoint
from timm.utils.model import freeze_batch_norm_2d, unfreeze_batch_norm_2d
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from timm_mrla.checks import check_model_name
from timm_mrla.layers import layer_attentions

Detector = FasterRCNN | RetinaNet

_STRIDES = (4, 8, 16, 32)
_WIDTH = 256  # channels of the pyramid, as in torchvision
# class, strides of the backbone's maps and further levels of the pyramid, as in torchvision
DETECTORS = {
    'faster_rcnn': (FasterRCNN, _STRIDES, LastLevelMaxPool),
    'mask_rcnn': (MaskRCNN, _STRIDES, LastLevelMaxPool),
    'retina_net': (RetinaNet, _STRIDES[1:], partial(LastLevelP6P7, _WIDTH, _WIDTH)),
}
# module of timm's -> arguments that let its models take images of any size
_ANY_SIZE = {'swin_transformer': {'strict_img_size': False}, 'swin_transformer_v2': {'strict_img_size': False}}


class PyramidBackbone(nn.Module):
    """A model of timm's and a feature pyramid network: images [B, 3, H, W] -> maps by name."""

    def __init__(self, body: nn.Module, strides: tuple[int, ...], extra_blocks: nn.Module) -> None:
        super().__init__()
        levels = [i for i, info in enumerate(body.feature_info) if info['reduction'] in strides]
        channels = [body.feature_info[i]['num_chs'] for i in levels]
        self.indices = body.prune_intermediate_layers(levels, prune_norm=True, prune_head=True)
        self.body, self.out_channels = body, _WIDTH
        self.fpn = FeaturePyramidNetwork(channels, _WIDTH, extra_blocks)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = self.body.forward_intermediates(x, indices=self.indices, intermediates_only=True)
        # torchvision's RoI pooler needs these names, and silently ignores maps with other names
        return self.fpn({str(i): y for i, y in enumerate(maps)})


def any_size(backbone: str) -> dict[str, Any]:
    """Arguments of `timm.create_model` that let a backbone take images of any size."""
    return _ANY_SIZE.get(model_entrypoint(backbone).__module__.rpartition('.')[2], {})


def _stages(body: nn.Module) -> list[list[int]]:
    """For each map that detectors use, the indices of the parameters in the module that makes it."""
    names = [name for name, _ in body.named_parameters()]
    modules = [f'{info["module"]}.' for info in body.feature_info if info['reduction'] in _STRIDES]
    return [[i for i, name in enumerate(names) if name.startswith(module)] for module in modules]


def check_backbone(name: str) -> None:
    """Raise ValueError if a model of timm's lacks maps of all four strides, or takes images of one size only."""
    check_model_name(name)
    backbone, _, tag = name.partition('.')
    if tag:
        raise ValueError(f'{name!r} says which weights too: name {backbone!r}, and {tag!r} as weights_backbone')
    with torch.device('meta'):
        body = timm.create_model(name, **any_size(name)).eval()
        strides = {info['reduction'] for info in getattr(body, 'feature_info', ())}
        if not strides.issuperset(_STRIDES):
            found = ', '.join(map(str, sorted(strides))) or 'none'
            raise ValueError(f'detectors need maps of strides 4, 8, 16 and 32; {name} has: {found}')
        if not all(_stages(body)):
            raise ValueError(f'{name} does not say which of its modules make its maps, so that none could be frozen')
        try:
            body.forward_intermediates(torch.empty(1, 3, 352, 416), intermediates_only=True)
        except (AssertionError, RuntimeError) as e:
            side = body.pretrained_cfg['input_size'][-1]
            raise ValueError(f'detectors need a backbone for images of any size; {name} takes {side} x {side}') from e


def freeze_norms(body: nn.Module) -> None:
    """Freeze the batch norms of a pretrained backbone, except in layer attention that is untrained.

    After a warm start these norms have zero weights: frozen, layer attention would never add anything.
    """
    untrained = [
        layer for layer in layer_attentions(body).values() if not any(scale.any() for scale in layer.output_scales())
    ]
    freeze_batch_norm_2d(body)
    for layer in untrained:
        unfreeze_batch_norm_2d(layer)


def freeze_first_layers(backbone: PyramidBackbone, trainable_layers: int) -> None:
    """Freeze all but the last layers of a backbone. It has five: the stem, and four stages that end with a map."""
    parameters, stages = [*backbone.body.parameters()], _stages(backbone.body)
    ends = [0, stages[0][0], *(stage[-1] + 1 for stage in stages[:-1]), len(parameters)]
    for parameter in parameters[: ends[5 - trainable_layers]]:
        parameter.requires_grad_(False)
