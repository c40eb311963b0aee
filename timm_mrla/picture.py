"""Images from files, and pictures of what a detector finds in them."""

import math
import os
import tempfile
from collections.abc import Container
from pathlib import Path

import torch
from PIL import Image
from torch.nn.functional import pad
from torchvision.transforms.functional import convert_image_dtype, pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

from timm_mrla.detection import from_pretrained

__all__ = ['check_picture', 'detect', 'open_image']

MIN_SCORE = 0.5  # of what is drawn
COLOURS = ('yellow', 'cyan', 'orange', 'lime', 'violet')  # of the classes, in turns; black letters are read on them


def check_picture(path: Path, endings: Container[str]) -> None:
    """Raises ValueError if a path has none of these endings, OSError if it cannot be written."""
    if path.suffix.lower() not in endings:
        raise ValueError(f"{str(path)!r} does not end like a picture; '.png' does")
    if path.is_dir():
        raise IsADirectoryError(f'{str(path)!r} is a folder; name a picture')
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise OSError(f'there is no folder {str(path.parent)!r} that can be written to')


def open_image(path: str) -> Image.Image:
    """Read an image; FileNotFoundError or ValueError if there is none."""
    try:
        image = Image.open(path)
        image.load()
        return image
    except FileNotFoundError:
        raise FileNotFoundError(f'there is no image {path!r}') from None
    except Exception as e:  # whatever a file may hold
        raise ValueError(f'{path!r} is not an image that Pillow reads: {e}') from e


def detect(model: str, images: list[str], out: str) -> None:
    """Draw what a detector finds in images, side by side: boxes, masks if it has them, names and scores.

    Args:
        model: What `timm_mrla.detection.from_pretrained` takes.
        images: Paths of images.
        out: Path of the picture; its ending says which of Pillow's formats it has.

    Raises:
        ValueError: There is no such detector, or a file is not what it should be.
        OSError: There is no such file, or the picture cannot be written.
    """
    out = Path(out)
    check_picture(out, Image.registered_extensions())
    pictures = [pil_to_tensor(open_image(image).convert('RGB')) for image in images]
    detector = from_pretrained(model).eval()
    names = {category['id']: category['name'] for category in detector.config.get('categories', [])}
    for i, picture in enumerate(pictures):
        with torch.inference_mode():
            (found,) = detector([convert_image_dtype(picture)])
        found = {key: value[found['scores'] > MIN_SCORE] for key, value in found.items()}
        classes = found['labels'].tolist()
        if not classes:
            continue
        colours = [COLOURS[label % len(COLOURS)] for label in classes]
        if 'masks' in found:
            picture = draw_segmentation_masks(picture, found['masks'][:, 0] > 0.5, alpha=0.5, colors=colours)
        scores = zip(classes, found['scores'].tolist(), strict=True)
        labels = [f'{names.get(label, label)}: {score:.2f}' for label, score in scores]
        pictures[i] = draw_bounding_boxes(picture, found['boxes'], labels, colours, width=2, fill_labels=True)
    height, width = (max(picture.shape[i] for picture in pictures) for i in (1, 2))
    padded = [pad(picture, (0, width - picture.shape[2], 0, height - picture.shape[1])) for picture in pictures]
    grid = make_grid(padded, nrow=math.ceil(math.sqrt(len(padded))))
    with tempfile.TemporaryDirectory(dir=out.parent) as tmp:
        to_pil_image(grid).save(Path(tmp, out.name))
        Path(tmp, out.name).replace(out)
