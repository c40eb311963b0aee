"""What goes into a model: warm starts from timm's plain backbones, the authors' checkpoints, and nothing in part."""

import logging
import re
from collections.abc import Iterable
from dataclasses import replace

import torch
from timm.layers import to_ntuple
from timm.models import PretrainedCfg, clean_state_dict, get_pretrained_cfg, is_model_pretrained
from torch import nn

from timm_mrla.layers import layer_attentions

__all__ = [
    'convert_state_dict',
    'fit_state_dict',
    'is_warm_start',
    'source_of',
    'warm_start_cfgs',
]

_logger = logging.getLogger(__name__)

_TAG = 'warmstart_'

# the authors' names of what MRLA adds to a block, and ours
_AUTHORS_NAMES = (
    (r'\.bn_mrla\.', '.mrla.norm.'),
    (r'\.norm_mrla\.', '.mrla.norm_x.'),
    (r'\.mrla\.norm(x|o)\.', r'.mrla.norm_\1.'),
    (r'\.mrla\.lambda_t$', '.mrla.lam'),
    (r'\.(mrla|mla)\.W(q|k)\.', r'.attn.\2.'),
    (r'\.(mrla|mla)\.Wv\.', '.v.'),
    (r'\.(mrla|mla)\.bn_v\.', '.norm_v.'),
)


def warm_start_cfgs(backbones: dict[str, str], tags: Iterable[str]) -> dict[str, PretrainedCfg]:
    """Configurations `ENTRY.warmstart_TAG`, which start an entry from timm's weights of its plain backbone.

    For `generate_default_cfgs`, which makes the first tag with weights the default of its entry: the entry itself,
    without weights, must follow as `ENTRY.*`, so that nobody gets these weights without asking for them.

    Args:
        backbones: Names of timm's plain backbones by entry.
        tags: Tags of their weights. One that timm does not have (any more) is left out.
    """
    cfgs = {}
    for entry, backbone in backbones.items():
        for source in (f'{backbone}.{tag}' for tag in tags):
            if is_model_pretrained(source):
                cfg = get_pretrained_cfg(source)
                cfgs[f'{entry}.{_TAG}{cfg.tag}'] = replace(
                    cfg,
                    url=None,
                    architecture=None,
                    tag=None,
                    description=f"A start for training {entry}: timm's weights of {source}, layer attention untrained.",
                    notes=(f'Layer attention adds exactly nothing yet: until it is trained, this computes {source}.',),
                )
    return cfgs


def is_warm_start(cfg: PretrainedCfg) -> bool:
    """Whether a configuration is one of the above."""
    return (cfg.tag or '').startswith(_TAG)


def source_of(cfg: PretrainedCfg) -> str:
    """Where timm looks for the weights of a configuration; empty if it names none."""
    return 'the given state dict' if cfg.state_dict else str(cfg.file or cfg.hf_hub_id or '')


def fit_state_dict(
    state_dict: dict[str, torch.Tensor], model: nn.Module, cfg: PretrainedCfg
) -> dict[str, torch.Tensor]:
    """Complete a warm start, and hold a checkpoint to the model's names, also where timm replaces the classifier.

    A warm start's checkpoint, the plain backbone's, gets layer attention that adds exactly nothing: its gates are zero,
    so that the model computes what the backbone computes, and the rest of it is as initialized. A checkpoint with layer
    attention, be it in part, gets nothing, nor does one from a repository or folder that claims to hold the model.

    Args:
        state_dict: Parameters and buffers by the model's names.
        model: The model, initialized.
        cfg: Its configuration.

    Raises:
        RuntimeError: The checkpoint and the model differ in a name or a shape, classifier and first conv aside.
    """
    if not state_dict or not all(isinstance(tensor, torch.Tensor) for tensor in state_dict.values()):
        raise RuntimeError('there is no state dict in it')
    warm = is_warm_start(cfg) and not cfg.source and not any('.mrla.' in name for name in state_dict)
    if warm:
        for layer in layer_attentions(model).values():
            for gate in layer.gates():
                nn.init.zeros_(gate)
        state_dict = {**state_dict, **{k: v for k, v in model.state_dict().items() if '.mrla.' in k}}

    adapted = [name for names in (cfg.classifier, cfg.first_conv) if names for name in to_ntuple(1)(names)]
    ours, theirs = (
        {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.rpartition('.')[0] not in adapted}
        for tensors in (model.state_dict(), state_dict)
    )
    differing = [name for name, shape in ours.items() if theirs.get(name, shape) != shape]
    problems = {
        'it lacks ': [name for name in ours if name not in theirs],
        'the model has no ': [name for name in theirs if name not in ours],
        '': [f'its {name} is {theirs[name]} and the model has {ours[name]}' for name in differing],
    }
    if any(problems.values()):
        raise RuntimeError(
            '; '.join(
                what + ', '.join(names[:5]) + (f' and {len(names) - 5} more' if len(names) > 5 else '')
                for what, names in problems.items()
                if names
            )
        )
    if warm:
        _logger.warning(
            f'{cfg.architecture} starts from the plain backbone of {source_of(cfg)}: its layer attention is untrained '
            'and adds nothing until you train it.'
        )
    return state_dict


def convert_state_dict(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give a checkpoint of the authors' code our names; our own passes unchanged.

    Args:
        state_dict: Parameters and buffers by name, bare or under `state_dict` or `model`, with or without the prefixes
            of DistributedDataParallel and torch.compile.
    """
    state_dict = clean_state_dict(state_dict.get('state_dict', state_dict.get('model', state_dict)))
    out = {}
    for name, tensor in state_dict.items():
        for pattern, replacement in _AUTHORS_NAMES:
            name = re.sub(pattern, replacement, name)
        out[name] = tensor.flatten() if name.endswith('.mrla.lam') else tensor
    return out
