"""Tests of models inside other libraries, by the recipes of docs/other-libraries.md and docs/export.md.

The extra `downstream` installs the libraries.
"""

import copy
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageDraw
from readme import recipe
from torch import nn

from timm_mrla.detection import faster_rcnn
from timm_mrla.hub import load_checkpoint
from timm_mrla.layers import QueryKey, layer_attentions
from timm_mrla.layers.folding import is_folded

pytestmark = pytest.mark.downstream


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def checkpoint(tmp_path):
    """A function that writes a checkpoint of a model and returns the create_model arguments that load it."""

    def write(model):
        with torch.no_grad():
            for _ in range(3):  # for non-trivial running statistics
                model.train()(torch.randn(8, 3, 64, 96))
        torch.save({'state_dict': model.state_dict()}, tmp_path / 'model_best.pth.tar')
        return {'pretrained': True, 'pretrained_cfg_overlay': {'file': str(tmp_path / 'model_best.pth.tar')}}

    return write


def assert_layer_attention_learns(model, loss):
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if '.mrla.' in n}
    assert grads
    assert all(grad.isfinite().all() and grad.any() for grad in grads.values())


COLOURS = {'square': (230, 40, 40), 'triangle': (40, 230, 40), 'disc': (40, 40, 230)}
CORNERS = [4, 3, 16]


def write_shapes(folder, count, seed):
    """A data set in COCO's format: images of one to three shapes, and annotations.json."""
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for i in range(count):
        image = Image.new('RGB', (96, 96), (int(rng.integers(60, 120)),) * 3)
        for quarter in rng.permutation(4)[: rng.integers(1, 4)]:
            shape = int(rng.integers(3))
            radius = rng.uniform(14, 23)
            centre = 48 * np.array([quarter % 2, quarter // 2]) + rng.uniform(radius, 48 - radius, 2)
            angles = np.pi * (0.25 + 2 * np.arange(CORNERS[shape]) / CORNERS[shape])
            polygon = centre + radius * np.stack([np.cos(angles), np.sin(angles)], 1)
            ImageDraw.Draw(image).polygon([*map(tuple, polygon)], fill=[*COLOURS.values()][shape])
            size = np.ptp(polygon, 0)
            annotations.append(
                {
                    'id': len(annotations) + 1,
                    'image_id': i,
                    'category_id': shape + 1,
                    'bbox': [*polygon.min(0), *size],
                    'area': size.prod(),
                    'iscrowd': 0,
                    'segmentation': [polygon.flatten().tolist()],
                }
            )
        image.save(folder / f'{i}.png')
        images.append({'id': i, 'file_name': f'{i}.png', 'width': 96, 'height': 96})
    categories = [{'id': i, 'name': name} for i, name in enumerate(COLOURS, 1)]
    data = {'images': images, 'annotations': annotations, 'categories': categories}
    (folder / 'annotations.json').write_text(json.dumps(data))


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    """Two such data sets, for training and validation, as torchvision loads them."""
    from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
    from torchvision.transforms import v2

    transforms = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    sets = []
    for seed, count in enumerate((64, 24)):
        folder = tmp_path_factory.mktemp('shapes')
        write_shapes(folder, count, seed)
        data = CocoDetection(folder, folder / 'annotations.json', transforms=transforms)
        sets.append(wrap_dataset_for_transforms_v2(data, ('image_id', 'boxes', 'labels', 'masks')))
    return sets


def test_a_detector_finds_the_shapes(shapes):
    from pycocotools.cocoeval import COCOeval
    from torchvision.ops import box_convert

    train, val = shapes
    # fewer regions, for speed
    regions = dict(rpn_post_nms_top_n_train=200, rpn_post_nms_top_n_test=50, box_batch_size_per_image=64)
    model = faster_rcnn('efficientnet_b0_mrla', num_classes=4, min_size=96, max_size=96, **regions)
    steps = 80
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.1)
    losses = []
    for _ in range(steps):
        images, targets = zip(*(train[i] for i in torch.randint(len(train), (4,)).tolist()), strict=True)
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) / 2

    found = []
    model.eval()
    for image, target in val:
        with torch.no_grad():
            (out,) = model([image])
        boxes = box_convert(out['boxes'], 'xyxy', 'xywh').tolist()
        for box, label, score in zip(boxes, out['labels'].tolist(), out['scores'].tolist(), strict=True):
            found.append({'image_id': target['image_id'], 'category_id': label, 'bbox': box, 'score': score})
    evaluation = COCOeval(val.coco, val.coco.loadRes(found), 'bbox')
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[1] > 0.5  # AP at an IoU of 0.5


@pytest.fixture(scope='module')
def segmentation():
    return recipe('Semantic segmentation')


