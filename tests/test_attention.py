"""Tests of the inspection of layer attention: its weights against the equations, and the command that draws them."""

import math
import subprocess
import sys

import naive
import numpy as np
import pytest
import timm
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from slow import slow_except
from timm.models import save_for_hf
from timm.utils import ModelEmaV3
from timm.utils.model import reparameterize_model
from torch import nn

from timm_mrla import attach, feature_maps, layer_attention, output_scales
from timm_mrla.cli import main
from timm_mrla.layers import MrlaBase, MrlaLight, to_map
from timm_mrla.plot import plot_attention, plot_feature_maps

BASE = ['resnet18_mrlab', 'pvt_v2_b0_mrlab', 'deit_tiny_mrlab']
LIGHT = [
    'resnet18_mrla',
    'pvt_v2_b0_mrla',
    'deit_tiny_mrla',
    'ceit_tiny_mrla',
    'efficientnet_b0_mrla',
    'swin_tiny_patch4_window7_224_mrla',
]
every = pytest.mark.parametrize('name', BASE + LIGHT)


def create(name, **kwargs):
    """A small model with random norm statistics."""
    torch.manual_seed(0)
    if name.startswith(('deit', 'ceit')):
        kwargs = {'img_size': (48, 64), 'depth': 6, 'embed_dim': 64, 'num_heads': 2, **kwargs}
    elif name.startswith('swin'):
        kwargs = {'img_size': (48, 64), 'depths': (2, 3), 'embed_dim': 32, 'num_heads': (2, 4), **kwargs}
    elif name.startswith('resnet'):
        kwargs = {'channels': (32, 32, 64, 64), 'layers': (2, 3, 1, 2), **kwargs}
    return timm.create_model(name, **{'dtype': torch.float64, 'num_classes': 7, **kwargs}).eval()


def averaged(model):
    return ModelEmaV3(model).eval()


def images(batch=2):
    return torch.randn(batch, 3, 48, 64, dtype=torch.float64)


def inputs(model, x):
    """The input of each `mrla.attn`, by module name, in the order of the blocks."""
    seen, hooks = {}, []
    for name, module in model.named_modules():
        if name.endswith('.mrla.attn'):
            hooks.append(module.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0]})))
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize('name', BASE)
@torch.no_grad()
def test_base_is_the_softmax(name):
    model, x = create(name), images()
    attention, seen = layer_attention(model, x), inputs(model, x)
    assert [f'{block}.mrla.attn' for blocks in attention.blocks.values() for block in blocks] == [*seen]
    for stage, weights in attention.items():
        attns = [model.get_submodule(f'{block}.mrla.attn') for block in attention.blocks[stage]]
        maps = [seen[f'{block}.mrla.attn'] for block in attention.blocks[stage]]
        d = maps[0].shape[1] // attns[0].num_heads
        assert weights.shape == (2, attns[0].num_heads, len(attns), len(attns))
        assert attention.heads[stage] == weights.shape[1]
        assert torch.equal(weights, weights.tril())
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        for i in range(2):
            keys = [naive.key(attn, y[i]) for attn, y in zip(attns, maps, strict=True)]
            for t, attn in enumerate(attns):
                for h, q in enumerate(naive.query(attn, maps[t][i])):
                    scores = [math.exp(naive.dot(q, keys[s][h]) / math.sqrt(d)) for s in range(t + 1)]
                    expected = torch.tensor(scores, dtype=torch.float64) / sum(scores)
                    torch.testing.assert_close(weights[i, h, t, : t + 1], expected)


