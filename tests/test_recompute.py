"""What is recomputed in backward is what would have been saved: outputs, gradients and running statistics."""

from functools import partial

import pytest
import timm
import torch
from memory import saved_bytes
from torch import nn

import timm_mrla  # noqa: F401
from timm_mrla.layers import MrlaBase, MrlaBaseTokens, MrlaLight, MrlaLightTokens

DIM = 32
KINDS = {
    'light': partial(MrlaLight, DIM, 8, norm_layer=nn.BatchNorm2d),
    'light with a normed value': partial(MrlaLight, DIM, 8, norm_v=nn.BatchNorm2d, act_v=nn.GELU, drop_path=0.5),
    'base': partial(MrlaBase, DIM, 8, norm_layer=nn.BatchNorm2d, act_layer=partial(nn.ReLU, inplace=True)),
    'light on tokens': partial(MrlaLightTokens, DIM, 8, nn.LayerNorm, nn.LayerNorm, act_v=nn.GELU),
    'base on tokens': partial(MrlaBaseTokens, DIM, 8, nn.LayerNorm),
}
every_kind = pytest.mark.parametrize('kind', KINDS)


class Stage(nn.Module):
    """Three blocks with a memory."""

    def __init__(self, kind, recompute, size, dtype):
        super().__init__()
        self.grid = [size] if 'tokens' in kind else []
        self.mix = nn.ModuleList(nn.Linear(DIM, DIM, dtype=dtype) for _ in range(3))
        self.mrla = nn.ModuleList(KINDS[kind](dtype=dtype) for _ in range(3))
        for mrla in self.mrla:
            mrla.recompute = recompute

    def forward(self, x):
        memory = []
        for mix, mrla in zip(self.mix, self.mrla, strict=True):
            o = x
            x = mix(x).relu() if self.grid else mix(x.movedim(1, -1)).movedim(-1, 1).relu()
            x, memory = mrla(x, o, *self.grid, memory)
        return x


def outcome(
    kind, recompute, size=(5, 7), batch=2, dtype=torch.float64, layout=torch.contiguous_format, amp=False, backend=None
):
    """Output, gradients and buffers of one training step."""
    torch.manual_seed(0)
    stage = Stage(kind, recompute, size, dtype).to(memory_format=layout)
    if 'tokens' in kind:
        x = torch.randn(batch, 2 + size[0] * size[1], DIM, dtype=dtype)
    else:
        x = torch.randn(batch, DIM, *size, dtype=dtype).to(memory_format=layout)
    x.requires_grad_()
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
        {'dtype': torch.float32, 'layout': torch.channels_last},
        {'dtype': torch.bfloat16},
        {'dtype': torch.float32, 'amp': True, 'layout': torch.channels_last},
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


@pytest.mark.parametrize('recompute', [False, True])
@every_kind
def test_a_compiled_step_is_the_same(kind, recompute):
    if 'drop_path' in KINDS[kind].keywords:
        pytest.skip('compiled, other random numbers are drawn')
    expected = outcome(kind, False)
    torch.testing.assert_close(outcome(kind, recompute, backend='aot_eager'), expected, rtol=1e-10, atol=1e-10)


def test_a_step_compiled_by_inductor_is_the_same():
    torch.testing.assert_close(outcome('base', True, backend='inductor'), outcome('base', False), rtol=1e-9, atol=1e-9)


def step(name, checkpointing=False, **kwargs):
    torch.manual_seed(0)
    size = {'img_size': 64} if timm.models.get_pretrained_cfg(name).fixed_input_size else {}
    model = timm.create_model(name, num_classes=7, dtype=torch.float64, drop_path_rate=0.1, **size, **kwargs).train()
    model.set_grad_checkpointing(checkpointing)
    model(torch.randn(2, 3, 64, 64, dtype=torch.float64)).square().sum().backward()
    return {n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())


@pytest.mark.parametrize(
    'name',
    ['resnet18_mrla', 'resnet18_mrlab', 'efficientnet_b0_mrla', 'deit_tiny_mrlab', 'ceit_tiny_mrla', 'pvt_v2_b0_mrla'],
)
def test_models_train_the_same(name):
    """With recomputation, and with gradient checkpointing on top."""
    gradients, buffers = step(name)
    for checkpointing in (False, True):
        recomputed, updated = step(name, checkpointing, mrla_recompute=True)
        torch.testing.assert_close(recomputed, gradients, rtol=1e-10, atol=1e-10)
        if checkpointing and name.startswith('efficientnet'):
            continue  # it is timm that checkpoints this one, and so updates running statistics twice
        torch.testing.assert_close(updated, buffers, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ('name', 'plain'), [('resnet18_mrla', {}), ('resnet18_mrlab', {'stem_type': 'deep', 'stem_width': 32})]
)
def test_what_is_saved(name, plain):
    """One map a block, its output; light's o where no other layer saves it; base's k and v but the last."""
    x = torch.randn(2, 3, 64, 64)
    model = timm.create_model(name, mrla_recompute=True)
    light, maps = name.endswith('mrla'), []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for i, block in enumerate(stage):
            block.register_forward_hook(lambda block, args, out: maps.append(out[0]))
            if block.downsample is not None if light else i < len(stage) - 1:
                block.register_forward_hook(lambda block, args, out: maps.append(out[0]))  # o, or v and below q and k
                if not light:
                    block.register_forward_hook(lambda block, args, out: maps.append(out[0][:, :, :2, 0].clone()))
    ours = saved_bytes(model, x)
    maps.pop()  # nothing reads the output of the last block again
    assert ours == saved_bytes(timm.create_model('resnet18', **plain), x) + sum(y.nbytes for y in maps)
