"""The README's Python runs as it stands there, from top to bottom, but for the recipes of other test files."""

import re

import timm
import torch
from readme import README, RECIPES, code, sections

import timm_mrla  # noqa: F401


def test_python_blocks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'state_dict': timm.create_model('resnet50_mrla').state_dict()}, 'model_best.pth.tar')
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
