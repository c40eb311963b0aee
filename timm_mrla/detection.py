"""torchvision's detectors with a feature pyramid, on backbones of timm, with layer attention or without.

Importing this registers those on the paper's ResNets in torchvision's registry, as `fasterrcnn_resnet50_mrla_fpn` and
so on, where torchvision's training script finds them.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
from inspect import signature
from itertools import product
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from timm.models import PretrainedCfg, is_model_pretrained, model_entrypoint
from timm.utils.model import freeze_batch_norm_2d, unfreeze_batch_norm_2d, unwrap_model
from torch import nn
from torchvision.models import list_models
from torchvision.models._api import register_model  # torchvision exports what reads its registry, but not this
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import _validate_trainable_layers  # as its own builders do
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from timm_mrla.hub import (
    built_with,
    check_model,
    check_repo,
    full_state_dict,
    load_checkpoint,
    new_folder,
    read_checkpoint,
    upload,
)
from timm_mrla.layers import layer_attentions
from timm_mrla.models._weights import StateDict, fit_state_dict

__all__ = ['faster_rcnn', 'from_pretrained', 'mask_rcnn', 'push_to_hub', 'retina_net', 'save_pretrained']

Detector = FasterRCNN | RetinaNet

_STRIDES = (4, 8, 16, 32)
_WIDTH = 256  # channels of the pyramid, as in torchvision
# class, strides of the backbone's maps and how the pyramid goes on, as in torchvision
_DETECTORS = {
    'faster_rcnn': (FasterRCNN, _STRIDES, LastLevelMaxPool),
    'mask_rcnn': (MaskRCNN, _STRIDES, LastLevelMaxPool),
    'retina_net': (RetinaNet, _STRIDES[1:], partial(LastLevelP6P7, _WIDTH, _WIDTH)),
}
# by module of timm's, what models whose images have one size need to take any
_ANY_SIZE = {'swin_transformer': {'strict_img_size': False}, 'swin_transformer_v2': {'strict_img_size': False}}


class _PyramidBackbone(nn.Module):
    """Images [B, 3, H, W] -> maps of a model of timm's, by name, after a feature pyramid network."""

    def __init__(self, body: nn.Module, strides: tuple[int, ...], extra_blocks: nn.Module) -> None:
        super().__init__()
        levels = [i for i, info in enumerate(body.feature_info) if info['reduction'] in strides]
        channels = [body.feature_info[i]['num_chs'] for i in levels]
        self.indices = body.prune_intermediate_layers(levels, prune_norm=True, prune_head=True)
        self.body, self.out_channels = body, _WIDTH
        self.fpn = FeaturePyramidNetwork(channels, _WIDTH, extra_blocks)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = self.body.forward_intermediates(x, indices=self.indices, intermediates_only=True)
        # torchvision's RoI pooler looks for these names, and leaves out others without a word
        return self.fpn({str(i): y for i, y in enumerate(maps)})


def _any_size(backbone: str) -> dict[str, Any]:
    """The arguments with which a backbone takes images of any size."""
    return _ANY_SIZE.get(model_entrypoint(backbone).__module__.rpartition('.')[2], {})


def _stages(body: nn.Module) -> list[list[int]]:
    """Which of a model's parameters, in their order, are in the modules that make its maps."""
    names = [name for name, _ in body.named_parameters()]
    modules = [f'{info["module"]}.' for info in body.feature_info if info['reduction'] in _STRIDES]
    return [[i for i, name in enumerate(names) if name.startswith(module)] for module in modules]


def _check_backbone(name: str) -> None:
    """Raises ValueError unless a model of timm's has the maps that detectors need, of images of any size."""
    check_model(name)
    backbone, _, tag = name.partition('.')
    if tag:
        raise ValueError(f'{name!r} says which weights too: name {backbone!r}, and {tag!r} as weights_backbone')
    with torch.device('meta'):
        body = timm.create_model(name, **_any_size(name)).eval()
        strides = {info['reduction'] for info in getattr(body, 'feature_info', ())}
        if not strides.issuperset(_STRIDES):
            found = ', '.join(map(str, sorted(strides))) or 'none'
            raise ValueError(f'detectors need maps of strides 4, 8, 16 and 32, and those of {name} are of: {found}')
        if not all(_stages(body)):
            raise ValueError(f'{name} does not say which of its modules make its maps, so that none could be frozen')
        try:
            body.forward_intermediates(torch.empty(1, 3, 352, 416), intermediates_only=True)
        except (AssertionError, RuntimeError) as e:
            side = body.pretrained_cfg['input_size'][-1]
            raise ValueError(f'detectors need a backbone for images of any size; {name} takes {side} x {side}') from e


