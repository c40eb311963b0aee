"""Registers two detectors for small images, `fasterrcnn_small` and `maskrcnn_small`, in torchvision and runs a script.

torchvision's detectors enlarge images to 800 pixels, and its training script has no option to change that.
`timm-mrla run benchmarks/small_detectors.py references/detection/train.py --model fasterrcnn_small ...`
"""

import os
import runpy
import sys

from torchvision.models._api import register_model

from timm_mrla.detection import faster_rcnn, mask_rcnn

# shorter and longer side in pixels, and numbers of regions that suit such images
SMALL = {
    'min_size': 112,
    'max_size': 160,
    'rpn_post_nms_top_n_train': 200,
    'rpn_post_nms_top_n_test': 100,
    'box_batch_size_per_image': 32,
}


@register_model()
def fasterrcnn_small(**kwargs):
    """Faster R-CNN on resnet18_mrla."""
    return faster_rcnn('resnet18_mrla', **SMALL, **kwargs)


@register_model()
def maskrcnn_small(**kwargs):
    """Mask R-CNN on resnet18_mrla, with fewer regions, because masks cost most."""
    less = {'box_batch_size_per_image': 16, 'box_detections_per_img': 20}
    return mask_rcnn('resnet18_mrla', **{**SMALL, **less}, **kwargs)


if __name__ == '__main__':
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.realpath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name='__main__')
