"""What test files share."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope='session')
def images(tmp_path_factory):
    """An ImageFolder of two classes, red and blue noise."""
    root = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for split, count in (('train', 8), ('val', 4)):
        for channel, name in ((0, 'red'), (2, 'blue')):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, (64, 64, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(folder / f'{i}.jpg')
    return root
