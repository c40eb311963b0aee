"""Tests of logits and gradients against the authors' models, with the data that tests/reference/README.md describes."""

import functools
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from slow import slow, slow_except
from timm.models import save_for_hf
from timm.utils.model import reparameterize_model

import timm_mrla  # noqa: F401
from timm_mrla.models import ceit
from timm_mrla.state_dict import convert_state_dict

REFERENCE = Path(__file__).parent / 'reference'
MODELS = {
    'resnet50_mrlal': 'resnet50_mrla',
    'resnet50_mrlab': 'resnet50_mrlab',
    'deit_mrlal_tiny_patch16_224': 'deit_tiny_mrla',
    'deit_mrlal_small_patch16_224': 'deit_small_mrla',
    'deit_mrlab_tiny_patch16_224': 'deit_tiny_mrlab',
    'ceit_mrla_tiny_patch16_224': 'ceit_tiny_mrla',
    'efficientnet_mrla_b0': 'efficientnet_b0_mrla',
}


@functools.cache
def weight(key, shape, gain):
    n = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    leaf = key.rsplit('.', 1)[-1]
    if leaf == 'num_batches_tracked':
        return torch.tensor(0)
    if leaf == 'running_var':
        n = 1 + 0.2 * abs(n)
    elif leaf == 'running_mean':
        n = 0.1 * n
    elif leaf == 'lambda_t':
        n = 0.5 * n
    elif leaf in ('cls_token', 'pos_embed', 'dist_token', 'pos_layer_embed'):
        n = 0.2 * n
    elif len(shape) >= 2:
        n = gain * n / np.sqrt(np.prod(shape[1:]))
    elif leaf == 'weight':
        n = 1 + 0.1 * n
    else:
        n = 0.1 * n
    return torch.from_numpy(np.asarray(n, dtype=np.float32))


def reference(name):
    """The reference file, the authors' state dict, and the logits."""
    spec = json.loads((REFERENCE / f'{name}.json').read_text())
    state_dict = {key: weight(key, tuple(shape), spec['gain']) for key, shape in spec['shapes'].items()}
    return spec, state_dict, torch.from_numpy(np.load(REFERENCE / f'{name}.npy'))


def convert(entry, state_dict, model):
    """Rename part of an authors' state dict to our names; a separate query or key keeps a name of its own."""
    state_dict = convert_state_dict(state_dict)
    if entry == 'resnet50_mrlab':
        return {re.sub(r'^stages\.(\d)', lambda m: f'layer{int(m[1]) + 1}', k): v for k, v in state_dict.items()}
    return ceit.checkpoint_filter_fn(state_dict, model) if entry.startswith('ceit') else state_dict


@pytest.mark.parametrize('recompute', slow_except([False], [False, True]))
@pytest.mark.parametrize('name', [slow(name) if 'small' in name else name for name in MODELS])
def test_logits_and_gradients(name, recompute):
    spec, state_dict, logits = reference(name)
    entry = MODELS[name]
    overlay = {'state_dict': state_dict}
    model = timm.create_model(entry, pretrained=True, pretrained_cfg_overlay=overlay, mrla_recompute=recompute)
    model = model.double().eval()

    size = spec['input']['size']
    rng = np.random.RandomState(spec['input']['seed'])
    x = torch.from_numpy(rng.standard_normal((spec['input']['batch'], 3, size, size))).requires_grad_()
    out = model(x)
    assert (out - logits).abs().max() < 1e-9 * logits.std()
    with torch.no_grad():
        assert (reparameterize_model(model)(x) - logits).abs().max() < 1e-9 * logits.std()

    rng = np.random.RandomState(spec['input']['seed'] + 1)
    (out * torch.from_numpy(rng.standard_normal(out.shape))).sum().backward()
    assert x.grad.norm().item() == pytest.approx(spec['input_grad_norm'], rel=1e-7)

    # convert the names of the parameters in the same way as the weights
    ours = {}
    for key, p in model.named_parameters():
        if key.endswith('.attn.qk.weight'):  # two parameters in the authors' model
            parts = {key.replace('.qk.', '.q.'): p.grad[0], key.replace('.qk.', '.k.'): p.grad[1]}
        else:
            parts = {key: p.grad}
        ours.update({k: grad.norm().item() for k, grad in parts.items()})
    assert '.mrla.attn.q.weight' in ' '.join(ours)
    for key, norm in spec['grad_norm'].items():
        (converted,) = convert(entry, {key: state_dict[key]}, model)
        assert ours.pop(converted) == pytest.approx(norm, rel=1e-7, abs=1e-12), key
    assert not ours


