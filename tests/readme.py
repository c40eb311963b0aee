"""The README's code, by heading and language."""

import re
from pathlib import Path
from typing import Any

README = (Path(__file__).parent.parent / 'README.md').read_text()
RECIPES = 'Segmentation, transformers, fastai, export'


def sections(text: str = README, level: str = '##') -> dict[str, str]:
    """What stands under each heading of this level."""
    parts = re.split(rf'^{level} (.*)$', text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def code(text: str, language: str = 'python') -> list[str]:
    """The code blocks of a text."""
    return re.findall(rf'^```{language}\n(.*?)^```', text, flags=re.DOTALL | re.MULTILINE)


def recipe(heading: str, changes: dict[str, str] | None = None) -> dict[str, Any]:
    """Run one of the recipes that need the extra, with some of its text changed, and return its names."""
    (source,) = code(sections(sections()[RECIPES], '###')[heading])
    for old, new in (changes or {}).items():
        assert old in source
        source = source.replace(old, new)
    names = {}
    exec(compile(source, f'README.md, {heading}', 'exec'), names)
    return names
