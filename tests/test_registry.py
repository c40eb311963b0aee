"""What `import timm_mrla` does to timm's registry, and to nothing else."""

import subprocess
import sys

import pytest
import timm

import timm_mrla  # noqa: F401

ENTRIES = {
    *(f'resnet{depth}_mrla{b}' for depth in (18, 34, 50, 101, 152) for b in ('', 'b')),
    *(f'ceit_{size}_mrla' for size in ('tiny', 'small', 'base')),
    *(f'efficientnet_b{i}_mrla' for i in range(3)),
    *(f'pvt_v2_b{i}_mrla' for i in range(6)),
    *(f'pvt_v2_b{i}_mrlab' for i in range(2)),
    *(f'deit_{size}_{kind}' for size in ('tiny', 'small', 'base') for kind in ('mrla', 'mrlab', 'distilled_mrla')),
}


def python(code, *args):
    result = subprocess.run([sys.executable, *args, '-c', code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_entries():
    assert set(timm.list_models('*_mrla*')) == ENTRIES


@pytest.mark.parametrize('name', sorted(ENTRIES))
def test_every_entry_builds(name):
    model = timm.create_model(name, num_classes=3, device='meta')
    assert model.num_classes == 3
    assert timm.models.model_entrypoint(name).__doc__


def test_importing_adds_names_and_overwrites_none():
    before, after = python("""
import timm
before = {n: timm.models.model_entrypoint(n) for n in timm.list_models()}
import timm_mrla
assert all(timm.models.model_entrypoint(n) is fn for n, fn in before.items())
print(len(before), len(timm.list_models()))
""").split()
    assert int(after) - int(before) == len(ENTRIES)


def test_a_name_that_timm_has_stays_timms():
    """Were timm to add a model of one of our names, its entry would stay, weights and all."""
    assert (
        python("""
import timm, sys, types
from timm.models import register_model, generate_default_cfgs
module = types.ModuleType('timm.models.future')
sys.modules[module.__name__] = module
def resnet50_mrla(pretrained=False, **kwargs): raise RuntimeError
resnet50_mrla.__module__ = module.__name__
module.default_cfgs = generate_default_cfgs({'resnet50_mrla.a1': {'url': 'https://timm'}})
register_model(resnet50_mrla)
import timm_mrla
assert timm.models.get_pretrained_cfg('resnet50_mrla').url == 'https://timm'
assert timm.models.model_entrypoint('resnet50_mrla') is resnet50_mrla
print(timm.is_model('resnet101_mrla'))
""")
        == 'True'
    )


def test_importing_twice_is_safe():
    code = """
import sys, timm, timm_mrla
models = timm.list_models()
for name in [n for n in sys.modules if n.split('.')[0] == 'timm_mrla']:
    del sys.modules[name]
import timm_mrla, importlib
importlib.reload(timm_mrla)
assert timm.list_models() == models
print(timm.create_model('resnet18_mrla', device='meta').num_classes)
"""
    assert python(code, '-W', 'error::UserWarning') == '1000'


def test_importing_touches_neither_network_nor_cuda():
    code = """
import timm, socket, subprocess, torch
def refuse(*args, **kwargs): raise AssertionError('network')
socket.socket.connect = socket.getaddrinfo = refuse
import timm_mrla
print(torch.cuda.is_initialized())
"""
    assert python(code) == 'False'


def test_no_weights_are_pretended():
    with pytest.raises(RuntimeError, match='No pretrained weights exist for resnet18_mrla'):
        timm.create_model('resnet18_mrla', pretrained=True)
