"""Tests of mrla_recompute: outputs, gradients and running statistics do not change, and memory shrinks."""

import copy
from functools import partial

import pytest
import timm
import torch
from memory import saved_bytes
from slow import slow
from timm.layers import LayerNorm2d
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

import timm_mrla  # noqa: F401
from timm_mrla.layers import MrlaBase, MrlaLight

DIM = 32


def norm_value(*args, dtype, **kwargs):
    """MRLA-light that norms its value, too."""
    layer = MrlaLight(*args, dtype=dtype, **kwargs)
    layer.norm_v = nn.BatchNorm2d(DIM, dtype=dtype)
    return layer


def as_in_ceit(*args, **kwargs):
    """MRLA-light that norms its value and not its shortcut."""
    layer = norm_value(*args, **kwargs)
    layer.norm_o = nn.Identity()
    return layer


TOKENS = {'norm_layer': nn.LayerNorm, 'form': 'pre', 'layout': 'NLC'}
KINDS = {
    'light': partial(MrlaLight, DIM, 8, norm_layer=nn.BatchNorm2d),
    'light with a normed value': partial(norm_value, DIM, 8, norm_layer=LayerNorm2d, form='pre', drop_path=0.5),
    'light, channels last': partial(MrlaLight, DIM, 8, norm_layer=nn.LayerNorm, form='pre', layout='NHWC'),
    'base': partial(MrlaBase, DIM, 8, norm_layer=nn.BatchNorm2d),
    'base, channels last': partial(MrlaBase, DIM, 8, norm_layer=nn.BatchNorm2d, layout='NHWC'),
    'light on tokens': partial(MrlaLight, DIM, 8, **TOKENS),
    'base on tokens': partial(MrlaBase, DIM, 8, **TOKENS),
    'light on tokens with a normed value': partial(as_in_ceit, DIM, 8, **TOKENS),
}
every_kind = pytest.mark.parametrize('kind', KINDS)


class Stage(nn.Module):
    """Three blocks of a kind."""

    def __init__(self, kind, recompute, size, dtype):
        super().__init__()
        self.size = size
        self.mix = nn.ModuleList(nn.Linear(DIM, DIM, dtype=dtype) for _ in range(3))
        self.mrla = nn.ModuleList(KINDS[kind](dtype=dtype) for _ in range(3))
        for mrla in self.mrla:
            mrla.recompute = recompute

    def forward(self, x):
        memory = ()
        for mix, mrla in zip(self.mix, self.mrla, strict=True):
            o = x
            x = mix(x.movedim(1, -1)).movedim(-1, 1).relu() if mrla.layout == 'NCHW' else mix(x).relu()
            if isinstance(mrla, MrlaBase):
                x, memory = mrla(x, memory, self.size)
            else:
                x = mrla(x, o, self.size)
        return x


def outcome(
    kind,
    recompute,
    size=(5, 7),
    batch=2,
    dtype=torch.float64,
    memory_format=torch.contiguous_format,
    amp=False,
    backend=None,
):
    """Output, gradients and buffers of one training step."""
    torch.manual_seed(0)
    stage = Stage(kind, recompute, size, dtype).to(memory_format=memory_format)
    shapes = {'NCHW': (DIM, *size), 'NHWC': (*size, DIM), 'NLC': (2 + size[0] * size[1], DIM)}
    x = torch.randn(batch, *shapes[KINDS[kind].keywords.get('layout', 'NCHW')], dtype=dtype)
    x = (x.to(memory_format=memory_format) if x.ndim == 4 else x).requires_grad_()
    torch._dynamo.reset()
    step = torch.compile(stage, fullgraph=True, backend=backend) if backend else stage
    with torch.autocast('cpu', torch.bfloat16, enabled=amp):
        out = step(x)
    out.square().sum().backward()
    return {'out': out, 'x': x.grad, **{n: p.grad for n, p in stage.named_parameters()}, **dict(stage.named_buffers())}


@pytest.mark.parametrize(
    'case',
    [
        {},
        {'dtype': torch.float32, 'memory_format': torch.channels_last},
        {'dtype': torch.bfloat16},
        {'dtype': torch.float32, 'amp': True, 'memory_format': torch.channels_last},
        {'batch': 1},
        {'size': (1, 2)},
    ],
    ids=['float64', 'channels_last', 'bfloat16', 'autocast', 'one image', 'two positions'],
)
@every_kind
def test_a_step_is_the_same_to_the_last_bit(kind, case):
    saved, recomputed = outcome(kind, False, **case), outcome(kind, True, **case)
    for name in saved:
        assert torch.equal(recomputed[name], saved[name]), name


