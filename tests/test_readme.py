"""The README's Python runs as it stands there, from top to bottom, but for the recipes of other test files."""

import re

import safetensors.torch
import timm
from readme import README, RECIPES, code, sections

from timm_mrla.hub import save_pretrained


def test_python_blocks(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    save_pretrained(timm.create_model('resnet50_mrla'), tmp_path / 'resnet50_mrla')
    hub.add('user/resnet50_mrla.in1k', tmp_path / 'resnet50_mrla')
    weights = safetensors.torch.save(timm.create_model('resnet50').state_dict())
    hub.commit('timm/resnet50.a1_in1k', {'model.safetensors': weights})
    namespace = {}
    blocks = code(README.replace(sections()[RECIPES], ''))
    for block in blocks:
        exec(compile(block, 'README.md', 'exec'), namespace)
    assert len(blocks) >= 5
    assert namespace['c5'].shape == (1, 2048, 15, 20)
    assert namespace['x'].shape == (2, 64, 56, 56)


def test_every_entry_is_in_the_table():
    table = re.findall(r'^\| `(\w+)` \|', README, flags=re.MULTILINE)
    assert sorted(table) == sorted(timm.list_models('*_mrla*'))
