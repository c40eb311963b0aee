"""torchvision's detectors with a feature pyramid, on backbones of timm, with or without layer attention.

Importing this package adds the detectors on the paper's ResNets to torchvision's registry, so that torchvision's
training script finds them as `fasterrcnn_resnet50_mrla_fpn` and so on, if torchvision can take them.
"""

from timm_mrla.detection.build import faster_rcnn, mask_rcnn, retina_net
from timm_mrla.detection.hub import from_pretrained, push_to_hub, save_pretrained
from timm_mrla.detection.register import register_detectors

__all__ = ['faster_rcnn', 'from_pretrained', 'mask_rcnn', 'push_to_hub', 'retina_net', 'save_pretrained']

register_detectors()