@pytest.mark.parametrize('kind', ['unet', 'fpn', 'deeplab', 'dpt'])
def test_segmentation(segmentation, kind):
    model = segmentation[kind]
    x = torch.randn(2, 3, 64, 96)
    if kind == 'deeplab':
        assert model.encoder(x)[-1].shape == (2, 2048, 4, 6)
    out = model(x)
    assert out.shape == (2, 21, 64, 96)
    assert_layer_attention_learns(model, nn.functional.cross_entropy(out, torch.randint(21, (2, 64, 96))))


def test_segmentation_starts_from_a_checkpoint(segmentation, checkpoint):
    model = timm.create_model('resnet50_mrla')
    overlay = checkpoint(model)['pretrained_cfg_overlay']
    unet = segmentation['smp'].Unet('tu-resnet50_mrla', encoder_weights=True, pretrained_cfg_overlay=overlay)
    expected = {k: v for k, v in model.state_dict().items() if not k.startswith('fc.')}
    torch.testing.assert_close(dict(unet.encoder.model.state_dict()), expected, rtol=0, atol=0)


def test_transformers_detector(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = recipe('transformers')['detector']
    x = torch.randn(2, 3, 128, 160)
    labels = {'class_labels': torch.tensor([0, 1]), 'boxes': torch.tensor([[0.5, 0.5, 0.2, 0.3], [0.3, 0.3, 0.2, 0.2]])}
    assert_layer_attention_learns(model, model(pixel_values=x, labels=[labels, labels]).loss)
    model.eval().save_pretrained('detector')
    loaded = type(model).from_pretrained('detector').eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x).logits, model(x).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    'changes',
    [
        {},
        {"'resnet50_mrla', num": "'deit_tiny_mrla', img_size=64, num", 'model_args={}': "model_args={'img_size': 64}"},
    ],
    ids=['resnet', 'deit'],
)
def test_transformers_classifier(changes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = recipe('transformers', changes)
    x = torch.randn(2, 3, 64, 64)
    again = names['AutoModelForImageClassification'].from_pretrained('transformers-folder')
    timms = timm.create_model('local-dir:transformers-folder', pretrained=True)
    with torch.no_grad():
        expected = names['model'].eval()(x)
        assert expected.shape == (2, 10)
        assert torch.equal(names['classifier'].eval()(x).logits, expected)
        assert torch.equal(again.eval()(x).logits, expected)
        assert torch.equal(timms.eval()(x), expected)


def test_fastai(images):
    changes = {"'DATA'": f"'{images}'", 'Resize(224)': 'Resize(64)', 'bs=64': 'bs=4, num_workers=0'}
    learner = recipe('fastai', changes)['learner']
    losses = [float(row[0]) for row in learner.recorder.values]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    x, y = learner.dls.one_batch()
    assert_layer_attention_learns(learner.model, learner.loss_func(learner.model(x), y))


@pytest.mark.parametrize('name', ['resnet18', 'vit_tiny_patch16_224', 'convnext_atto'])
def test_peft(name, tmp_path, monkeypatch):
    """The adapter trains and saves only layer attention, with its running statistics, and the head."""
    monkeypatch.chdir(tmp_path)
    size = ', img_size=64' if name.startswith('vit') else ''
    changes = {"'resnet50', num": f"'{name}'{size}, num", "'fc'": "'fc'" if name == 'resnet18' else "'head'"}
    names = recipe('PEFT', changes)
    torch.manual_seed(0)
    plain = names['create']()
    state_dict = {k: v.clone() for k, v in plain.state_dict().items()}
    adapter = names['get_peft_model'](plain, names['config'])
    lora = names['LoraConfig'](target_modules=['conv1', 'qkv', 'fc1'])
    late = names['get_peft_model'](timm.create_model(name), lora)
    with pytest.raises(ValueError, match='wrapped by PeftModel; attach first'):
        names['timm_mrla'].attach(late)
    fresh = names['create']()
    trained = [*layer_attentions(fresh).values(), fresh.get_submodule('fc' if name == 'resnet18' else 'head')]
    counts = [sum(p.numel() for p in module.parameters()) for module in trained]
    assert sum(p.numel() for p in adapter.parameters() if p.requires_grad) == sum(counts)

    x = torch.randn(4, 3, 64, 64)
    optimizer = torch.optim.SGD([p for p in adapter.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        adapter.train()(x).square().sum().backward()
        optimizer.step()
    adapter.save_pretrained('trained')
    fresh.load_state_dict(state_dict)
    loaded = names['PeftModel'].from_pretrained(fresh, 'trained').eval()
    with torch.no_grad():
        expected = adapter.eval()(x)
        assert torch.equal(loaded(x), expected)
        assert torch.equal(loaded.merge_and_unload().eval()(x), expected)
    changed = {k for k, v in loaded.base_model.model.state_dict().items() if not torch.equal(v, state_dict[k])}
    assert changed and all('.mrla.' in k or k.startswith(('fc', 'head')) for k in changed)


def test_lightning(tmp_path, monkeypatch):
    names = recipe('Lightning')
    monkeypatch.chdir(tmp_path)
    images, labels = torch.randn(16, 3, 64, 64), torch.randint(10, (16,))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=8)
    module = names['Classifier']()
    trainer = names['lightning'].Trainer(max_epochs=1, accelerator='cpu', logger=False, enable_progress_bar=False)
    trainer.fit(module, loader)
    trainer.save_checkpoint('last.ckpt')
    loaded = load_checkpoint('last.ckpt', 'resnet18_mrla').state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in module.model.state_dict().items())


def test_open_clip():
    changes = {'convnext_tiny_mrla': 'convnext_atto_mrla', 'image_size=224': 'image_size=64', 'layers=12': 'layers=1'}
    clip = recipe('open_clip', changes)['clip']
    images, text, scale = clip(torch.randn(2, 3, 64, 64), torch.randint(100, (2, 77)))
    assert_layer_attention_learns(clip.visual, (scale * images @ text.T).diagonal().sum())


# a small model of each kind; models with tokens have a fixed image size
EXPORTED = {
    'resnet18_mrla': {},
    'resnet18_mrlab': {},
    'efficientnet_b0_mrla': {},
    'pvt_v2_b0_mrla': {'depths': (1, 2, 1, 1)},
    'pvt_v2_b0_mrlab': {'depths': (1, 2, 1, 1)},
    'deit_tiny_mrla': {'img_size': (64, 96), 'depth': 3},
    'deit_tiny_mrlab': {'img_size': (64, 96), 'depth': 5},
    'ceit_tiny_mrla': {'img_size': (64, 96), 'depth': 3},
}


def export(heading, name, arguments):
    """Run an export recipe for another model; return its variables and images of two sizes."""
    arguments = ', '.join(f'{k}={v!r}' for k, v in {**EXPORTED[name], **arguments}.items())
    names = recipe(heading, {"'resnet50_mrla'": f"'{name}', {arguments}", '8, 3, 224, 224': '8, 3, 64, 96'})
    sizes = [(8, 3, 64, 96), (5, 3, 64, 96) if 'img_size' in EXPORTED[name] else (5, 3, 77, 128)]
    return names, [torch.randn(size) for size in sizes]


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize('name', EXPORTED)
def test_onnx(name, tmp_path, monkeypatch):
    import onnxruntime

    monkeypatch.chdir(tmp_path)
    names, batches = export('ONNX', name, {})
    assert names['error'] < 1e-4
    assert all(is_folded(m.norm) for m in layer_attentions(names['model']).values() if m.form == 'post')
    session = onnxruntime.InferenceSession('model.onnx')
    (source,) = session.get_inputs()
    for x in batches:
        (out,) = session.run(None, {source.name: x.numpy()})
        with torch.no_grad():
            assert relative_error(torch.from_numpy(out), names['model'](x)) < 1e-4


@pytest.mark.parametrize('name', ['resnet18_mrla', 'resnet18_mrlab'])
def test_aot_inductor(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = recipe('AOTInductor', {"'resnet50_mrla'": f"'{name}'", '8, 3, 224, 224': '2, 3, 64, 64'})
    assert names['error'] < 1e-4


@pytest.mark.parametrize('name', ['resnet18_mrla', 'resnet18_mrlab', 'pvt_v2_b0_mrla', 'deit_tiny_mrla'])
def test_openvino(name):
    names, batches = export('OpenVINO', name, {})
    for x in batches:
        with torch.no_grad():
            # by default, OpenVINO uses bfloat16 on processors that support it
            assert relative_error(torch.from_numpy(names['compiled'](x)[0]), names['model'](x)) < 0.02


@pytest.mark.parametrize(
    'name',
    [
        'resnet18_mrla',
        'resnet18_mrlab',
        'convnext_atto_mrla',
        'mambaout_femto_mrla',
        'pvt_v2_b0_mrlab',
        'deit_tiny_mrla',
        'deit_tiny_mrlab',
        'ceit_tiny_mrla',
    ],
)
@pytest.mark.parametrize(('dynamo', 'examples'), [(False, 3), (True, 3), (True, 1)])
def test_onnx_of_each_form_and_layout(name, dynamo, examples, tmp_path):
    """Weights are constants in the file, with and without constant folding; any batch size works."""
    if examples == 1 and 'pvt' in name:
        pytest.skip("timm's plain PVTv2 is exported for one image alone, too")
    import onnx
    import onnxruntime

    model = timm.create_model(name, **EXPORTED.get(name, {})).eval()
    x, path = torch.randn(examples, 3, 64, 96), tmp_path / 'model.onnx'
    batch = {'dynamic_shapes': ({0: torch.export.Dim.DYNAMIC},)} if dynamo else {'dynamic_axes': {'x': {0: 'batch'}}}
    folding = {} if dynamo else {'do_constant_folding': False}
    torch.onnx.export(model, (x,), path, dynamo=dynamo, input_names=['x'], **batch, **folding)
    graph = onnx.load(path).graph
    constants = {tensor.name for tensor in graph.initializer}
    constants |= {out for node in graph.node if node.op_type in ('Constant', 'Identity') for out in node.output}
    convs = [node for node in graph.node if node.op_type == 'Conv']
    assert convs and all(node.input[1] in constants for node in convs)
    session = onnxruntime.InferenceSession(path)
    for size in (1, 3, 8):
        x = torch.randn(size, 3, 64, 96)
        (out,) = session.run(None, {'x': x.numpy()})
        with torch.no_grad():
            assert relative_error(torch.from_numpy(out), model(x)) < 1e-4


@pytest.mark.parametrize('name', ['resnet18_mrla', 'resnet18_mrlab', 'efficientnet_b0_mrla'])
def test_core_ml(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    converted = recipe('Core ML', {"'resnet50_mrla'": f"'{name}'", '1, 3, 224, 224': '1, 3, 64, 64'})['converted']
    assert len(converted.get_spec().description.output) == 1
    assert (tmp_path / 'resnet50_mrla.mlpackage').exists()


@pytest.mark.parametrize('name', ['resnet18_mrla', 'pvt_v2_b0_mrla'])
def test_core_ml_from_torch_export(name):
    import coremltools

    model, x = timm.create_model(name).eval(), torch.randn(1, 3, 64, 64)
    program = torch.export.export(model, (x,)).run_decompositions({})
    converted = coremltools.convert(program, convert_to='mlprogram', skip_model_load=True)
    assert len(converted.get_spec().description.output) == 1


@pytest.mark.parametrize('name', ['resnet18_mrla', 'resnet18_mrlab', 'efficientnet_b0_mrla', 'convnext_atto_mrla'])
def test_structured_pruning(name, monkeypatch):
    """Prune three times with training in between; also widths between blocks, to multiples of the heads."""
    model = timm.create_model(name, num_classes=10)
    monkeypatch.setattr(timm, 'create_model', lambda _: model)
    layers = layer_attentions(model)
    heads = {n: layer.attn.num_heads for n, layer in layers.items()}
    changes = {'8, 3, 224, 224': '2, 3, 64, 64', 'round_to=64': f'round_to={max(heads.values())}'}
    sizes = []
    for _ in range(3):
        sizes.append((sum(p.numel() for p in model.parameters()), sum(m.v.out_channels for m in layers.values())))
        x = recipe('Torch-Pruning', changes)['images']
        assert_layer_attention_learns(model, model.train()(x).square().sum())
        torch.optim.SGD(model.parameters(), lr=0.01).step()
    assert sizes[2][0] < 0.5 * sizes[1][0] < 0.25 * sizes[0][0]
    assert sizes[2][1] < 0.7 * sizes[1][1] < 0.49 * sizes[0][1]
    assert {n: layer.attn.num_heads for n, layer in layers.items()} == heads


@pytest.mark.parametrize('name', ['resnet18_mrla', 'efficientnet_b0_mrla', 'pvt_v2_b0_mrla', 'deit_tiny_mrla'])
def test_int8(name, checkpoint):
    names, batches = export('int8', name, checkpoint(timm.create_model(name, **EXPORTED[name])))
    model, int8 = names['model'], names['int8']
    for x in batches:
        with torch.no_grad():
            assert relative_error(int8(x), model(x)) < 0.1  # a step of int8 is 1 % of a tensor's range
    quantized = [
        node
        for node in int8.graph.nodes
        if node.target in (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)
        and 'dequantize' in str(node.args[1].target)
    ]
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(quantized) == len([m for m in layers if not isinstance(m, QueryKey)])


@pytest.mark.parametrize('name', ['deit_tiny_mrla', 'pvt_v2_b0_mrla'])
def test_int8_linear_layers(name):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = timm.create_model(name, **EXPORTED[name]).eval()
    int8 = copy.deepcopy(model)
    quantize_(int8, Int8DynamicActivationInt8WeightConfig())
    x = torch.randn(8, 3, 64, 96)
    with torch.no_grad():
        assert 0 < relative_error(int8(x), model(x)) < 0.1