@pytest.mark.parametrize('name', LIGHT)
@torch.no_grad()
def test_light_is_gates_times_products_of_lam(name):
    model, x = create(name), images()
    attention, seen = layer_attention(model, x), inputs(model, x)
    assert [f'{block}.mrla.attn' for blocks in attention.blocks.values() for block in blocks] == [*seen]
    for stage, weights in attention.items():
        mrlas = [model.get_submodule(f'{block}.mrla') for block in attention.blocks[stage]]
        maps = [seen[f'{block}.mrla.attn'] for block in attention.blocks[stage]]
        h, C = mrlas[0].attn.num_heads, maps[0].shape[1]
        d = C // h
        assert weights.shape == (2, C, len(mrlas), len(mrlas))
        assert attention.heads[stage] == h
        assert torch.equal(weights, weights.tril())
        for i in range(2):
            for s, mrla in enumerate(mrlas):
                q, k = naive.query(mrla.attn, maps[s][i]), naive.key(mrla.attn, maps[s][i])
                for c in range(C):
                    gate = 1 / (1 + math.exp(-naive.dot(q[c // d], k[c // d]) / math.sqrt(d)))
                    for t in range(s, len(mrlas)):
                        expected = gate * math.prod(mrlas[r].lam[c].item() for r in range(s + 1, t + 1))
                        assert weights[i, c, t, s].item() == pytest.approx(expected, rel=1e-9)


class Recursion(nn.Module):
    """MRLA-light whose shortcut is only its own last result, as the paper unrolls it."""

    def __init__(self, depth):
        super().__init__()
        self.blocks = nn.ModuleList(MrlaLight(8, 4, nn.Identity, 'pre') for _ in range(depth))
        for mrla in self.blocks:
            mrla.norm_v = nn.BatchNorm2d(8)

    def forward(self, x):
        o = x[:, :8]
        for mrla, y in zip(self.blocks, x.unflatten(1, (-1, 8)).unbind(1), strict=True):
            o = mrla(y, o) - y
        return o


@pytest.mark.parametrize('zero', [False, True])
def test_light_weights_rebuild_what_the_recursion_retrieves(zero):
    """m_t = sum_s W[t, s] v_s + (lam_0 ... lam_t) o_0, also where a block's lam is zero."""
    torch.manual_seed(0)
    model = Recursion(5).double().eval()
    if zero:
        nn.init.zeros_(model.blocks[2].lam)
    x = torch.randn(2, 40, 6, 5, dtype=torch.float64)
    attention = layer_attention(model, x)
    assert attention.blocks == {'blocks': [f'blocks.{t}' for t in range(5)]}
    weights = attention['blocks']
    with torch.no_grad():
        values = [
            m.act_v(m.norm_v(m.v(y))) for m, y in zip(model.blocks, x.unflatten(1, (-1, 8)).unbind(1), strict=True)
        ]
        expected = model(x)
        first = torch.stack([m.lam for m in model.blocks]).prod(0)[:, None, None] * x[:, :8]
    rebuilt = sum(weights[:, :, -1, s, None, None] * v for s, v in enumerate(values)) + first
    torch.testing.assert_close(rebuilt, expected, rtol=1e-12, atol=1e-12)


def test_stages():
    def stages(name, **kwargs):
        return layer_attention(create(name, **kwargs), images()).blocks

    resnet = {f'layer{i + 1}': [f'layer{i + 1}.{j}' for j in range(n)] for i, n in enumerate((2, 3, 1, 2))}
    assert stages('resnet18_mrla') == stages('resnet18_mrlab') == resnet
    # all blocks have one shape
    assert stages('resnet18_mrla', channels=(32,) * 4, output_stride=8)['layer4'] == ['layer4.0', 'layer4.1']
    blocks = [f'blocks.{i}' for i in range(6)]
    assert stages('deit_tiny_mrla') == stages('ceit_tiny_mrla') == {'blocks': blocks}
    assert stages('deit_tiny_mrlab') == {'blocks.0': blocks[:4], 'blocks.4': blocks[4:]}
    assert stages('deit_tiny_mrlab', mrla_stage_depth=6) == {'blocks': blocks}
    assert stages('pvt_v2_b0_mrlab') == {
        f'stages.{i}.blocks': [f'stages.{i}.blocks.0', f'stages.{i}.blocks.1'] for i in range(4)
    }
    # blocks without a skip have no layer attention
    assert stages('efficientnet_b0_mrla')['blocks.3'] == ['blocks.3.1', 'blocks.3.2']


class Backbone(nn.Module):
    """Blocks of two widths in one list, and two layer attentions directly in the model."""

    def __init__(self, layer):
        super().__init__()
        self.blocks = nn.ModuleList(layer(dim, 4, nn.BatchNorm2d) for dim in (8, 8, 16))
        self.first, self.second = layer(16, 4, nn.BatchNorm2d), layer(16, 4, nn.BatchNorm2d)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        memory = ()
        for i, mrla in enumerate([*self.blocks, self.first, self.second]):
            if i in (2, 3):
                x, memory = torch.cat([x, x], dim=1)[:, :16], ()
            if isinstance(mrla, MrlaBase):
                x, memory = mrla(x=x.clone(), memory=memory)
            else:
                x = mrla(x=x.clone(), o=x)
            x = self.act(x)
        return x


@pytest.mark.parametrize('layer', [MrlaLight, MrlaBase])
def test_a_backbone_of_ones_own(layer):
    torch.manual_seed(0)
    model, x = Backbone(layer), torch.randn(2, 8, 6, 6)
    attention = layer_attention(model, x)
    assert attention.blocks == {
        'blocks.0': ['blocks.0', 'blocks.1'],
        'blocks.2': ['blocks.2'],
        'first': ['first', 'second'],
    }
    before, after = feature_maps(model, x, 'blocks.0')
    assert torch.equal(before, x)
    block = model.blocks[0].eval()
    with torch.no_grad():
        expected = block(x, x) if layer is MrlaLight else block(x)[0]
    torch.testing.assert_close(after, expected)  # the feature map before an in-place ReLU changed it


@every
def test_a_look_leaves_no_trace(name):
    model, x = create(name), images()
    expected = model(x)
    model.train()
    [*model.modules()][5].eval()
    modes = [m.training for m in model.modules()]
    state = {n: t.clone() for n, t in model.state_dict().items()}
    looks = layer_attention(model, x)
    feature_maps(model, x, next(iter(looks.blocks.values()))[-1])
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    model.eval()
    assert torch.equal(model(x), expected)
    for stage, weights in layer_attention(model, x).items():
        assert torch.equal(weights, looks[stage])  # train and eval mode give the same weights
        assert not weights.requires_grad


def test_a_failing_look_leaves_no_trace():
    model = create('resnet18_mrla').train()
    with pytest.raises(RuntimeError):
        layer_attention(model, images()[:, :2])
    assert all(m.training and not m._forward_hooks for m in model.modules())


@every
def test_one_image_is_a_batch_of_one(name):
    model, x = create(name), images()
    both = layer_attention(model, x)
    for stage, weights in layer_attention(model, x[0]).items():
        torch.testing.assert_close(weights, both[stage][:1])


@pytest.mark.parametrize('name', ['resnet18_mrla', 'pvt_v2_b0_mrlab', 'efficientnet_b0_mrla', 'deit_tiny_mrlab'])
def test_feature_extractors(name):
    full = layer_attention(create(name), images := torch.ones(1, 3, 48, 64))
    torch.manual_seed(0)
    extractor = create(name, features_only=True, num_classes=None)
    for a, b in zip(full.blocks.values(), layer_attention(extractor, images).blocks.values(), strict=True):
        assert [x.rpartition('.')[2] for x in a] == [x.rpartition('.')[2] for x in b]


@every
def test_gradient_checkpointing_and_half_precision(name):
    model, x = create(name), images()
    expected = layer_attention(model, x)
    model.set_grad_checkpointing()
    model.train()
    for stage, weights in layer_attention(model, x).items():
        assert torch.equal(weights, expected[stage])
    for stage, weights in layer_attention(model.bfloat16(), x).items():
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights.double(), expected[stage], rtol=0.2, atol=0.1)


@pytest.mark.slow
def test_a_compiled_model_is_not_compiled_again():
    model, x = create('resnet18_mrlab'), images()
    expected = layer_attention(model, x)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        compiled(x)
    count = len(graphs)
    for a, b in zip(layer_attention(compiled, x).values(), expected.values(), strict=True):
        assert torch.equal(a, b)
    assert len(graphs) == count > 0


@every
def test_feature_maps_differ_by_what_layer_attention_adds(name):
    model, x = create(name), images()
    block = [*layer_attention(model, x).blocks.values()][-1][-1]
    before, after = feature_maps(model, x, block)
    assert before.shape == after.shape == inputs(model, x)[f'{block}.mrla.attn'].shape
    added = []
    hook = model.get_submodule(f'{block}.mrla.drop_path').register_forward_hook(lambda m, args, out: added.append(out))
    with torch.no_grad():
        model(x)
    hook.remove()
    added, _ = to_map(added[0], model.get_submodule(f'{block}.mrla').layout, before.shape[2:])
    assert added.abs().max() > 0.01
    torch.testing.assert_close(after - before, added)


def test_mistakes_are_one_sentence():
    with pytest.raises(ValueError, match=r'^ResNet has no layer attention; '):
        layer_attention(timm.create_model('resnet18', device='meta'), images())
    model = create('resnet18_mrla')
    with pytest.raises(ValueError, match='look at it before it is reparameterized'):
        layer_attention(reparameterize_model(model), images())
    with pytest.raises(ValueError, match=r"^there is no layer attention in 'layer9'; it is in layer1\.0, layer1\.1, "):
        feature_maps(model, images(), 'layer9')
    with pytest.raises(ValueError, match=r'^images \[48, 64\] are neither'):
        layer_attention(model, images()[0, 0])


@pytest.mark.parametrize('name', ['resnet18_mrlab', 'deit_tiny_mrla'])
def test_heat_maps_show_the_weights(name):
    attention = layer_attention(create(name), images(1))
    figure = plot_attention(attention, 'a $heading', ['a $title'])
    assert {'a $heading', 'a $title'} <= {text.get_text() for text in figure.texts}
    *panels, _ = figure.axes
    assert [ax.get_title(loc='left') for ax in panels] == [*attention]
    for ax, (stage, weights) in zip(panels, attention.items(), strict=True):
        blocks = attention.blocks[stage]
        assert [label.get_text() for label in ax.get_xticklabels()] == blocks
        assert [label.get_text() for label in ax.get_yticklabels()] == blocks
        (mesh,) = ax.collections
        below = np.tril(np.ones((len(blocks),) * 2, dtype=bool))
        drawn = mesh.get_array()
        assert np.array_equal(np.ma.getmaskarray(drawn), ~below)
        np.testing.assert_allclose(drawn.data[below], weights[0].mean(0).numpy()[below])
        # 0 is white where there are negative weights
        assert (mesh.norm.vmin == -mesh.norm.vmax) == (name == 'deit_tiny_mrla')


def test_a_heat_map_for_each_head():
    """For MRLA-light, it shows the mean over the channels of the head."""
    attention = layer_attention(create('deit_tiny_mrla'), images(1))
    figure = plot_attention(attention, 'heading', ['title'], heads=True)
    ax, _ = figure.axes
    assert [text.get_text() for text in ax.texts] == ['0', '1', '2', '3']
    (mesh,) = ax.collections
    drawn = mesh.get_array().reshape(7, 4, 7)
    for head in range(4):
        expected = attention['blocks'][0, 16 * head : 16 * (head + 1)].mean(0)
        np.testing.assert_allclose(drawn[1:, head, :6].filled(0), expected.numpy())


@pytest.mark.parametrize('heads', [False, True])
@pytest.mark.parametrize('batch', slow_except([2], [1, 2, 3]))
@pytest.mark.parametrize('name', ['resnet18_mrlab', 'pvt_v2_b0_mrla', 'deit_tiny_mrlab'])
def test_nothing_overlaps(name, batch, heads):
    title = 'a/long/path/to/some/image.png, a/long/path/to/the/weights/model_best.pth.tar'
    attention = layer_attention(create(name), images(batch))
    figure = plot_attention(attention, 'What the blocks of a model retrieve', [title] * batch, heads)
    figure.draw_without_rendering()
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [artist.get_tightbbox(renderer) for artist in (*figure.axes, *figure.texts)]
    for i, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_feature_maps_show_the_channels_that_change_most():
    before = torch.zeros(1, 9, 3, 4)
    after = before + torch.tensor([0, 5, 0, 3, 4, 1, 0, 2, 6])[:, None, None] / 9
    figure = plot_feature_maps(before, after, 'heading', ['title'])
    panels = figure.subfigs[0].axes
    titles = [ax.get_title() for ax in panels[:7]]
    assert titles == ['mean', *(f'channel {c}' for c in (8, 1, 4, 3, 7, 5))]
    np.testing.assert_allclose(panels[7].images[0].get_array(), after.mean(1)[0].numpy())
    np.testing.assert_allclose(panels[9].images[0].get_array(), after[0, 1].numpy())


def attention(*args, cwd):
    return subprocess.run(
        [sys.executable, '-m', 'timm_mrla', 'attention', *args], cwd=cwd, capture_output=True, text=True
    )


UNREADABLE = {
    'transformers': '{"architectures": ["BertModel"], "hidden_size": 8}',
    'nameless': '{"num_classes": 10}',
    'string': '"resnet18_mrla"',
    'lists': '{"architecture": "resnet18_mrla", "pretrained_cfg": ["input_size", 3], "model_args": [3]}',
    'json': '{"architecture": ',
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder of images, a saved model, and checkpoints in the format of timm's train.py."""
    folder = tmp_path_factory.mktemp('look')
    rng = np.random.default_rng(0)
    for name, size in (('one.png', (60, 80, 3)), ('two.jpg', (80, 50, 3)), ('gray.png', (40, 40))):
        Image.fromarray(rng.integers(256, size=size, dtype=np.uint8)).save(folder / name)
    for seed, name in enumerate(('a.pth.tar', 'b.pth.tar')):
        torch.manual_seed(seed)
        model = timm.create_model('resnet18_mrlab', num_classes=10)
        torch.save({'state_dict': model.state_dict()}, folder / name)
    torch.manual_seed(2)
    model = timm.create_model('deit_tiny_mrla', img_size=32, patch_size=8, in_chans=1, depth=3, num_classes=2)
    save_for_hf(model, folder / 'deit', data_config={'input_size': (1, 32, 32), 'mean': (0.5,), 'std': (0.5,)})
    torch.save(timm.create_model('deit_tiny_mrla', depth=2).state_dict(), folder / 'deit.pth')
    (folder / 'folder.png').mkdir()
    (folder / 'text.png').write_text('no image')
    Image.new('1', (20_000, 10_000)).save(folder / 'huge.png')  # so many pixels that Pillow suspects an attack
    (folder / 'torn.png').write_bytes((folder / 'one.png').read_bytes()[:200])
    for name, config in UNREADABLE.items():
        (folder / name).mkdir()
        (folder / name / 'config.json').write_text(config)
    (folder / 'text.pth').write_text('no checkpoint')
    return folder


def transformed(model, *paths):
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    return torch.stack([transform(Image.open(path)) for path in paths])


def assert_equal_numbers(path, expected):
    with np.load(path) as numbers:
        assert [*numbers] == [*expected]
        for name, x in expected.items():
            np.testing.assert_allclose(numbers[name], x.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_command_with_one_image(folder, tmp_path):
    result = attention(f'local-dir:{folder}/deit', folder / 'gray.png', '--pretrained', '--npz', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ['attention.npz', 'attention.png']
    picture = Image.open(tmp_path / 'attention.png')
    picture.load()
    assert picture.format == 'PNG'
    model = timm.create_model(f'local-dir:{folder}/deit', pretrained=True)
    expected = layer_attention(model, transformed(model, folder / 'gray.png'))
    assert_equal_numbers(tmp_path / 'attention.npz', expected)


@pytest.mark.slow
def test_command_compares_checkpoints_and_images(folder, tmp_path):
    """Each checkpoint with each image, the numbers in the picture's order."""
    paths, checkpoints = [folder / 'one.png', folder / 'two.jpg'], [folder / 'a.pth.tar', folder / 'b.pth.tar']
    args = [*paths, '--checkpoint', *checkpoints, '--out', 'four.png', '--npz']
    result = attention('resnet18_mrlab', *args, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ['four.npz', 'four.png']
    found = []
    for path in checkpoints:
        model = timm.create_model('resnet18_mrlab', num_classes=10, checkpoint_path=path)
        found.append(layer_attention(model, transformed(model, *paths)))
    expected = {stage: torch.cat([weights[stage] for weights in found]) for stage in found[0]}
    assert_equal_numbers(tmp_path / 'four.npz', expected)


@pytest.mark.slow
def test_command_draws_heads(folder, tmp_path):
    result = attention('resnet18_mrla', folder / 'one.png', '--heads', '--out', 'heads.png', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    Image.open(tmp_path / 'heads.png').load()


@pytest.mark.slow
def test_command_draws_feature_maps(folder, tmp_path):
    name = f'local-dir:{folder}/deit'
    args = [folder / 'gray.png', '--features', 'blocks.1', '--pretrained', '--npz', '--out', 'maps.png']
    result = attention(name, *args, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    Image.open(tmp_path / 'maps.png').load()
    model = timm.create_model(name, pretrained=True)
    before, after = feature_maps(model, transformed(model, folder / 'gray.png'), 'blocks.1')
    assert before.shape == (1, 192, 4, 4)
    assert_equal_numbers(tmp_path / 'maps.npz', {'before': before, 'after': after})


@pytest.mark.parametrize(
    ('name', 'kwargs', 'checkpoint', 'mode'),
    [
        ('vit_tiny_patch16_224_mrla', {'img_size': 32, 'depth': 2}, False, 'RGB'),
        ('resnet18_mrla', {'in_chans': 1, 'channels': (8, 8, 8, 8)}, True, 'L'),
        ('swin_tiny_patch4_window7_224_mrla', {'img_size': 64, 'window_size': 2, 'embed_dim': 24}, False, 'RGB'),
        ('coatnet_pico_rw_224_mrla', {'img_size': 64, 'in_chans': 1, 'embed_dim': (32, 32, 32, 32)}, False, 'L'),
    ],
)
def test_images_are_prepared_for_the_model(name, kwargs, checkpoint, mode, folder, tmp_path, monkeypatch):
    """Its own input size and channels, not those of its entry, with random weights and with a checkpoint."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=2, **kwargs).eval()
    torch.save(model.state_dict(), tmp_path / 'last.pth')
    values = [f'{key}={value}'.replace(' ', '') for key, value in kwargs.items()]
    args = ['--checkpoint', str(tmp_path / 'last.pth')] if checkpoint else []
    monkeypatch.chdir(tmp_path)
    command = ['timm-mrla', 'attention', name, str(folder / 'one.png'), '--npz', *args, '--model-kwargs', *values]
    monkeypatch.setattr(sys, 'argv', command)
    main()
    if checkpoint:
        config = timm.data.resolve_input_data_config(model)
        assert config['input_size'] == (kwargs.get('in_chans', 3), *(kwargs.get('img_size', 224),) * 2)
        image = timm.data.create_transform(**config)(Image.open(folder / 'one.png').convert(mode))
        assert_equal_numbers(tmp_path / 'attention.npz', layer_attention(model, image))


def test_checkpoints_of_a_folder(folder, tmp_path, monkeypatch):
    """A folder says the arguments of the model and how its images are prepared; checkpoints may be named one by one."""
    name, paths = f'local-dir:{folder}/deit', [str(tmp_path / 'a.pth'), str(tmp_path / 'b.pth')]
    models = [timm.create_model(name).eval() for _ in paths]
    for model, path in zip(models, paths, strict=True):
        torch.save(model.state_dict(), path)
    monkeypatch.chdir(tmp_path)
    args = ['--checkpoint', paths[0], '--checkpoint', paths[1], '--npz']
    monkeypatch.setattr(sys, 'argv', ['timm-mrla', 'attention', name, str(folder / 'gray.png'), *args])
    main()
    found = [layer_attention(model, transformed(model, folder / 'gray.png')) for model in models]
    assert_equal_numbers(tmp_path / 'attention.npz', {k: torch.cat([each[k] for each in found]) for k in found[0]})


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['resnet18_mrla', 'one.png', '--model-kwargs', 'in_chans=4'], 'takes images of 4 channels'),
        (['resnet19_mrla', 'one.png'], "no model 'resnet19_mrla'"),
        (['local-dir:nowhere', 'one.png'], 'nowhere'),
        (['resnet18', 'one.png'], 'ResNet has no layer attention'),
        (['resnet18_mrla', 'none.png'], "no image 'none.png'"),
        (['resnet18_mrla', 'text.png'], "'text.png' is not an image"),
        (['resnet18_mrla', 'huge.png'], "'huge.png' is not an image"),
        (['resnet18_mrla', 'torn.png'], "'torn.png' is not an image"),
        *(
            (['local-dir:' + name, 'one.png'], f"'local-dir:{name}' holds no model that timm can")
            for name in UNREADABLE
        ),
        (['resnet18_mrla', 'one.png', '--pretrained'], 'No pretrained weights exist for resnet18_mrla'),
        (['resnet18_mrla', 'one.png', '--checkpoint', 'none.pth'], "no checkpoint 'none.pth'"),
        (['resnet18_mrla', 'one.png', '--checkpoint', 'text.pth'], "'text.pth' cannot be read"),
        (
            ['resnet18_mrla', 'one.png', '--checkpoint', 'a.pth.tar'],
            "'a.pth.tar' does not fit: it lacks layer1.0.mrla.lam",
        ),
        (['resnet18_mrla', 'one.png', '--features', ''], "in ''; it is in layer1.0, layer1.1, layer2.0"),
        (['resnet18_mrla', 'one.png', '--features', 'layer9'], "'layer9'; it is in layer1.0, layer1.1, layer2.0"),
        (['resnet18_mrla', 'one.png', '--out', 'nowhere/a.png'], "no folder 'nowhere'"),
        (['resnet18_mrla', 'one.png', '--out', 'folder.png'], "'folder.png' is a folder"),
        (['resnet18', 'one.png', '--pretrained'], 'ResNet has no layer attention'),
        (['deit_tiny_mrla', 'one.png', '--checkpoint', 'deit.pth'], 'give the img_size'),
        (['deit_tiny_mrla', 'one.png', '--model-kwargs', 'foo=1'], "deit_tiny_mrla cannot be built with {'foo': 1}"),
        (['resnet18_mrla', 'one.png', '--out', 'a.picture'], "'a.picture' does not end like a picture"),
    ],
)
def test_command_mistakes_are_one_line_and_write_nothing(args, message, folder, monkeypatch, capsys):
    before = sorted(folder.rglob('*'))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, 'argv', ['timm-mrla', 'attention', *args])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert sorted(folder.rglob('*')) == before


def test_a_missing_extra_is_named(monkeypatch, capsys):
    for name in [n for n in sys.modules if n.partition('.')[0] == 'matplotlib' or n == 'timm_mrla.cli.attention']:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, 'timm_mrla.plot')
    monkeypatch.setitem(sys.modules, 'matplotlib', None)  # simulates that it is not installed
    monkeypatch.setattr(sys, 'argv', ['timm-mrla', 'attention', 'resnet18_mrla', 'one.png'])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert 'needs matplotlib' in line
    assert "pip install 'timm-mrla[plot]'" in line


@pytest.mark.parametrize('wrap', [torch.compile, nn.DataParallel, averaged], ids=['compile', 'DataParallel', 'EMA'])
def test_names_are_those_of_the_model_in_what_wraps_it(wrap):
    model, x = create('resnet18_mrla'), images()
    expected = layer_attention(model, x)
    found = layer_attention(wrap(model), x)
    assert found.blocks == expected.blocks
    assert found.heads == expected.heads
    assert all(torch.equal(found[stage], expected[stage]) for stage in expected)
    model.layer2[1] = torch.compile(model.layer2[1])
    assert layer_attention(model, x).blocks == expected.blocks
    assert torch.equal(feature_maps(model, x, 'layer2.1')[0], feature_maps(wrap(model), x, 'layer2.1')[0])


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit'])
def test_output_scales(name):
    """The largest of each block, of either sign; zero until it is trained."""
    model = attach(timm.create_model(name))
    assert len(output_scales(model)) > 1 and set(output_scales(model).values()) == {0.0}
    layer = next(m for m in model.modules() if isinstance(m, MrlaLight))
    with torch.no_grad():
        layer.output_scales()[-1][1], layer.output_scales()[0][0] = -0.5, 0.25
    first, *others = output_scales(model).values()
    assert first == 0.5 and set(others) == {0.0}
    with pytest.raises(ValueError, match='has no layer attention'):
        output_scales(timm.create_model(name))
    with pytest.raises(ValueError, match='folded'):
        output_scales(reparameterize_model(timm.create_model('test_resnet_mrla')))
