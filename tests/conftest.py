"""Fixtures of several files."""

import huggingface_hub.constants as constants
import pytest
from hub import TOKEN, Hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the Hugging Face Hub, which this process talks to, and others whose environment is `hub.env`."""
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
