"""Builds detectors."""

import argparse
import warnings
from inspect import signature

import torch
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from timm_mrla.detection.backbone import (
    DETECTORS,
    Detector,
    PyramidBackbone,
    check_backbone,
    freeze_first_layers,
    freeze_norms,
)
from timm_mrla.detection.weights import create_body, load_weights, open_weights


def _count_trainable_layers(trained: bool, asked: int | None) -> int:
    """How many of the five layers of a backbone train, as in torchvision: all of them if it has no trained weights."""
    if not trained:
        if asked is not None:
            warnings.warn('trainable_backbone_layers has no effect without weights: all layers train', stacklevel=4)
        return 5
    if not 0 <= (layers := 3 if asked is None else asked) <= 5:
        raise ValueError(f'trainable_backbone_layers must be in the range [0,5], got {layers}')
    return layers


def build_detector(
    architecture: str,
    backbone: str,
    weights: str | None = None,
    num_classes: int | None = None,
    weights_backbone: str | None = None,
    trainable_backbone_layers: int | None = None,
    **kwargs,
) -> Detector:
    """Build a detector as torchvision's builders do."""
    if num_classes is not None and num_classes < 2:
        raise ValueError(f'num_classes is {num_classes}, and the background is a class, too: it is at least 2')
    check_backbone(backbone)
    saved, read = open_weights(weights) if weights is not None else ({}, None)
    asked = {'architecture': architecture, 'backbone': backbone}
    if num_classes is not None:
        asked['num_classes'] = num_classes
    for key, value in asked.items():
        if saved.get(key, value) != value:
            raise ValueError(f'{key} is {value}, but {weights!r} has {saved[key]}')
    trained = weights is not None or weights_backbone is not None
    trainable_layers = _count_trainable_layers(trained, trainable_backbone_layers)

    cls, strides, extra_blocks = DETECTORS[architecture]
    # torchvision silently ignores unknown arguments; its training script passes _skip_resize
    known = {*signature(cls).parameters, *signature(GeneralizedRCNNTransform).parameters, '_skip_resize', 'categories'}
    for key in kwargs:
        if key not in known:
            raise TypeError(f'{cls.__name__} has no argument {key!r}')
    body = create_body(backbone, weights_backbone if weights is None else None)
    if trained:
        freeze_norms(body)
    pyramid = PyramidBackbone(body, strides, extra_blocks())
    freeze_first_layers(pyramid, trainable_layers)

    mean, std = (list(body.pretrained_cfg[key]) for key in ('mean', 'std'))
    config = {'num_classes': 91, 'image_mean': mean, 'image_std': std, **saved, **kwargs, **asked}
    not_arguments = ('architecture', 'backbone', 'categories', 'requires')
    model = cls(pyramid, **{key: value for key, value in config.items() if key not in not_arguments})
    model.config = config
    if read:
        load_weights(model, weights, read)
    # torchvision's training script saves its arguments with the weights, and must be able to load them again; timm
    # allows this class too, but no longer once it has read a checkpoint
    torch.serialization.add_safe_globals([argparse.Namespace])
    return model


def faster_rcnn(backbone: str, **kwargs) -> FasterRCNN:
    """torchvision's Faster R-CNN with a feature pyramid, on a model of timm's.

    Images, targets, losses and detections are as in `torchvision.models.detection.fasterrcnn_resnet50_fpn`. With
    trained weights, the backbone's batch norms are frozen, also in layer attention. After a warm start, the norms of
    layer attention are not frozen: they are zero, so layer attention would never add anything.

    Args:
        backbone: Name of a model in timm's registry that has maps of strides 4, 8, 16 and 32.
        weights: Weights of the whole detector: the path of a checkpoint of torchvision's training script, the path of a
            folder that `save_pretrained` wrote, or a `local-dir:` or `hf-hub:` name. A folder or repository also sets
            the arguments that the detector was built with, unless they are given here.
        num_classes: Number of classes, with the background; by default the number in `weights`, or 91.
        weights_backbone: Weights for the backbone at the start of training: a tag, such as `warmstart_a1_in1k`, the
            path of a checkpoint of timm's training script, or an `hf-hub:` or `local-dir:` name.
        trainable_backbone_layers: With trained weights, how many of the backbone's last layers are trained, 3 by
            default. A backbone has five: the stem, and four stages that end with a map.
        categories: Among kwargs; the classes as COCO's annotations list them, such as `[{'id': 1, 'name': 'person'}]`.
            They are saved with the detector.
        **kwargs: Arguments of torchvision's class. image_mean and image_std are by default the backbone's.

    Raises:
        ValueError: A name, path or number is wrong, or weights do not fit.
        RuntimeError: The weights of the backbone cannot be downloaded or read.
    """
    return build_detector('faster_rcnn', backbone, **kwargs)


def mask_rcnn(backbone: str, **kwargs) -> MaskRCNN:
    """torchvision's Mask R-CNN with a feature pyramid, on a model of timm's; arguments as for `faster_rcnn`."""
    return build_detector('mask_rcnn', backbone, **kwargs)


def retina_net(backbone: str, **kwargs) -> RetinaNet:
    """torchvision's RetinaNet with a feature pyramid, on a model of timm's; arguments as for `faster_rcnn`."""
    return build_detector('retina_net', backbone, **kwargs)
