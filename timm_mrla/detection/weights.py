"""Finds and loads weights: of whole detectors, and of their backbones."""

import os
from collections.abc import Callable
from inspect import signature
from typing import Any

import timm
from timm.data import resolve_input_data_config
from timm.models import PretrainedCfg, is_model_pretrained
from torch import nn

from timm_mrla.checkpoints import load_checkpoint, read_checkpoint, read_config, saved_file
from timm_mrla.checks import explain_build_errors
from timm_mrla.detection.backbone import DETECTORS, Detector, any_size
from timm_mrla.state_dict import StateDict, fit_state_dict


def _check_values(name: str, saved: dict[str, Any]) -> None:
    """Raise ValueError if an argument of a saved detector has a value of another type than torchvision needs."""

    def several(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(x, int | float) for x in value)

    parameters = signature(DETECTORS[saved['architecture']][0]).parameters
    numbers = [key for key, parameter in parameters.items() if isinstance(parameter.default, int | float)]
    fits = {key: lambda value: isinstance(value, int | float) for key in (*numbers, 'num_classes')}
    fits |= {key: lambda value: value is None or several(value) for key in ('image_mean', 'image_std')}
    fits['min_size'] = lambda value: isinstance(value, int | float) or several(value)
    fits['backbone'] = lambda value: isinstance(value, str)
    fits['categories'] = lambda value: all({'id', 'name'} <= {*category} for category in value)
    for key in fits.keys() & saved.keys():
        try:
            fit = fits[key](saved[key])
        except TypeError:
            fit = False
        if not fit:
            raise ValueError(f'{name!r} holds no detector that can be built: its {key} is {saved[key]!r}')


def create_body(name: str, weights: str | None) -> nn.Module:
    """Build a backbone by its name in timm, with weights in one of the forms of `weights_backbone`."""
    size = any_size(name)
    if weights is None:
        return timm.create_model(name, **size)
    if is_model_pretrained(f'{name}.{weights}'):
        return timm.create_model(f'{name}.{weights}', pretrained=True, **size)
    if os.path.isfile(weights):
        return load_checkpoint(weights, name, **size)
    if weights.startswith(('hf-hub:', 'local-dir:')):
        config = read_config(weights)
        if config['architecture'] != name:
            raise ValueError(f'{weights!r} holds {config["architecture"]}, and not {name}')
        with explain_build_errors(weights, {}):
            channels = resolve_input_data_config(timm.create_model(weights, device='meta'))['input_size'][0]
        if channels != 3:
            raise ValueError(f'{weights!r} takes images of {channels} channels, but detectors take 3')
        return timm.create_model(weights, pretrained=True, **size)
    tags = [tag.partition('.')[2] for tag in timm.list_pretrained(f'{name}.*')]
    raise ValueError(
        f'weights_backbone {weights!r} is no file, hf-hub: or local-dir: name, and no tag of {name}; '
        f'its tags: {", ".join(tags) or "none"}'
    )


def open_weights(name: str) -> tuple[dict[str, Any], Callable[[], StateDict]]:
    """The arguments that saved weights of a detector belong to, as far as they are known, and a function to read them.

    A folder or a repository says them all in config.json, a checkpoint only the number of classes.
    """
    in_timm = name.startswith(('hf-hub:', 'local-dir:'))
    if in_timm or os.path.isdir(name):
        saved = read_config(name)
        if saved['architecture'] not in DETECTORS:
            timm_name = name if in_timm else f'local-dir:{name}'
            raise ValueError(
                f'{name!r} contains the classifier {saved["architecture"]}, not a detector. To use it as a backbone, '
                f'pass weights_backbone={timm_name!r}'
            )
        _check_values(name, saved)
        return saved, lambda: read_checkpoint(saved_file(name, 'model.safetensors'))

    state_dict = read_checkpoint(name)
    if 'roi_heads.box_predictor.cls_score.weight' in state_dict:
        classes = len(state_dict['roi_heads.box_predictor.cls_score.weight'])
    elif 'head.classification_head.cls_logits.weight' in state_dict:
        anchors = len(state_dict['head.regression_head.bbox_reg.weight']) // 4
        classes = len(state_dict['head.classification_head.cls_logits.weight']) // anchors  # a score for each anchor
    else:
        raise ValueError(
            f'{name!r} is not a checkpoint of a detector. To load it into the backbone, pass weights_backbone={name!r}'
        )
    return {'num_classes': classes}, lambda: state_dict


def load_weights(model: Detector, name: str, read: Callable[[], StateDict]) -> None:
    """Load weights into a detector with frozen norms; all names and shapes must match."""
    try:
        state_dict, names = read(), model.state_dict()
        # frozen norms have no counter of batches
        state_dict = {k: v for k, v in state_dict.items() if k in names or not k.endswith('.num_batches_tracked')}
        model.load_state_dict(fit_state_dict(state_dict, model, PretrainedCfg()))
    except (RuntimeError, OSError) as e:
        raise ValueError(f'{name!r} cannot be loaded: {e}') from e
