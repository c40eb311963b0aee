"""The README's Python runs as it stands there, from top to bottom, but for the recipes of other test files."""

import copy
import re

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from flops import family, paper_entries
from readme import README, RECIPES, code, sections

from timm_mrla.hub import save_pretrained
from timm_mrla.layers.weights import LightWeights
from timm_mrla.models._registry import BACKBONES


def test_python_blocks(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    save_pretrained(timm.create_model('resnet50_mrla'), tmp_path / 'resnet50_mrla')
    hub.add('user/resnet50_mrla.in1k', tmp_path / 'resnet50_mrla')
    weights = safetensors.torch.save(timm.create_model('resnet50').state_dict())
    hub.commit('timm/resnet50.a1_in1k', {'model.safetensors': weights})
    detector = torchvision.models.get_model('maskrcnn_resnet50_mrla_fpn')
    torch.save({'model': detector.state_dict()}, 'model_11.pth')
    namespace = {}
    blocks = code(README.replace(sections()[RECIPES], ''))
    for block in blocks:
        exec(compile(block, 'README.md', 'exec'), namespace)
    assert len(blocks) >= 5
    assert namespace['c5'].shape == (1, 2048, 15, 20)
    assert namespace['x'].shape == (2, 64, 56, 56)


def test_the_widths_of_kernels():
    """3 up to 127 channels, 5 from 128 to 2047, 7 from 2048 on."""
    for dim in (16, 64, 127, 128, 512, 2047, 2048):
        assert LightWeights(dim, 1).qk.kernel_size == (1, 3 if dim < 128 else 5 if dim < 2048 else 7)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnet50', 'resnet50_mrla'])
def test_what_bfloat16_loses(name):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 224, 224)
    model = timm.create_model(name)
    with torch.no_grad():
        for _ in range(2):  # norms that have seen something
            model.train()(x)
        expected = model.eval()(x)
        error = (copy.deepcopy(model).bfloat16().float()(x) - expected).norm() / expected.norm()
    assert 0.001 < error.item() < 0.01


def test_the_tables():
    """All entries of the paper; each module with its number of entries and of warm starts, and an example."""
    assert sorted(re.findall(r'^\| `(\w+)` \|', README, flags=re.MULTILINE)) == sorted(paper_entries())
    rows = re.findall(r'^\| (\w+) \| (\d+) \| (\d+) \| .* \| `(\w+)` \|', README, flags=re.MULTILINE)
    assert [row[0] for row in sorted(rows)] == sorted({family(name) for name in BACKBONES})
    for module, count, tags, example in rows:
        names = [name for name in timm.list_models('*_mrla', module=module) if name in BACKBONES]
        assert int(count) == len(names)
        assert int(tags) == sum(len(timm.list_pretrained(f'{name}.*')) for name in names)
        assert example in names
    assert f'{len(timm.list_models("*_mrla"))} entries' in README
    assert f'{len(timm.list_pretrained("*_mrla*")):,}.' in README
