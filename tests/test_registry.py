"""Tests of the registry: `import timm_mrla` adds entries to timm and changes nothing else."""

import subprocess
import sys

import naive
import pytest
import timm
from timm.models import model_entrypoint

import timm_mrla
from timm_mrla.layers import layer_attentions

MODULES = (
    'convnext',
    'davit',
    'deit',
    'edgenext',
    'efficientnet',
    'eva',
    'fastvit',
    'focalnet',
    'inception_next',
    'mambaout',
    'maxxvit',
    'metaformer',
    'mobilenetv3',
    'pvt_v2',
    'regnet',
    'resnet',
    'resnetv2',
    'starnet',
    'swin_transformer',
    'swin_transformer_v2',
    'vision_transformer',
)
PAPER = {
    f'deit_{size}_{kind}patch16_224': f'deit_{size}{"_distilled" if kind else ""}_mrla'
    for size in ('tiny', 'small', 'base')
    for kind in ('', 'distilled_')
}
BASE = {
    **{f'resnet{depth}_mrlab': f'resnet{depth}' for depth in (18, 34, 50, 101, 152)},
    **{f'deit_{size}_mrlab': f'deit_{size}_patch16_224' for size in ('tiny', 'small', 'base')},
    **{f'pvt_v2_b{i}_mrlab': f'pvt_v2_b{i}' for i in range(2)},
}
# not registered, because none of their blocks has a shortcut that keeps the shape
NONE = {
    *(f'lcnet_{width}' for width in ('035', '050', '075', '100', '150')),
    *(f'mobilenetv1_{width}' for width in ('100', '100h', '125')),
    *(f'test_efficientnet{kind}' for kind in ('', '_evos', '_gn', '_ln')),
    'test_maxvit',
}


def stock_entries(module):
    """timm's own entries of a module."""
    return [n for n in timm.list_models(module=module) if model_entrypoint(n).__module__ == f'timm.models.{module}']


def entries(module):
    """Our entries of a module, with the timm entries that they extend."""
    light = {PAPER.get(name, f'{name}_mrla'): name for name in stock_entries(module) if name not in NONE}
    return {**light, **{entry: name for entry, name in BASE.items() if name in light.values()}}


