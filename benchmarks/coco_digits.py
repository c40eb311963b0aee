"""Makes a data set in COCO format, handwritten digits on photographs: `python benchmarks/coco_digits.py FOLDER`.

It pastes digits of scikit-learn, in random positions, sizes and colours, on photographs of scikit-image and
scikit-learn. Each digit is an object with a box and polygons. A row of small digits is a crowd. Some images have no
object. Training and validation images share no digit and no photograph.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from skimage import color, data, measure, transform, util
from sklearn.datasets import load_digits, load_sample_images

__all__ = ['write_set', 'write_split']

PHOTOGRAPHS = {
    'train': ('coffee', 'astronaut', 'rocket', 'grass', 'camera', 'coins', 'hubble_deep_field', 'china.jpg'),
    'val': ('chelsea', 'brick', 'gravel', 'flower.jpg'),
}
SIZES = ((256, 192), (192, 256), (224, 224))  # height, width
DIGITS = (0, 1, 3, 4, 7)  # training mirrors images, and a 2 would look like a 5
CATEGORIES = [{'id': i, 'name': str(digit), 'supercategory': 'digit'} for i, digit in enumerate(DIGITS, 1)]


def _photographs(split: str) -> list[np.ndarray]:
    """The photographs of a split, [H, W, 3] in [0, 1]."""
    samples = load_sample_images()
    samples = {Path(name).name: image for name, image in zip(samples.filenames, samples.images, strict=True)}
    images = [samples[name] if name in samples else getattr(data, name)() for name in PHOTOGRAPHS[split]]
    return [util.img_as_float(image if image.ndim == 3 else color.gray2rgb(image)) for image in images]


def _background(photographs: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """A random crop of a photograph, [H, W, 3]."""
    photograph, size = photographs[rng.integers(len(photographs))], SIZES[rng.integers(len(SIZES))]
    scale = rng.uniform(0.5, 1) * min(whole / side for whole, side in zip(photograph.shape, size, strict=False))
    height, width = (int(scale * side) for side in size)
    top, left = rng.integers(photograph.shape[0] - height + 1), rng.integers(photograph.shape[1] - width + 1)
    return transform.resize(photograph[top : top + height, left : left + width], size, anti_aliasing=True)


def _paste(image: np.ndarray, scan: np.ndarray, box: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    """Draw a digit into an image, in place. box: top, left, side. Returns its opacity [H, W] in [0, 1]."""
    top, left, side = box
    window = np.s_[top : top + side, left : left + side]
    ink = np.zeros(image.shape[:2])
    ink[window] = np.clip(2 * transform.resize(scan, (side, side), order=3) - 0.5, 0, 1)
    colour = rng.uniform(0, 0.3, 3) if image[window].mean() > 0.5 else rng.uniform(0.7, 1, 3)
    image[:] += ink[..., None] * (colour - image)
    return ink


def _polygons(ink: np.ndarray) -> list[list[float]]:
    """The outlines of a digit as lists (x, y, x, y, ...). As in COCO, holes are filled."""
    contours = [c[:, ::-1] - 0.5 for c in measure.find_contours(np.pad(ink, 1), 0.5)]
    contours = [measure.approximate_polygon(c, 0.25) for c in contours]
    x_y = [(c[:-1], c[1:]) for c in contours if len(c) > 4]
    outer = [a for a, b in x_y if np.sum(a[:, 0] * b[:, 1] - b[:, 0] * a[:, 1]) > 0]  # holes turn the other way
    return [polygon.round(2).flatten().tolist() for polygon in outer]


def write_split(folder: str | Path, split: str, count: int, seed: int) -> None:
    """Write images and annotations into the folder structure of COCO, as torchvision's training script expects it.

    Args:
        folder: Folder of the data set.
        split: 'train' or 'val'.
        count: Number of images.
        seed: Seed of all random choices.
    """
    rng, photographs, digits = np.random.default_rng(seed), _photographs(split), load_digits()
    scans = np.flatnonzero(np.isin(digits.target, DIGITS))
    scans = scans[scans % 5 > 0] if split == 'train' else scans[scans % 5 == 0]
    folder, images, annotations = Path(folder), [], []
    (folder / f'{split}2017').mkdir(parents=True)
    (folder / 'annotations').mkdir(exist_ok=True)
    for image_id in range(1, count + 1):
        image = _background(photographs, rng)
        height, width = image.shape[:2]
        free = np.ones((height, width), bool)
        kinds = [] if rng.random() < 0.05 else ['crowd'] * (rng.random() < 0.1) + ['digit'] * 8
        for kind in kinds:
            number, side = (1, rng.integers(48, 97)) if kind == 'digit' else (6, 24)
            top, left = rng.integers(height - side + 1), rng.integers(width - number * side + 1)
            window = np.s_[top : top + side, left : left + number * side]
            if not free[window].all():
                continue
            free[window] = False
            chosen = rng.choice(scans, number)
            inks = [
                _paste(image, digits.images[scan] / 16, (top, left + i * side, side), rng)
                for i, scan in enumerate(chosen)
            ]
            polygons = [polygon for ink in inks for polygon in _polygons(ink)]
            rle = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
            annotations.append(
                {
                    'id': len(annotations) + 1,
                    'image_id': image_id,
                    'category_id': DIGITS.index(digits.target[chosen[0]]) + 1,
                    'bbox': coco_mask.toBbox(rle).tolist(),
                    'area': float(coco_mask.area(rle)),
                    'iscrowd': int(kind == 'crowd'),
                    'segmentation': {**rle, 'counts': rle['counts'].decode()} if kind == 'crowd' else polygons,
                }
            )
        name = f'{image_id:012}.jpg'
        Image.fromarray(util.img_as_ubyte(image)).save(folder / f'{split}2017' / name, quality=95)
        images.append({'id': image_id, 'file_name': name, 'height': height, 'width': width})
    labels = {'images': images, 'annotations': annotations, 'categories': CATEGORIES}
    (folder / 'annotations' / f'instances_{split}2017.json').write_text(json.dumps(labels))


def write_set(folder: str | Path) -> None:
    """Write 320 images for training and 60 for validation."""
    write_split(folder, 'train', 320, seed=0)
    write_split(folder, 'val', 60, seed=1)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', help='folder to write to, which must not hold such a set yet')
    write_set(parser.parse_args().folder)
