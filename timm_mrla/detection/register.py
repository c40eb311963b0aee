"""Adds the detectors on the paper's ResNets to torchvision's registry."""

import logging
from collections.abc import Callable
from itertools import product

from timm_mrla.detection.backbone import Detector
from timm_mrla.detection.build import faster_rcnn, mask_rcnn, retina_net

_logger = logging.getLogger(__name__)


def _named_builder(builder: Callable[..., Detector], backbone: str) -> Callable[..., Detector]:
    """A function that builds a detector on a backbone, with the name of both."""

    def fn(**kwargs) -> Detector:
        return builder(backbone, **kwargs)

    fn.__name__ = fn.__qualname__ = f'{builder.__name__.replace("_", "")}_{backbone}_fpn'
    fn.__doc__ = f'`timm_mrla.detection.{builder.__name__}({backbone!r})`.'
    return fn


def register_detectors() -> None:
    """Register the detectors by name; if torchvision cannot take them, say so in the log.

    torchvision exports the functions that read its registry, but not the one that adds to it. Importing the package
    must not fail if that function moves: the detectors can still be built, only not by name.
    """
    try:
        from torchvision.models._api import BUILTIN_MODELS, register_model
    except ImportError as e:
        _logger.warning(
            f'the detectors are not in the registry of torchvision, because it cannot take them: {e}; '
            'timm_mrla.detection builds them'
        )
        return
    for builder, depth, base in product((faster_rcnn, mask_rcnn, retina_net), (18, 34, 50, 101, 152), ('', 'b')):
        fn = _named_builder(builder, f'resnet{depth}_mrla{base}')
        if fn.__name__ not in BUILTIN_MODELS:  # this module may have been imported before
            register_model()(fn)