def _create_body(name: str, weights: str | None) -> nn.Module:
    """A model of timm's, with weights in one of the forms that `weights_backbone` has."""
    size = _any_size(name)
    if weights is None:
        return timm.create_model(name, **size)
    if is_model_pretrained(f'{name}.{weights}'):
        return timm.create_model(f'{name}.{weights}', pretrained=True, **size)
    if os.path.isfile(weights):
        return load_checkpoint(weights, name, **size)
    if weights.startswith(('hf-hub:', 'local-dir:')):
        config = _read_config(weights.removeprefix('local-dir:'))
        if config['architecture'] != name:
            raise ValueError(f'{weights!r} holds {config["architecture"]}, and not {name}')
        with built_with(weights, {}):
            channels = config.get('pretrained_cfg', config)['input_size'][0]
        if channels != 3:
            raise ValueError(f'{weights!r} takes images of {channels} channels, and detectors have those of 3')
        return timm.create_model(weights, pretrained=True, **size)
    tags = [tag.partition('.')[2] for tag in timm.list_pretrained(f'{name}.*')]
    raise ValueError(
        f'weights_backbone {weights!r} is no file, hf-hub: or local-dir: name, and no tag of {name}; '
        f'its tags: {", ".join(tags) or "none"}'
    )


def _freeze_norms(body: nn.Module) -> None:
    """Freeze the batch norms of a pretrained backbone, but not those of layer attention that is not trained yet.

    A warm start leaves their weights at zero, where frozen they would keep layer attention from ever adding anything.
    """
    untrained = [layer for layer in layer_attentions(body).values() if not any(gate.any() for gate in layer.gates())]
    freeze_batch_norm_2d(body)
    for layer in untrained:
        unfreeze_batch_norm_2d(layer)


def _freeze_first_layers(backbone: _PyramidBackbone, trainable_layers: int) -> None:
    """Freeze all but the last of a backbone's layers: its stem and four stages, each up to where its map is taken."""
    parameters, stages = [*backbone.body.parameters()], _stages(backbone.body)
    ends = [0, stages[0][0], *(stage[-1] + 1 for stage in stages[:-1]), len(parameters)]
    for parameter in parameters[: ends[5 - trainable_layers]]:
        parameter.requires_grad_(False)


def _file(name: str, file: str) -> str:
    """The path of a file of a folder or of a repository of the Hub."""
    if not name.startswith('hf-hub:'):
        return os.path.join(name, file)
    repo_id, _, revision = name.removeprefix('hf-hub:').partition('@')
    return hf_hub_download(repo_id, file, revision=revision or None)


def _read_config(name: str) -> dict[str, Any]:
    """What a folder or a repository of the Hub says of its model."""
    try:
        config = json.loads(Path(_file(name, 'config.json')).read_text())
    except OSError as e:
        raise ValueError(f'{name!r} holds no model: {e}') from e
    except ValueError as e:
        raise ValueError(f'{name!r} holds no model: its config.json cannot be read: {e}') from e
    if not isinstance(config, dict) or not isinstance(config.get('architecture'), str):
        raise ValueError(f'{name!r} holds no model: its config.json names no architecture')
    return config


def _open_weights(name: str) -> tuple[dict[str, Any], Callable[[], StateDict]]:
    """What a detector's weights are of, as far as they say, and a function that reads them."""
    if name.startswith('hf-hub:') or os.path.isdir(name):
        saved = _read_config(name)
        if saved['architecture'] not in _DETECTORS:
            raise ValueError(f'{name!r} holds {saved["architecture"]}, no detector; weights_backbone takes backbones')
        return saved, lambda: read_checkpoint(_file(name, 'model.safetensors'))

    state_dict = read_checkpoint(name)
    if 'roi_heads.box_predictor.cls_score.weight' in state_dict:
        classes = len(state_dict['roi_heads.box_predictor.cls_score.weight'])
    elif 'head.classification_head.cls_logits.weight' in state_dict:
        anchors = len(state_dict['head.regression_head.bbox_reg.weight']) // 4  # of which each has all classes
        classes = len(state_dict['head.classification_head.cls_logits.weight']) // anchors
    else:
        raise ValueError(f'{name!r} is no checkpoint of a detector; weights_backbone takes those of backbones')
    return {'num_classes': classes}, lambda: state_dict


