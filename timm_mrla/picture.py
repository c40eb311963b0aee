"""Images from files, and where a picture may go."""

from collections.abc import Container
from pathlib import Path

from PIL import Image

__all__ = ['check_picture', 'open_image']


def check_picture(path: Path, endings: Container[str]) -> None:
    """Raises ValueError if a path has none of these endings, FileNotFoundError if its folder is not there."""
    if path.suffix.lower() not in endings:
        raise ValueError(f"{str(path)!r} does not end like a picture; '.png' does")
    if not path.parent.is_dir():
        raise FileNotFoundError(f'there is no folder {str(path.parent)!r} to write to')


def open_image(path: str, mode: str = 'RGB') -> Image.Image:
    """Open an image; FileNotFoundError or ValueError if there is none."""
    try:
        return Image.open(path).convert(mode)
    except FileNotFoundError:
        raise FileNotFoundError(f'there is no image {path!r}') from None
    except OSError as e:
        raise ValueError(f'{path!r} is not an image that Pillow reads') from e