@pytest.mark.parametrize(
    ('name', 'wrapper', 'source'),
    [
        ('resnet50_mrlal', 'state_dict', 'file'),
        ('resnet50_mrlab', 'state_dict', 'state_dict'),
        ('deit_mrlal_tiny_patch16_224', 'model', 'file'),
        ('deit_mrlab_tiny_patch16_224', 'state_dict', 'state_dict'),
        ('ceit_mrla_tiny_patch16_224', 'model', 'state_dict'),
        ('efficientnet_mrla_b0', 'state_dict', 'file'),
    ],
)
def test_checkpoints_of_the_authors_load_as_they_were_saved(name, wrapper, source, tmp_path):
    """Wrapped, with the prefix of DistributedDataParallel, an optimizer and an epoch beside the weights."""
    _, state_dict, _ = reference(name)
    checkpoint = {wrapper: {f'module.{k}': v for k, v in state_dict.items()}, 'optimizer': {'state': {}}, 'epoch': 99}
    if source == 'file':
        torch.save(checkpoint, tmp_path / 'checkpoint.pth')
        checkpoint = str(tmp_path / 'checkpoint.pth')
    entry = MODELS[name]
    model = timm.create_model(entry, pretrained=True, pretrained_cfg_overlay={source: checkpoint})
    expected = convert(entry, state_dict, model)
    loaded = model.state_dict()
    assert loaded.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(loaded[key], tensor), key


@pytest.mark.parametrize('name', ['resnet50_mrlal', 'deit_mrlab_tiny_patch16_224'])
def test_queries_come_before_keys(name):
    """Swapped, they would give MRLA-light the same gate and logits, so the names are tested."""
    _, state_dict, _ = reference(name)
    model = timm.create_model(MODELS[name], pretrained=True, pretrained_cfg_overlay={'state_dict': state_dict})
    queries = [key for key in state_dict if '.Wq.' in key]
    assert queries
    for key in queries:
        query, both = state_dict[key], re.sub(r'\.(mrla|mla)\.Wq\.', '.attn.qk.', key)
        weight = model.get_parameter(both)
        assert torch.equal(weight[0], query) and torch.equal(weight[1], state_dict[key.replace('Wq', 'Wk')])


@pytest.mark.parametrize('source', ['folder', 'state_dict', 'file'])
@pytest.mark.parametrize('name', ['resnet18_mrla', 'resnet18_mrlab', 'deit_tiny_mrlab', 'ceit_tiny_mrla'])
def test_weights_of_the_previous_version_load(name, source, tmp_path):
    """Query and key had separate 1-d convolutions."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5)
    old = {}
    for key, tensor in model.state_dict().items():
        if key.endswith('.mrla.attn.qk.weight'):
            q, k = tensor[:, :, 0].split(1)  # [1, 1, K]
            old.update({key.replace('.qk.', '.q.'): q.clone(), key.replace('.qk.', '.k.'): k.clone()})
        else:
            old[key] = tensor
    assert len(old) > len(model.state_dict())
    if source == 'folder':
        save_for_hf(model, tmp_path, safe_serialization=True)
        assert load_file(tmp_path / 'model.safetensors').keys() == model.state_dict().keys()
        save_file(old, tmp_path / 'model.safetensors')
        loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    else:
        if source == 'file':
            torch.save({'state_dict': old}, tmp_path / 'last.pth.tar')
        overlay = {source: old if source == 'state_dict' else str(tmp_path / 'last.pth.tar')}
        loaded = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5)
    loaded = loaded.state_dict()
    assert loaded.keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        if not key.startswith(('head.', 'fc.')) or source == 'folder':  # timm creates a new head for new classes
            assert torch.equal(loaded[key], tensor), key


def test_strict_loading_names_what_does_not_fit():
    _, state_dict, _ = reference('resnet50_mrlal')
    state_dict.pop('layer1.0.mrla.lambda_t')
    with pytest.raises(RuntimeError, match=r'it lacks layer1\.0\.mrla\.lam'):
        timm.create_model('resnet50_mrla', pretrained=True, pretrained_cfg_overlay={'state_dict': state_dict})
    with pytest.raises(RuntimeError, match='the model has no'):
        _, state_dict, _ = reference('resnet50_mrlab')
        timm.create_model('resnet50_mrla', pretrained=True, pretrained_cfg_overlay={'state_dict': state_dict})
