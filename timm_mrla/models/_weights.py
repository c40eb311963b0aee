"""What goes into a model: warm starts from timm's plain backbones, the authors' checkpoints, and nothing in part."""

import inspect
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from timm.layers import to_ntuple
from timm.models import PretrainedCfg
from torch import nn

from timm_mrla.layers import layer_attentions
from timm_mrla.state_dict import StateDict

_logger = logging.getLogger(__name__)

TAG = 'warmstart_'


def without_weights(cfg: PretrainedCfg) -> PretrainedCfg:
    """A configuration of timm's without its weights and what is said of them."""
    keys = ('url', 'file', 'hf_hub_id', 'hf_hub_filename', 'tag', 'license', 'description', 'origin_url', 'notes')
    return replace(cfg, architecture=None, custom_load=False, **dict.fromkeys(keys))


def warm_start_cfg(cfg: PretrainedCfg, entry: str, source: str) -> PretrainedCfg:
    """The configuration that starts an entry from the weights of its plain backbone, timm's `source`."""
    return replace(
        cfg,
        url=None if cfg.hf_hub_id else cfg.url,  # timm takes the Hub's if both are there
        hf_hub_id=f'timm/{source}' if cfg.hf_hub_id == 'timm/' else cfg.hf_hub_id,
        architecture=None,
        tag=None,
        description=f"A start for training {entry}: timm's weights of {source}, layer attention untrained.",
        notes=(f'Layer attention adds exactly nothing yet: until it is trained, this computes {source}.',),
    )


def is_warm_start(cfg: PretrainedCfg) -> bool:
    """Whether a configuration is one of the above."""
    return (cfg.tag or '').startswith(TAG)


def source_of(cfg: PretrainedCfg) -> str:
    """Where timm looks for the weights of a configuration; empty if it names none."""
    return 'the given state dict' if cfg.state_dict else str(cfg.file or cfg.hf_hub_id or '')


def forget_source(model: nn.Module) -> None:
    """Drop from a model's configuration what is said of its plain backbone's weights, since it will be trained on."""
    for key in ('tag', 'description', 'notes'):
        model.pretrained_cfg.pop(key, None)


def apply_filter(fn: Callable[..., StateDict], state_dict: StateDict, model: nn.Module) -> StateDict:
    """A filter of timm's on a checkpoint; its substitutions of names never see those of layer attention."""
    plain = {name: tensor for name, tensor in state_dict.items() if '.mrla.' not in name}
    ours = {name: tensor for name, tensor in state_dict.items() if '.mrla.' in name}
    takes_model = len(inspect.signature(fn).parameters) > 1
    return {**(fn(plain, model) if takes_model else fn(plain)), **ours}


def start_as_backbone(model: nn.Module) -> None:
    """Make layer attention add exactly nothing until it is trained; to layer decay it is as new as the head then."""
    for layer in layer_attentions(model).values():
        if isinstance(getattr(layer, 'act', None), nn.ReLU):
            raise ValueError("mrla_identity True: no gradient passes the ReLU of a ResNet's MRLA-base, use False")
        for gate in layer.gates():
            nn.init.zeros_(gate)
    if hasattr(model, 'group_matcher'):
        model.group_matcher = _GroupMatcher(model)


class _GroupMatcher:
    """A model's `group_matcher`, in which the names of layer attention match no pattern, as those of the head do.

    It holds the patterns and not the model, which would otherwise hold itself and live on until garbage is collected.
    """

    def __init__(self, model: nn.Module) -> None:
        self.groups = {coarse: type(model).group_matcher(model, coarse) for coarse in (False, True)}

    def __call__(self, coarse: bool = False) -> dict[str, Any]:
        return {name: self.without(spec) for name, spec in self.groups[bool(coarse)].items()}

    def without(self, spec: Any) -> Any:
        """A pattern, or a list of patterns and suffixes, that matches no name of layer attention."""
        if isinstance(spec, list | tuple):
            return [(self.without(pattern), suffix) for pattern, suffix in spec]
        return spec and rf'(?!.*\.mrla\.)(?:{spec})'


def fit_state_dict(state_dict: StateDict, model: nn.Module, cfg: PretrainedCfg, strict: bool = True) -> StateDict:
    """Complete a warm start, and hold a checkpoint to the model's names, also where timm replaces the classifier.

    A warm start's checkpoint, the plain backbone's, gets layer attention that adds exactly nothing: its gates are zero,
    so that the model computes what the backbone computes, and the rest of it is as initialized. A checkpoint with layer
    attention, be it in part, gets nothing, nor does one from a repository or folder that claims to hold the model.

    If they differ in a name or a shape, classifier and first conv aside, RuntimeError is raised; timm knows weights of
    which a part is missing, those are not strict about the plain backbone's names.
    """
    if not state_dict or not all(isinstance(tensor, torch.Tensor) for tensor in state_dict.values()):
        raise RuntimeError('there is no state dict in it')
    if isinstance(getattr(model, 'norm', None), nn.Identity):  # a model that pools its patches has that norm after it
        state_dict = {re.sub(r'^norm\.', 'fc_norm.', name): tensor for name, tensor in state_dict.items()}
    warm = is_warm_start(cfg) and not cfg.source and not any('.mrla.' in name for name in state_dict)
    if warm:
        start_as_backbone(model)
        state_dict = {**state_dict, **{k: v for k, v in model.state_dict().items() if '.mrla.' in k}}

    adapted = [name for names in (cfg.classifier, cfg.first_conv) if names for name in to_ntuple(1)(names)]
    ours, theirs = (
        {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.rpartition('.')[0] not in adapted}
        for tensors in (model.state_dict(), state_dict)
    )
    if not strict:
        names = {name for name in {*ours, *theirs} if '.mrla.' in name or (name in ours and name in theirs)}
        ours, theirs = ({k: v for k, v in shapes.items() if k in names} for shapes in (ours, theirs))
    differing = [name for name, shape in ours.items() if theirs.get(name, shape) != shape]
    problems = {
        'it lacks ': [name for name in ours if name not in theirs],
        'the model has no ': [name for name in theirs if name not in ours],
        '': [f'its {name} is {theirs[name]} and the model has {ours[name]}' for name in differing],
    }
    hint = '' if ours.keys() & theirs.keys() else '; no name fits: a prefix is dropped only if all names have it'
    more = {what: f' and {len(names) - 5} more' if len(names) > 5 else '' for what, names in problems.items() if names}
    if more:
        raise RuntimeError('; '.join(what + ', '.join(problems[what][:5]) + rest for what, rest in more.items()) + hint)
    if warm:
        _logger.warning(
            f'{cfg.architecture} starts from the plain backbone of {source_of(cfg)}: its layer attention is untrained '
            'and adds nothing until you train it.'
        )
    return state_dict
