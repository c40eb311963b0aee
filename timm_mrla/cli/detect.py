"""The command `timm-mrla detect`: draws boxes, masks, names and scores that a detector finds in image files."""

import argparse
import math
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import pad
from torchvision.transforms.functional import convert_image_dtype, pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

from timm_mrla.cli.images import check_picture_path, open_image, picture_endings
from timm_mrla.detection import from_pretrained

_MIN_SCORE = 0.5  # detections with a lower score are not drawn
_COLOURS = ('yellow', 'cyan', 'orange', 'lime', 'violet')  # for the classes in turn; black letters must be readable


def draw_detections(picture: torch.Tensor, detector: nn.Module) -> torch.Tensor:
    """Draw boxes, masks if there are any, names of classes and scores into a picture [3, H, W] of bytes."""
    with torch.inference_mode():
        (found,) = detector([convert_image_dtype(picture)])
    found = {key: value[found['scores'] > _MIN_SCORE] for key, value in found.items()}
    classes = found['labels'].tolist()
    if not classes:
        return picture
    colours = [_COLOURS[label % len(_COLOURS)] for label in classes]
    if 'masks' in found:
        picture = draw_segmentation_masks(picture, found['masks'][:, 0] > 0.5, alpha=0.5, colors=colours)
    names = {category['id']: category['name'] for category in detector.config.get('categories', [])}
    scores = zip(classes, found['scores'].tolist(), strict=True)
    labels = [f'{names.get(label, label)}: {score:.2f}' for label, score in scores]
    return draw_bounding_boxes(picture, found['boxes'], labels, colours, width=2, fill_labels=True)


def side_by_side(pictures: list[torch.Tensor]) -> torch.Tensor:
    """Arrange pictures of any sizes in a square grid."""
    height, width = (max(picture.shape[i] for picture in pictures) for i in (1, 2))
    padded = [pad(picture, (0, width - picture.shape[2], 0, height - picture.shape[1])) for picture in pictures]
    return make_grid(padded, nrow=math.ceil(math.sqrt(len(padded))))


def main(args: argparse.Namespace) -> None:
    """Read the images, load the detector, and write the picture."""
    out = Path(args.out)
    check_picture_path(out, picture_endings())
    pictures = [pil_to_tensor(open_image(image).convert('RGB')) for image in args.images]
    detector = from_pretrained(args.model).eval()
    picture = side_by_side([draw_detections(picture, detector) for picture in pictures])
    with tempfile.TemporaryDirectory(dir=out.parent) as tmp:
        to_pil_image(picture).save(Path(tmp, out.name))
        Path(tmp, out.name).replace(out)
