"""Fixtures and settings for all test files."""

import gc
import os
import shlex
import sys

os.environ.setdefault('OMP_NUM_THREADS', '1')  # before torch is imported; tests run in two processes

import huggingface_hub.constants as constants
import numpy as np
import pytest
from hub import TOKEN, Hub
from PIL import Image
from readme import ROOT


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A local Hugging Face Hub for this process, and for child processes with the environment `hub.env`."""
    hub = Hub()
    hub.cache = tmp_path / 'cache'
    monkeypatch.setattr(constants, 'ENDPOINT', hub.url)
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', hub.url + '/{repo_id}/resolve/{revision}/{filename}')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(hub.cache))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    hub.env = dict(HF_ENDPOINT=hub.url, HF_HUB_CACHE=str(hub.cache), HF_HUB_DISABLE_XET='1', HF_HUB_OFFLINE='0')
    yield hub
    hub.close()


@pytest.fixture
def command_on_path(tmp_path, monkeypatch):
    """`timm-mrla` in a shell runs this checkout."""
    folder = tmp_path / 'bin'
    folder.mkdir()
    (folder / 'timm-mrla').write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m timm_mrla "$@"\n')
    (folder / 'timm-mrla').chmod(0o755)
    monkeypatch.setenv('PATH', str(folder), prepend=os.pathsep)
    monkeypatch.setenv('PYTHONPATH', str(ROOT), prepend=os.pathsep)


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


def pytest_collection_modifyitems(items):
    """Run the slowest files first: otherwise one process waits for the other at the end."""
    longest = [
        f'test_{name}.py' for name in ('fused', 'timm', 'models', 'contract', 'fused_base', 'registry', 'launcher')
    ]
    items.sort(key=lambda item: longest.index(item.path.name) if item.path.name in longest else len(longest))


def pytest_collection_finish():
    """Exclude imported objects from garbage collection, which would take a sixth of the tests' time."""
    gc.collect()
    gc.freeze()