@pytest.mark.slow
@pytest.mark.parametrize('recompute', [False, True])
@every_kind
def test_a_compiled_step_is_the_same(kind, recompute):
    if 'drop_path' in KINDS[kind].keywords:
        pytest.skip('compiled, other random numbers are drawn')
    expected = outcome(kind, False)
    torch.testing.assert_close(outcome(kind, recompute, backend='aot_eager'), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_a_step_compiled_by_inductor_is_the_same():
    torch.testing.assert_close(outcome('base', True, backend='inductor'), outcome('base', False), rtol=1e-9, atol=1e-9)


TIMM_CHECKPOINTS = ['resnet18_mrla', 'efficientnet_b0_mrla']


def step(name, checkpointing=False, **kwargs):
    torch.manual_seed(0)
    size = {'img_size': 64} if timm.models.get_pretrained_cfg(name).fixed_input_size else {}
    model = timm.create_model(name, num_classes=7, dtype=torch.float64, drop_path_rate=0.1, **size, **kwargs).train()
    model.set_grad_checkpointing(checkpointing)
    model(torch.randn(2, 3, 64, 64, dtype=torch.float64)).square().sum().backward()
    return {n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())


@pytest.mark.parametrize(
    'name',
    [
        *('resnet18_mrlab', 'deit_tiny_mrlab'),
        *map(slow, ('resnet18_mrla', 'efficientnet_b0_mrla', 'ceit_tiny_mrla', 'pvt_v2_b0_mrla')),
    ],
)
def test_models_train_the_same(name):
    """With recomputation, and with gradient checkpointing on top."""
    gradients, buffers = step(name)
    for checkpointing in (False, True):
        recomputed, updated = step(name, checkpointing, mrla_recompute=True)
        torch.testing.assert_close(recomputed, gradients, rtol=1e-10, atol=1e-10)
        if checkpointing and name in TIMM_CHECKPOINTS:
            continue  # updates running statistics twice, as tested below
        torch.testing.assert_close(updated, buffers, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('name', TIMM_CHECKPOINTS)
def test_checkpointing_updates_statistics_as_often_as_those_of_the_block(name):
    _, buffers = step(name, True)
    counts = {n.removesuffix('.num_batches_tracked'): int(t) for n, t in buffers.items() if t.ndim == 0}
    ours = {n: count for n, count in counts.items() if '.mrla.' in n}
    assert ours
    for norm, count in ours.items():
        block = norm.partition('.mrla.')[0]
        assert {count} == {c for n, c in counts.items() if n.startswith(f'{block}.')} == {2}


@pytest.mark.parametrize(
    ('name', 'plain'), [('resnet18_mrla', {}), ('resnet18_mrlab', {'stem_type': 'deep', 'stem_width': 32})]
)
def test_what_is_saved(name, plain):
    """Each block's output; for light also o if no other layer saves it; for base k and v, except the last."""
    x = torch.randn(2, 3, 64, 64)
    model = timm.create_model(name, mrla_recompute=True)
    light, maps = name.endswith('mrla'), []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for i, block in enumerate(stage):
            block.register_forward_hook(lambda block, args, out: maps.append(out if light else out[0]))
            if light and block.downsample is not None:
                block.register_forward_hook(lambda block, args, out: maps.append(out))  # o
            if not light and i < len(stage) - 1:
                block.register_forward_hook(lambda block, args, out: maps.append(out[-1]))  # v
                block.register_forward_hook(lambda block, args, out: maps.append(torch.cat(out[-2:-1] * 2)))  # q, k
    ours = saved_bytes(model, x)
    maps.pop()  # nothing reads the output of the last block again
    assert ours == saved_bytes(timm.create_model('resnet18', **plain), x) + sum(y.nbytes for y in maps)


@pytest.mark.parametrize('impl', CheckpointImpl)
@pytest.mark.parametrize('name', [slow('resnet18_mrla'), 'resnet18_mrlab', slow('pvt_v2_b0_mrlab')])
def test_torchs_own_checkpointing_of_blocks_gives_the_same_gradients(name, impl):
    """Also reentrant checkpointing, which does not see tensors nested in a list."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, dtype=torch.float64)
    wrapped = copy.deepcopy(model)
    wrapper = partial(checkpoint_wrapper, checkpoint_impl=impl)
    apply_activation_checkpointing(wrapped, wrapper, check_fn=lambda module: hasattr(module, 'mrla'))
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    for net in (model, wrapped):
        net(x).square().sum().backward()
    assert any(isinstance(module, CheckpointWrapper) for module in wrapped.modules())
    for expected, actual in zip(model.parameters(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ('name', 'checkpointing'), [('test_resnet_mrla', False), ('resnet18_mrlab', True), slow(('resnet18_mrlab', False))]
)
def test_backward_runs_as_often_as_without(name, checkpointing):
    """Twice through one graph, and through the gradient. Statistics are counted once."""

    def outcome(**kwargs):
        torch.manual_seed(0)
        model = timm.create_model(name, channels=(16, 16, 16, 16), dtype=torch.float64, **kwargs).train()
        model.set_grad_checkpointing(checkpointing and bool(kwargs))
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
        loss = model(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        torch.autograd.grad(loss, x, create_graph=True)[0].square().sum().backward()
        return [x.grad, *(p.grad for p in model.parameters()), *model.buffers()]

    torch.testing.assert_close(outcome(mrla_recompute=not checkpointing), outcome(), rtol=1e-10, atol=1e-10)
