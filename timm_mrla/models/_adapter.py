"""Layer attention as an adapter: freezes the backbone."""

import functools
from typing import Any

from timm.models import PretrainedCfg
from torch import nn


class Adapter:
    """Base of models with a frozen backbone; a class of timm's follows.

    A norm stays in evaluation mode as long as none of its parameters requires gradients. The model decides this in
    `train`, and not a class of norms, because `convert_sync_batchnorm` replaces all batch norms.
    """

    plain: type[nn.Module]  # the model's class without this base
    backbone_weights: PretrainedCfg | None = None  # that the backbone started from, where they are timm's
    backbone_fingerprint = ''  # of these weights, if they were read

    def train(self, mode: bool = True) -> nn.Module:
        """Set the mode of the model; frozen norms keep their running statistics."""
        super().train(mode)
        for m in self.modules():
            if getattr(m, 'running_var', None) is not None and not any(p.requires_grad for p in m.parameters()):
                m.eval()
        return self

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, (self.plain,), *state  # pickle cannot find a class that was made at run time


@functools.cache
def _adapter_class(cls: type[nn.Module]) -> type[nn.Module]:
    return type(f'Adapter{cls.__name__}', (Adapter, cls), {'__module__': cls.__module__, 'plain': cls})


def _new(cls: type[nn.Module]) -> nn.Module:
    return nn.Module.__new__(_adapter_class(cls))


def classifier_names(model: nn.Module) -> set[str]:
    """The names of the classifier's parameters."""
    heads = model.get_classifier() if hasattr(model, 'get_classifier') else ()  # a feature extractor has none
    tensors = {p for head in (heads if isinstance(heads, tuple | list) else [heads]) for p in head.parameters()}
    return {name for name, p in model.named_parameters() if p in tensors}


def backbone_names(model: nn.Module) -> set[str]:
    """The names in the state dict without layer attention and classifier."""
    return {name for name in model.state_dict() if '.mrla.' not in name} - classifier_names(model)


def freeze_backbone(model: nn.Module, weights: PretrainedCfg | None, fingerprint: str = '') -> Adapter:
    """Freeze everything but layer attention and the classifier, in place; return the model."""
    names = backbone_names(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in names)
    model.__class__ = _adapter_class(type(model))
    model.backbone_weights, model.backbone_fingerprint = weights, fingerprint
    if weights is not None:
        model.pretrained_cfg['tag'] = weights.tag
    return model.train(model.training)