def _load_weights(model: Detector, name: str, read: Callable[[], StateDict]) -> None:
    """Load weights into a detector with frozen norms, strictly."""
    try:
        state_dict, names = read(), model.state_dict()
        # what a batch norm counts, a frozen one does not have
        state_dict = {k: v for k, v in state_dict.items() if k in names or not k.endswith('.num_batches_tracked')}
        model.load_state_dict(fit_state_dict(state_dict, model, PretrainedCfg()))
    except (RuntimeError, OSError) as e:
        raise ValueError(f'{name!r} cannot be loaded: {e}') from e


def _build(
    architecture: str,
    backbone: str,
    weights: str | None = None,
    num_classes: int | None = None,
    weights_backbone: str | None = None,
    trainable_backbone_layers: int | None = None,
    **kwargs,
) -> Detector:
    """Build a detector in the way of torchvision's builders."""
    if num_classes is not None and num_classes < 2:
        raise ValueError(f'num_classes is {num_classes}, and the background is a class, too: it is at least 2')
    _check_backbone(backbone)
    saved, read = _open_weights(weights) if weights is not None else ({}, None)
    asked = {'architecture': architecture, 'backbone': backbone}
    if num_classes is not None:
        asked['num_classes'] = num_classes
    for key, value in asked.items():
        if saved.get(key, value) != value:
            raise ValueError(f'{key} is {value}, and that of {weights!r} is {saved[key]}')
    trained = weights is not None or weights_backbone is not None
    trainable_layers = _validate_trainable_layers(trained, trainable_backbone_layers, max_value=5, default_value=3)

    cls, strides, extra_blocks = _DETECTORS[architecture]
    # torchvision hands on what it does not know, to where it is ignored; the last is its training script's
    known = {*signature(cls).parameters, *signature(GeneralizedRCNNTransform).parameters, '_skip_resize', 'categories'}
    for key in kwargs:
        if key not in known:
            raise TypeError(f'{cls.__name__} has no argument {key!r}')
    body = _create_body(backbone, weights_backbone if weights is None else None)
    if trained:
        _freeze_norms(body)
    pyramid = _PyramidBackbone(body, strides, extra_blocks())
    _freeze_first_layers(pyramid, trainable_layers)

    mean, std = (list(body.pretrained_cfg[key]) for key in ('mean', 'std'))
    config = {'num_classes': 91, 'image_mean': mean, 'image_std': std, **saved, **kwargs, **asked}
    about = ('architecture', 'backbone', 'categories', 'requires')
    model = cls(pyramid, **{key: value for key, value in config.items() if key not in about})
    model.config = config
    if read:
        _load_weights(model, weights, read)
    # torchvision's training script writes its arguments beside the weights, and resumes from these as weights alone;
    # timm allows it too, but no longer once it has read a checkpoint
    torch.serialization.add_safe_globals([argparse.Namespace])
    return model


def faster_rcnn(backbone: str, **kwargs) -> FasterRCNN:
    """torchvision's Faster R-CNN with a feature pyramid, on a model of timm's.

    Images, targets, losses and detections are as in `torchvision.models.detection.fasterrcnn_resnet50_fpn`. With
    trained weights, the backbone's batch norms are frozen, those of layer attention too; but not those of a warm start,
    which are at zero, where frozen ones would never add anything.

    Args:
        backbone: A name in timm's registry, of a model that has maps of strides 4, 8, 16 and 32.
        weights: A detector's weights: the path of a checkpoint of torchvision's training script, that of a folder which
            `save_pretrained` wrote, or an `hf-hub:` name. A folder or repository also has the arguments that the
            detector was built with, for those not given here.
        num_classes: Number of classes, with the background; by default that of weights, or 91.
        weights_backbone: Weights that the backbone starts from: a tag, such as `warmstart_a1_in1k`, the path of a
            checkpoint of timm's training script, or an `hf-hub:` or `local-dir:` name.
        trainable_backbone_layers: With trained weights, how many of the backbone's five layers are trained, the last
            ones; 3 by default. They are the stem and four stages, each up to where its map is taken.
        categories: Among kwargs; the classes as COCO's annotations list them, such as `[{'id': 1, 'name': 'person'}]`,
            which are saved with the detector.
        **kwargs: Arguments of torchvision's class. image_mean and image_std are by default the backbone's.

    Raises:
        ValueError: A name, path or number is not what it should be, or weights do not fit.
        RuntimeError: The backbone's weights cannot be had.
    """
    return _build('faster_rcnn', backbone, **kwargs)


def mask_rcnn(backbone: str, **kwargs) -> MaskRCNN:
    """torchvision's Mask R-CNN with a feature pyramid, on a model of timm's; all is as in `faster_rcnn`."""
    return _build('mask_rcnn', backbone, **kwargs)


