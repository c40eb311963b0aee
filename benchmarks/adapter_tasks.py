"""Small tasks for adapters: counting and turning made of Fashion-MNIST, solar cells, and clip art by subject.

Each has 1,000 training images.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from data import Images, read_elpv, read_fashion_mnist, split
from PIL import Image
from sklearn.model_selection import StratifiedGroupKFold

CLIPART = Path('/usr/share/openclipart/png')
SUBJECTS = ('animals', 'buildings', 'food', 'office', 'people', 'plants', 'tools', 'transportation')


class Task(NamedTuple):
    """Images [N, 3, H, W] between 0 and 1 and their classes [N], for training and for testing."""

    x: torch.Tensor
    y: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor


def count(images: torch.Tensor, size: int, rng: torch.Generator) -> tuple[torch.Tensor, int]:
    """One to six garments in the cells of a 3 x 3 grid; the class is their number."""
    number, side, canvas = int(torch.randint(1, 7, (), generator=rng)), size // 3, torch.zeros(1, size, size)
    for cell in torch.randperm(9, generator=rng)[:number].tolist():
        image = images[torch.randint(len(images), (1,), generator=rng)]
        row, column = (side * i for i in divmod(cell, 3))
        canvas[:, row : row + side, column : column + side] = F.interpolate(image, (side, side), mode='bilinear')[0]
    return canvas, number - 1


def turn(images: torch.Tensor, size: int, rng: torch.Generator) -> tuple[torch.Tensor, int]:
    """A garment turned by a multiple of 30 degrees; the class is the angle."""
    image = images[torch.randint(len(images), (1,), generator=rng)]
    step = int(torch.randint(12, (), generator=rng))
    cos, sin = (1.35 * fn(step * math.pi / 6) for fn in (math.cos, math.sin))  # 1.35: the corners stay inside
    grid = F.affine_grid(torch.tensor([[[cos, -sin, 0], [sin, cos, 0]]]), (1, 1, size, size), align_corners=False)
    return F.grid_sample(image, grid, align_corners=False)[0], step


def made_of_fashion_mnist(make: Callable[..., tuple[torch.Tensor, int]], size: int) -> Task:
    """Make the images of a task from the two parts of Fashion-MNIST."""
    rng, parts = torch.Generator().manual_seed(7), []
    for part in ('train', 't10k'):
        images = torch.from_numpy(read_fashion_mnist(part)[0].copy())[:, None].float() / 255
        x, y = zip(*(make(images, size, rng) for _ in range(1000)), strict=True)
        parts += [torch.stack(x).expand(-1, 3, -1, -1), torch.tensor(y)]
    return Task(*parts)


def of_pictures(train: Images, test: Images, size: int) -> Task:
    """Resize pictures, grey or in colour, and number their classes."""
    parts, classes = [], sorted({*train[1]})
    for pictures, labels in (train, test):
        resized = [Image.fromarray(p).convert('RGB').resize((size, size), Image.Resampling.LANCZOS) for p in pictures]
        x = torch.from_numpy(np.stack([np.asarray(picture) for picture in resized])).permute(0, 3, 1, 2).float() / 255
        parts += [x, torch.tensor([classes.index(label) for label in labels])]
    return Task(*parts)


def elpv(size: int) -> Task:
    """Solar cells, defective or not."""
    rest, test = split(read_elpv(), 0.25)
    return of_pictures(split(rest, len(rest[1]) - 1000)[0], test, size)


def clipart(size: int) -> Task:
    """Clip art of eight subjects, on white; no artist is in both parts."""
    Image.MAX_IMAGE_PIXELS = None  # opening reads only the size, and large pictures are left out
    pictures, subjects, artists, side = [], [], [], 2 * size
    for subject in SUBJECTS:
        for path in sorted((CLIPART / subject).rglob('*.png')):
            picture = Image.open(path)
            if math.prod(picture.size) > 4_000_000:
                continue
            artists.append(picture.info.get('Author', ''))
            picture = picture.convert('RGBA')
            picture.thumbnail((side, side))
            square = Image.new('RGBA', (side, side), 'white')
            square.alpha_composite(picture, tuple((side - own) // 2 for own in picture.size))
            pictures.append(np.asarray(square.convert('RGB')))
            subjects.append(subject)
    pictures, subjects = np.stack(pictures), np.array(subjects)
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0).split(pictures, subjects, artists)
    parts = [test for _, test in folds]
    train = np.concatenate(parts[:3])
    return of_pictures(
        split((pictures[train], subjects[train]), len(train) - 1000)[0],
        (pictures[np.concatenate(parts[3:])], subjects[np.concatenate(parts[3:])]),
        size,
    )


TASKS: dict[str, Callable[[int], Task]] = {  # by the size of the images in pixels
    'count': partial(made_of_fashion_mnist, count),
    'turn': partial(made_of_fashion_mnist, turn),
    'elpv': elpv,
    'clipart': clipart,
}
