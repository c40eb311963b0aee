"""Reads the documentation, README.md and docs/*.md: code blocks by heading and language, command lines."""

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md')))
}
README = PAGES['README.md']
LINKED = {**PAGES, 'benchmarks/README.md': (ROOT / 'benchmarks' / 'README.md').read_text()}
# pages whose Python needs the extra `downstream`: each heading has one independent recipe
RECIPES = ('docs/other-libraries.md', 'docs/export.md')

_FENCE = re.compile(r'^```(\w*)\n(.*?)^```$', flags=re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    """A text without its code blocks."""
    return _FENCE.sub('', text)


def sections(page: str, level: str = '##') -> dict[str, str]:
    """The text under each heading of a level, up to the next heading of this level or above."""
    parts = re.split(rf'^(##{{1,{len(level) - 1}}}) (.*)$', PAGES[page], flags=re.MULTILINE)
    found = zip(parts[1::3], parts[2::3], parts[3::3], strict=True)
    return {heading: text for hashes, heading, text in found if hashes == level}


def blocks(text: str) -> list[tuple[str, str]]:
    """The code blocks of a text in their order: language, code."""
    return _FENCE.findall(text)


def code(text: str, language: str = 'python') -> list[str]:
    """The code blocks of a text in one language."""
    return [source for found, source in blocks(text) if found == language]


def recipe_source(heading: str, changes: dict[str, str] | None = None) -> str:
    """The code of the recipe under a heading, after replacements in its text."""
    (section,) = (sections(page)[heading] for page in RECIPES if heading in sections(page))
    (source,) = code(section)
    for old, new in (changes or {}).items():
        assert old in source
        source = source.replace(old, new)
    return source


def recipe(heading: str, changes: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a recipe after replacements in its text, and return its variables."""
    names = {}
    exec(compile(recipe_source(heading, changes), f'recipe {heading}', 'exec'), names)
    return names


def commands(source: str) -> Iterator[list[str]]:
    """The command lines of a shell block as words, in their order."""
    line = ''
    for part in source.replace('\\\n', ' ').splitlines():
        line += part
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a quoted word continues on the next line
            line += '\n'
            continue
        line, command = '', []
        for word in [*words, '&&']:
            if word != '&&':
                command.append(word)
            elif command:
                yield command
                command = []
    assert not line


COMMANDS = [(page, line) for page, text in LINKED.items() for block in code(text, 'bash') for line in commands(block)]


class _Accepted(Exception):
    """Raised when a parser has accepted the command line."""


def assert_accepted(argv: list[str], run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Assert that the parser of a script, started by run(), accepts the arguments; the script then stops."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(*args, **kwargs):
        original(*args, **kwargs)
        raise _Accepted

    monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', parse_args)
    monkeypatch.setattr(sys, 'argv', argv)
    with pytest.raises(_Accepted):
        run()