def retina_net(backbone: str, **kwargs) -> RetinaNet:
    """torchvision's RetinaNet with a feature pyramid, on a model of timm's; all is as in `faster_rcnn`."""
    return _build('retina_net', backbone, **kwargs)


def _register(builder: Callable[..., Detector], backbone: str) -> None:
    """Give a detector on a backbone a name in torchvision's registry."""

    def fn(**kwargs) -> Detector:
        return builder(backbone, **kwargs)

    fn.__name__ = fn.__qualname__ = f'{builder.__name__.replace("_", "")}_{backbone}_fpn'
    fn.__doc__ = f'`timm_mrla.detection.{builder.__name__}({backbone!r})`.'
    if fn.__name__ not in list_models():  # of an import before this one
        register_model()(fn)


for _builder, _depth, _ending in product((faster_rcnn, mask_rcnn, retina_net), (18, 34, 50, 101, 152), ('', 'b')):
    _register(_builder, f'resnet{_depth}_mrla{_ending}')


def from_pretrained(name: str) -> Detector:
    """Load a detector from a folder, by its path, or from the Hub, by its `hf-hub:` name.

    Raises:
        ValueError: There is no detector of ours, or it cannot be had.
    """
    saved, _ = _open_weights(name)
    if 'backbone' not in saved:
        raise ValueError(f'{name!r} does not say what it is of: build the detector, with weights={name!r}')
    try:
        return _build(saved['architecture'], saved['backbone'], weights=name)
    except (TypeError, LookupError, AttributeError) as e:  # what config.json says is not what it should be
        raise ValueError(f'{name!r} holds no detector that can be built: {type(e).__name__}: {e}') from e


def save_pretrained(model: Detector, folder: str | os.PathLike) -> None:
    """Write a detector to a folder that `from_pretrained` and `weights` load.

    The folder gets config.json, model.safetensors and README.md, or is not there.

    Args:
        model: A detector of this module's.
        folder: The folder, which must not exist yet.

    Raises:
        ValueError: The detector is not of this module, or has an argument that JSON cannot hold.
        FileExistsError: The folder exists.
        OSError: It cannot be written.
    """
    _save(model, folder, str(folder))


def _save(model: Detector, folder: str | os.PathLike, name: str) -> None:
    """As above, with the name that the model card loads it by."""
    plain = unwrap_model(model)
    if not hasattr(plain, 'config'):
        raise ValueError(
            'this detector was not built by timm_mrla.detection, so that nothing says how to build it again'
        )
    try:
        config = json.dumps({**plain.config, 'requires': ['timm_mrla']}, indent=2)
    except TypeError as e:
        raise ValueError(f'this detector has an argument that config.json cannot hold: {e}') from e
    state_dict = full_state_dict(model)
    if not state_dict:  # the first process has it
        return
    with new_folder(folder) as out:
        os.mkdir(out)
        Path(out, 'config.json').write_text(config)
        safetensors.torch.save_file(state_dict, os.path.join(out, 'model.safetensors'), {'format': 'pt'})
        _model_card(plain, name).save(os.path.join(out, 'README.md'))


def _model_card(model: Detector, name: str) -> ModelCard:
    kind, backbone = type(model).__name__, model.config['backbone']
    task = 'image-segmentation' if isinstance(model, MaskRCNN) else 'object-detection'
    data = ModelCardData(library_name='timm-mrla', pipeline_tag=task, tags=[task, 'timm-mrla', 'layer-attention'])
    return ModelCard(f"""---
{data.to_yaml()}
---
# {name.rpartition('/')[2].rpartition(':')[2]}

torchvision's {kind} with a feature pyramid on `{backbone}` of timm, by
[timm-mrla](https://pypi.org/project/timm-mrla).

## Model Usage

`pip install timm-mrla`, then

```python
import torch
from PIL import Image
from timm_mrla.detection import from_pretrained
from torchvision.transforms.functional import to_tensor

model = from_pretrained('{name}').eval()
image = to_tensor(Image.open('image.jpg').convert('RGB'))
with torch.inference_mode():
    detections = model([image])[0]
```
""")


def push_to_hub(
    model: Detector,
    repo_id: str,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str = 'Add model',
) -> str:
    """Publish a detector in a repository of the Hugging Face Hub; all else is as in `timm_mrla.hub.push_to_hub`."""
    check_repo(repo_id)
    with tempfile.TemporaryDirectory() as tmp:
        folder = os.path.join(tmp, 'model')
        _save(model, folder, f'hf-hub:{repo_id}')
        return upload(folder, repo_id, token, private, commit_message)
