"""Reads the images, and checks the path of the picture, for commands that draw."""

import io
import os
from collections.abc import Container
from pathlib import Path

from PIL import Image


def picture_endings() -> set[str]:
    """Endings of pictures that Pillow writes. It registers more: some formats are only read, or have no colours."""
    picture, endings = Image.new('RGB', (1, 1)), set()
    for ending, kind in Image.registered_extensions().items():
        try:
            picture.save(io.BytesIO(), kind)
        except (OSError, KeyError, ValueError):  # by each format in its own way
            continue
        endings.add(ending)
    return endings


def check_picture_path(path: Path, endings: Container[str]) -> None:
    """Raise ValueError if a path has none of these endings, OSError if it cannot be written."""
    if path.suffix.lower() not in endings:
        raise ValueError(f"{str(path)!r} does not end like a picture; '.png' does")
    if path.is_dir():
        raise IsADirectoryError(f'{str(path)!r} is a folder; name a picture')
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise OSError(f'there is no folder {str(path.parent)!r} that can be written to')


def open_image(path: str) -> Image.Image:
    """Read an image; FileNotFoundError if there is no such file, ValueError if it is no image."""
    try:
        image = Image.open(path)
        image.load()
        return image
    except FileNotFoundError:
        raise FileNotFoundError(f'there is no image {path!r}') from None
    except Exception as e:  # a file may contain anything
        raise ValueError(f'{path!r} is not an image that Pillow reads: {e}') from e
