"""Layer attention as an adapter: freezes the backbone, and completes small files with the backbone's weights."""

import functools
import hashlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from timm.layers import to_ntuple
from timm.models import PretrainedCfg, load_pretrained
from torch import nn

from timm_mrla.layers import layer_attentions
from timm_mrla.models._weights import weights_source, with_own_layer_attention
from timm_mrla.state_dict import StateDict, convert_state_dict, fit_state_dict

Model = TypeVar('Model', bound=nn.Module)


class Adapter:
    """Base of models with a frozen backbone; a class of timm's follows.

    A norm of the backbone stays in evaluation mode as long as none of its parameters requires gradients. The model
    decides this in `train`, and not a class of norms, because `convert_sync_batchnorm` replaces all batch norms.
    """

    plain: type[nn.Module]  # the model's class without this base
    backbone_weights: PretrainedCfg | None = None  # that the backbone started from, where they are timm's
    backbone_fingerprint = ''  # of these weights, if they were read

    def train(self, mode: bool = True) -> nn.Module:
        """Set the mode of the model; frozen norms keep their running statistics."""
        super().train(mode)
        own = {module for layer in layer_attentions(self).values() for module in layer.modules()}
        for module in self.modules():
            has_statistics = getattr(module, 'running_var', None) is not None and module not in own
            if has_statistics and not any(p.requires_grad for p in module.parameters()):
                module.eval()
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


def freeze_backbone(model: Model, weights: PretrainedCfg | None, fingerprint: str = '') -> Model:
    """Freeze everything but layer attention and the classifier, in place; return the model."""
    names = backbone_names(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in names)
    if not isinstance(model, Adapter):
        model.__class__ = _adapter_class(type(model))
    model.backbone_weights, model.backbone_fingerprint = weights, fingerprint
    if weights is not None:
        model.pretrained_cfg['tag'] = weights.tag
    return model.train(model.training)


def fingerprint(state_dict: StateDict, cfg: PretrainedCfg) -> str:
    """SHA-256 of the names, shapes, dtypes and values of a backbone's checkpoint, without its classifier."""
    digest, classifier = hashlib.sha256(), to_ntuple(1)(cfg.classifier)
    for name, tensor in sorted(convert_state_dict(state_dict).items()):
        if name.rpartition('.')[0] not in classifier:
            digest.update(f'{name} {tensor.dtype} {[*tensor.shape]}'.encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def complete(
    adapter: StateDict,
    model: nn.Module,
    cfg: PretrainedCfg,
    expected: str,
    convert: Callable[..., StateDict],
    strict: bool,
) -> StateDict:
    """Complete the state dict of an adapter with the backbone's weights, which timm loads into the model first.

    Args:
        adapter: Layer attention, the classifier, and whatever else was trained.
        model: The model.
        cfg: Configuration of the backbone's weights.
        expected: Fingerprint of the weights that the adapter was trained on.
        convert: Converts the backbone's checkpoint to the model's names.
        strict: Whether the backbone's names must all be there.

    Raises:
        RuntimeError: The backbone's weights cannot be loaded, or are others.
    """
    source = weights_source(cfg)

    def check(state_dict: StateDict, model: nn.Module) -> StateDict:
        found = fingerprint(state_dict, cfg)
        if found != expected:
            raise RuntimeError(
                f'the adapter was trained on the weights {cfg.hf_hub_id}, with the fingerprint {expected[:12]}, and '
                f'{source} has {found[:12]}; pretrained_cfg_overlay=dict(file=PATH) names another file'
            )
        return fit_state_dict(with_own_layer_attention(convert(state_dict, model), model), model, cfg, strict)

    # timm reads there for which grid of patches a checkpoint is
    adapters_cfg, adapters_args = model.pretrained_cfg, model.pretrained_model_args
    model.pretrained_cfg, model.pretrained_model_args = cfg.to_dict(), {}
    try:
        load_pretrained(model, model.pretrained_cfg, model.num_classes, model.in_chans, check, strict=False)
    except Exception as e:  # of the Hub's client, of torch, or of the check
        raise RuntimeError(f"the backbone's weights cannot be loaded from {source}: {e}") from e
    model.pretrained_cfg, model.pretrained_model_args = adapters_cfg, adapters_args
    own = model.state_dict()
    return {**{name: own[name] for name in backbone_names(model)}, **convert_state_dict(adapter)}
