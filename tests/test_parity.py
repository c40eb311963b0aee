"""Logits and gradients of the authors' own models, on the weights and input of tests/reference/README.md."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.utils.model import reparameterize_model

import timm_mrla  # noqa: F401
from timm_mrla.models import ceit, deit, efficientnet, resnet

REFERENCE = Path(__file__).parent / 'reference'
MODELS = {
    'resnet50_mrlal': ('resnet50_mrla', resnet),
    'resnet50_mrlab': ('resnet50_mrlab', resnet),
    'deit_mrlal_tiny_patch16_224': ('deit_tiny_mrla', deit),
    'deit_mrlal_small_patch16_224': ('deit_small_mrla', deit),
    'deit_mrlab_tiny_patch16_224': ('deit_tiny_mrlab', deit),
    'ceit_mrla_tiny_patch16_224': ('ceit_tiny_mrla', ceit),
    'efficientnet_mrla_b0': ('efficientnet_b0_mrla', efficientnet),
}


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
    state_dict = {key: weight(key, shape, spec['gain']) for key, shape in spec['shapes'].items()}
    return spec, state_dict, torch.from_numpy(np.load(REFERENCE / f'{name}.npy'))


@pytest.mark.parametrize('recompute', [False, True])
@pytest.mark.parametrize('name', MODELS)
def test_logits_and_gradients(name, recompute):
    spec, state_dict, logits = reference(name)
    entry, family = MODELS[name]
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

    # the names of the parameters go through the same conversion as the weights did
    ours = {k: p.grad.norm().item() for k, p in model.named_parameters()}
    for key, norm in spec['grad_norm'].items():
        (converted,) = family.checkpoint_filter_fn({key: state_dict[key]}, model)
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
    entry, family = MODELS[name]
    model = timm.create_model(entry, pretrained=True, pretrained_cfg_overlay={source: checkpoint})
    for key, tensor in family.checkpoint_filter_fn(state_dict, model).items():
        assert torch.equal(model.state_dict()[key], tensor)


def test_strict_loading_names_what_does_not_fit():
    _, state_dict, _ = reference('resnet50_mrlal')
    state_dict.pop('layer1.0.mrla.lambda_t')
    with pytest.raises(RuntimeError, match=r'it lacks layer1\.0\.mrla\.lam'):
        timm.create_model('resnet50_mrla', pretrained=True, pretrained_cfg_overlay={'state_dict': state_dict})
    with pytest.raises(RuntimeError, match='the model has no'):
        _, state_dict, _ = reference('resnet50_mrlab')
        timm.create_model('resnet50_mrla', pretrained=True, pretrained_cfg_overlay={'state_dict': state_dict})