def python(code, *args):
    result = subprocess.run([sys.executable, *args, '-c', code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_entries():
    expected = {name for module in MODULES for name in entries(module)}
    assert set(timm.list_models('*_mrla*')) == expected | {f'ceit_{size}_mrla' for size in ('tiny', 'small', 'base')}
    assert len(expected) > 700
    for module in MODULES:
        assert {*entries(module)} <= {*timm.list_models(module=module)}


def check_entry(entry, stock):
    """It builds, with the parameters and configuration of the stock entry plus the parameters of the equations."""
    deep = {'stem_type': 'deep', 'stem_width': 32} if entry in BASE and 'resnet' in entry else {}
    model, plain = timm.create_model(entry, device='meta'), timm.create_model(stock, device='meta', **deep)
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    assert {k: v for k, v in shapes.items() if '.mrla.' not in k} == {k: v.shape for k, v in plain.state_dict().items()}
    layers = layer_attentions(model)
    if entry not in BASE:
        sites = [site for site in timm_mrla.sites(plain) if not site.reason]
        assert [f'{site.name}.mrla' for site in sites] == [*layers]
    for name, layer in layers.items():
        C, light = len(layer.v.weight), entry not in BASE
        norm = layer.norm_x if layer.form == 'pre' else layer.norm
        norms = sum(p.numel() for p in norm.parameters()) * (2 if light and layer.form == 'pre' else 1)
        assert sum(p.numel() for p in layer.parameters()) == 2 * naive.kernel_size(C) + (9 + light) * C + norms, name
    weights = {'architecture', 'url', 'hf_hub_id', 'hf_hub_filename', 'custom_load', 'tag', 'license', 'description'}
    weights |= {'notes', 'origin_url', *(['first_conv'] if deep else [])}
    ours, theirs = ({k: v for k, v in m.pretrained_cfg.items() if k not in weights} for m in (model, plain))
    assert ours == theirs
    assert model.pretrained_cfg['architecture'] == entry
    assert timm.models.model_entrypoint(entry).__doc__


@pytest.mark.parametrize('module', MODULES)
def test_the_first_entry_of_each_module(module):
    check_entry(*next(iter(entries(module).items())))


@pytest.mark.parametrize('entry', ['resnet18_mrlab', 'deit_tiny_mrlab', 'pvt_v2_b0_mrlab'])
def test_an_entry_of_mrla_base(entry):
    check_entry(entry, BASE[entry])


@pytest.mark.slow
@pytest.mark.parametrize('module', MODULES)
def test_all_entries_of_each_module(module):
    for entry, stock in entries(module).items():
        check_entry(entry, stock)


@pytest.mark.parametrize('name', sorted(NONE))
def test_what_can_have_no_layer_attention_has_no_entry(name):
    assert not timm.is_model(f'{name}_mrla')
    assert all(site.reason for site in timm_mrla.sites(timm.create_model(name, device='meta')))


@pytest.mark.parametrize('name', [f'ceit_{size}_mrla' for size in ('tiny', 'small', 'base')])
def test_every_ceit_builds(name):
    model = timm.create_model(name, num_classes=3, device='meta')
    assert model.num_classes == 3
    assert timm.models.model_entrypoint(name).__doc__


@pytest.mark.slow
def test_names_that_timm_adds_later():
    """A new entry of a module gets layer attention by itself, and its tags are warm starts.

    If its blocks are unknown, it says so when it is created. A name that timm takes stays timm's, weights and all.
    """
    code = """
import sys, types
from timm.models import convnext, generate_default_cfgs, register_model
exec('''
class Unknown(ConvNeXt):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        for stage in self.stages:
            stage.blocks = nn.Identity()
default_cfgs.update(generate_default_cfgs({
    'convnext_new.a_in1k': _cfg(hf_hub_id='timm/', license='mit', crop_pct=0.5),
    'convnext_odd.b': _cfg(),
}))
@register_model
def convnext_new(pretrained=False, **kwargs):
    return _create_convnext('convnext_new', pretrained, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), **kwargs)
@register_model
def convnext_odd(pretrained=False, **kwargs):
    return build_model_with_cfg(Unknown, 'convnext_odd', pretrained, **kwargs)
''', vars(convnext))
module = types.ModuleType('timm.models.future')
sys.modules[module.__name__] = module
def resnet50_mrla(pretrained=False, **kwargs): raise RuntimeError
resnet50_mrla.__module__ = module.__name__
module.default_cfgs = generate_default_cfgs({'resnet50_mrla.a1': {'url': 'https://timm'}})
register_model(resnet50_mrla)

import timm, timm_mrla
print(timm.list_pretrained('convnext_new_mrla*'), timm.create_model('convnext_new_mrla').pretrained_cfg['crop_pct'])
try:
    timm.create_model('convnext_odd_mrla')
except ValueError as e:
    print(e)
assert timm.models.get_pretrained_cfg('resnet50_mrla').url == 'https://timm'
assert timm.models.model_entrypoint('resnet50_mrla') is resnet50_mrla
print(timm.is_model('resnet101_mrla'))
"""
    names, message, others = python(code).splitlines()
    assert names == "['convnext_new_mrla.warmstart_a_in1k'] 0.5"
    assert message.startswith('convnext_odd has no block that can have layer attention')
    assert others == 'True'


def test_importing_adds_names_and_overwrites_none():
    """Also at a second import, where torchvision cannot take detectors. It uses no network, no CUDA, defines no ops."""
    code = """
import importlib, logging, socket, subprocess, sys, timm, torch, torchvision
before = {n: timm.models.model_entrypoint(n) for n in timm.list_models()}
def refuse(*args, **kwargs): raise AssertionError('network')
socket.socket.connect = socket.getaddrinfo = refuse
import timm_mrla
assert all(timm.models.model_entrypoint(n) is fn for n, fn in before.items())
models = timm.list_models()
print(len(before), len(models), torch.cuda.is_initialized(), hasattr(torch.ops.timm_mrla, 'light_post'))

for name in [n for n in sys.modules if n.split('.')[0] == 'timm_mrla']:
    del sys.modules[name]
del torchvision.models._api.register_model
logging.basicConfig(stream=sys.stdout, format='%(name)s %(message).40s')
import timm_mrla
importlib.reload(timm_mrla)
assert timm.list_models() == models
print(timm.create_model('resnet18_mrla', device='meta').num_classes)
"""
    first, warning, second = python(code, '-W', 'error::UserWarning').splitlines()
    before, after, cuda, ops = first.split()
    assert int(after) - int(before) == len(timm.list_models('*_mrla*'))
    assert (cuda, ops, second) == ('False', 'False', '1000')
    assert warning == 'timm_mrla.detection.register the detectors are not in the registry of'


def test_no_weights_are_pretended():
    """The error names the warm starts."""
    starts = ', '.join(timm.list_pretrained('resnet18_mrla.*')[:5])
    with pytest.raises(RuntimeError, match=rf'No pretrained weights exist for resnet18_mrla; .* {starts} and \d+ more'):
        timm.create_model('resnet18_mrla', pretrained=True)
    with pytest.raises(RuntimeError, match='for ceit_tiny_mrla; it has no warm start either'):
        timm.create_model('ceit_tiny_mrla', pretrained=True)


@pytest.mark.parametrize(
    ('name', 'own'),
    [
        ('resnet18_mrla', 'recompute, without'),
        ('vit_tiny_patch16_224_mrla', 'recompute, without'),
        ('deit_tiny_mrlab', 'recompute, stage_depth, without'),
        ('ceit_tiny_mrla', 'recompute'),
    ],
)
def test_an_argument_that_does_not_exist(name, own):
    """The error has the name of the entry, and the arguments that exist."""
    common = [] if name.startswith('ceit') else ['adapter', 'blocks', 'drop_path', 'identity']
    own = ', '.join(f'mrla_{argument}' for argument in [*common, *own.split(', ')])
    message = f'{name} has no argument mrla_block; its arguments of layer attention are {own}'
    with pytest.raises(TypeError, match=f'^{message}$'):
        timm.create_model(name, device='meta', mrla_block='layer4.*')
