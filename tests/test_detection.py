"""Tests of torchvision's detectors on our backbones: outputs, frozen parts, saving and loading."""

import argparse
import json
import re
import shutil
import sys

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from PIL import Image
from slow import slow, slow_except
from timm.layers import FrozenBatchNormAct2d
from torch import nn
from torchvision.models.detection import (
    FasterRCNN,
    MaskRCNN,
    RetinaNet,
    fasterrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn,
    retinanet_resnet50_fpn,
)
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from timm_mrla.cli import main
from timm_mrla.detection import faster_rcnn, from_pretrained, mask_rcnn, push_to_hub, retina_net, save_pretrained
from timm_mrla.hub import save_pretrained as save_classifier
from timm_mrla.layers import layer_attentions

SMALL = {'num_classes': 4, 'min_size': 64, 'max_size': 96}
RCNN = {'box_score_thresh': 0.0, 'rpn_post_nms_top_n_test': 50, 'box_detections_per_img': 20}
ALL = {faster_rcnn: RCNN, mask_rcnn: RCNN, retina_net: {'score_thresh': 0.0}}
TORCHVISIONS = dict(zip(ALL, [fasterrcnn_resnet50_fpn, maskrcnn_resnet50_fpn, retinanet_resnet50_fpn], strict=True))
CATEGORIES = [{'id': 1, 'name': 'disc'}, {'id': 3, 'name': 'star'}]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randomize(model):
    """Give batch norms random values and statistics, as after training; no weight is zero."""
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                for tensor in (norm.weight, norm.running_var):
                    tensor.uniform_(0.5, 1.5)
                for tensor in (norm.bias, norm.running_mean):
                    tensor.normal_(std=0.1)
    return model


def batch(dtype=torch.float32):
    """Two images of different sizes, with targets."""
    generator = torch.Generator().manual_seed(1)
    sizes, boxes = [(64, 80), (72, 60)], [[[5, 10, 40, 50], [30, 5, 70, 60]], [[10.0, 8, 50, 66]]]
    images = [torch.rand(3, *size, generator=generator, dtype=dtype) for size in sizes]
    targets = []
    for image, of_image in zip(images, boxes, strict=True):
        corners = torch.tensor(of_image, dtype=dtype)
        masks = torch.zeros(len(corners), *image.shape[1:], dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, corners.int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        targets.append({'boxes': corners, 'labels': torch.arange(1, 1 + len(corners)), 'masks': masks})
    return images, targets


def losses(model):
    """Losses by name, with a seed, because torchvision samples anchors and regions."""
    torch.manual_seed(2)
    return model.train()(*batch())


@torch.inference_mode()
def detections(model, dtype=torch.float32):
    return model.to(dtype).eval()(batch(dtype)[0])


def assert_same(ours, theirs):
    """Each loss and each box is the same."""
    torch.testing.assert_close(losses(ours), losses(theirs), rtol=1e-5, atol=1e-5)
    found = detections(ours)
    torch.testing.assert_close(found, detections(theirs), rtol=1e-5, atol=1e-5)
    assert all(len(image['boxes']) > 3 for image in found)


def write_checkpoint(path, name, **kwargs):
    """Write a checkpoint in the format of train.py, with trained layer attention."""
    model = randomize(timm.create_model(name, **kwargs))
    torch.save({'state_dict': model.state_dict(), 'args': argparse.Namespace(model=name), 'epoch': 1}, path)
    return str(path)


def by_name(model, condition):
    return {name for name, value in model.named_parameters() if condition(value)}


def frozen_norms(module):
    return {name for name, norm in module.named_modules() if isinstance(norm, FrozenBatchNorm2d | FrozenBatchNormAct2d)}


def test_names_in_torchvisions_registry():
    names = torchvision.models.list_models(include='*_mrla*')
    assert len(names) == 30
    for kind, cls in (('fasterrcnn', FasterRCNN), ('maskrcnn', MaskRCNN), ('retinanet', RetinaNet)):
        for backbone in ('resnet50_mrla', 'resnet50_mrlab', 'resnet101_mrla', 'resnet101_mrlab'):
            assert f'{kind}_{backbone}_fpn' in names
        model = torchvision.models.get_model(
            f'{kind}_resnet18_mrlab_fpn', weights=None, weights_backbone=None, trainable_backbone_layers=None, **SMALL
        )
        assert type(model) is cls
        assert type(model.backbone.body) is type(timm.create_model('resnet18_mrlab'))
        assert len(layer_attentions(model)) == 8
    assert (
        torchvision.models.get_model('fasterrcnn_resnet18_mrla_fpn').roi_heads.box_predictor.cls_score.out_features
        == 91
    )


@pytest.mark.slow
@pytest.mark.parametrize('builder', ALL)
def test_layer_attention_at_the_identity_is_the_plain_backbone_and_torchvisions(builder):
    kwargs = {**SMALL, **ALL[builder]}
    theirs = TORCHVISIONS[builder](weights=None, weights_backbone=None, **kwargs)
    randomize(theirs.backbone.body)
    plain = builder('resnet50', **kwargs)
    plain.load_state_dict(theirs.state_dict())
    assert_same(plain, theirs)
    ours = builder('resnet50_mrla', **kwargs)
    rest = ours.load_state_dict(plain.state_dict(), strict=False)
    assert not rest.unexpected_keys
    assert all('.mrla.' in name for name in rest.missing_keys)
    for layer in layer_attentions(ours).values():
        for scale in layer.output_scales():
            nn.init.zeros_(scale)
    assert_same(ours, plain)
    nn.init.ones_(ours.backbone.body.layer4[2].mrla.norm.weight)
    with pytest.raises(AssertionError):
        assert_same(ours, plain)


@pytest.mark.slow
def test_frozen_as_torchvisions(tmp_path):
    kwargs = {**SMALL, **ALL[faster_rcnn]}
    ours = faster_rcnn('resnet50', weights_backbone=write_checkpoint(tmp_path / 'checkpoint', 'resnet50'), **kwargs)
    theirs = FasterRCNN(resnet_fpn_backbone(backbone_name='resnet50', weights=None), **kwargs)
    theirs.load_state_dict(ours.state_dict())
    assert by_name(ours, lambda p: p.requires_grad) == by_name(theirs, lambda p: p.requires_grad)
    assert_same(ours, theirs)


@pytest.mark.parametrize('trainable', slow_except([3], range(6)))
def test_what_is_trained_and_what_is_frozen(trainable, tmp_path):
    """The same parameters as in torchvision, and the layer attention of the same blocks."""
    theirs = resnet_fpn_backbone(backbone_name='resnet18', weights=None, trainable_layers=trainable)
    plain, ours = (
        faster_rcnn(
            name,
            weights_backbone=write_checkpoint(tmp_path / name, name),
            trainable_backbone_layers=trainable,
            **SMALL,
        ).backbone
        for name in ('resnet18', 'resnet18_mrla')
    )
    assert by_name(plain, lambda p: True) == by_name(theirs, lambda p: True)
    assert by_name(plain, lambda p: p.requires_grad) == by_name(theirs, lambda p: p.requires_grad)
    assert frozen_norms(plain) == frozen_norms(theirs)
    stages = [f'body.layer{4 - i}.' for i in range(min(trainable, 4))]
    layers = [*layer_attentions(ours)]
    assert len(layers) == 8
    added = {f'{layer}.{p}' for layer in layers for p in ('lam', 'v.weight', 'attn.qk.weight')}
    learns = {name for name in added if name.startswith(tuple(stages))}
    assert by_name(ours, lambda p: True) == by_name(theirs, lambda p: True) | added
    assert by_name(ours, lambda p: p.requires_grad) == by_name(theirs, lambda p: p.requires_grad) | learns
    assert frozen_norms(ours) == frozen_norms(theirs) | {f'{layer}.norm' for layer in layers}
    assert not [m for m in ours.modules() if isinstance(m, nn.BatchNorm2d)]


# prefixes of the parameter names of the stem and the stages
LAYERS = {
    'resnet18_mrlab': ['conv1', 'layer1', 'layer2', 'layer3', 'layer4'],
    'convnext_atto_mrla': ['stem', 'stages.0', 'stages.1', 'stages.2', 'stages.3'],
    'efficientnet_b0_mrla': ['conv_stem blocks.0', 'blocks.1', 'blocks.2', 'blocks.3 blocks.4', 'blocks.5 blocks.6'],
}


@pytest.mark.slow
@pytest.mark.parametrize('name', LAYERS)
def test_the_layers_of_other_pyramids(name, tmp_path):
    checkpoint = write_checkpoint(tmp_path / 'checkpoint', name)
    for trainable in range(6):
        body = retina_net(name, weights_backbone=checkpoint, trainable_backbone_layers=trainable).backbone.body
        last = tuple(f'{prefix}.' for layer in LAYERS[name][5 - trainable :] for prefix in layer.split())
        assert by_name(body, lambda p: p.requires_grad) == {n for n, _ in body.named_parameters() if n.startswith(last)}
        assert bool(frozen_norms(body)) == (name != 'convnext_atto_mrla')
        assert not [m for m in body.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(n.startswith(last) for n, _ in body.named_parameters())


def test_from_scratch_all_is_trained():
    model = retina_net('resnet18_mrla', **SMALL)
    assert by_name(model, lambda p: p.requires_grad) == by_name(model, lambda p: True)
    assert not frozen_norms(model)
    with pytest.warns(UserWarning, match='trainable_backbone_layers has no effect'):
        model = retina_net('resnet18_mrla', trainable_backbone_layers=1, **SMALL)
    assert by_name(model, lambda p: p.requires_grad) == by_name(model, lambda p: True)


def add_weights(hub, repo_id, model):
    hub.commit(repo_id, {'model.safetensors': safetensors.torch.save(model.state_dict())})


@pytest.mark.slow
def test_a_warm_start_can_learn(hub):
    """Its norms at zero are not frozen: otherwise no gradient would reach the layers before them."""
    backbone = randomize(timm.create_model('resnet18'))
    add_weights(hub, 'timm/resnet18.a1_in1k', backbone)
    model = faster_rcnn('resnet18_mrla', weights_backbone='warmstart_a1_in1k', **SMALL)
    plain = faster_rcnn('resnet18', weights_backbone='a1_in1k', **SMALL)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(plain.backbone.body.layer4[1].conv2.weight, backbone.layer4[1].conv2.weight)
    assert frozen_norms(model) == frozen_norms(plain)
    assert_same(model, plain)

    sum(losses(model).values()).backward()
    for name, layer in layer_attentions(model).items():
        frozen = name.startswith('backbone.body.layer1')
        assert all(scale.grad is None if frozen else scale.grad.any() for scale in layer.output_scales())


def test_forms_of_weights_backbone(hub, tmp_path):
    path = write_checkpoint(tmp_path / 'last.pth.tar', 'resnet18_mrlab', num_classes=7)
    trained = timm.create_model('resnet18_mrlab', num_classes=7)
    trained.load_state_dict(torch.load(path, weights_only=False)['state_dict'])
    save_classifier(trained, tmp_path / 'folder')
    hub.add('user/resnet18', tmp_path / 'folder')
    weights = {k: v for k, v in trained.state_dict().items() if not k.endswith('num_batches_tracked')}
    for name in (path, f'local-dir:{tmp_path}/folder', 'hf-hub:user/resnet18'):
        body = retina_net('resnet18_mrlab', weights_backbone=name, **SMALL).backbone.body.state_dict()
        assert {*weights} - {*body} == {'fc.weight', 'fc.bias'}
        assert all(torch.equal(tensor, weights[key]) for key, tensor in body.items())


def test_images_are_normed_as_the_backbones():
    name = 'resnetv2_50x1_bit'
    assert retina_net(f'{name}_mrla', **SMALL).transform.image_mean == [0.5, 0.5, 0.5]
    assert retina_net('resnet18_mrla', **SMALL).transform.image_mean == [0.485, 0.456, 0.406]
    assert retina_net(f'{name}_mrla', image_mean=[0.0] * 3, **SMALL).transform.image_mean == [0.0] * 3


# one model of each timm module that has feature maps of strides 4 to 32 and takes images of any size
FAMILIES = ['resnet18_mrlab', 'resnetv2_18_mrla', 'regnetx_002_mrla', 'efficientnet_b0_mrla', 'convnext_atto_mrla']
FAMILIES += ['mobilenetv4_conv_small_050_mrla', 'swin_tiny_patch4_window7_224_mrla', 'swinv2_tiny_window8_256_mrla']
FAMILIES += ['pvt_v2_b0_mrla', 'pvt_v2_b0_mrlab', 'poolformer_s12_mrla', 'edgenext_xx_small_mrla', 'fastvit_t8_mrla']
FAMILIES += ['inception_next_atto_mrla', 'mambaout_femto_mrla', 'starnet_s1_mrla', 'focalnet_tiny_srf_mrla']
FAMILIES += ['davit_tiny_mrla']


@pytest.mark.parametrize('name', slow_except(['convnext_atto_mrla', 'pvt_v2_b0_mrlab'], FAMILIES))
def test_every_family(name):
    """Maps have the right sizes, and each parameter gets a gradient, as DistributedDataParallel requires."""
    backbone = faster_rcnn(name).backbone
    maps = backbone(torch.rand(2, 3, 64, 96))
    sizes = {'0': (16, 24), '1': (8, 12), '2': (4, 6), '3': (2, 3), 'pool': (1, 2)}
    assert {key: y.shape[1:] for key, y in maps.items()} == {key: (256, *size) for key, size in sizes.items()}
    sum(y.square().sum() for y in maps.values()).backward()
    assert not by_name(backbone, lambda p: p.grad is None)
    assert all(p.grad.any() for layer in layer_attentions(backbone).values() for p in layer.parameters())


@pytest.mark.slow
def test_maps_are_chosen_by_their_stride():
    """This backbone also has a map of stride 64, which is left out."""
    with torch.device('meta'):
        maps = retina_net('fastvit_mci3_mrla').backbone(torch.empty(1, 3, 128, 128))
    assert [y.shape[-1] for y in maps.values()] == [16, 8, 4, 2, 1]


@pytest.mark.slow
@pytest.mark.parametrize('builder', ALL)
def test_a_folder_and_the_hub(builder, hub, tmp_path):
    kwargs = {**SMALL, **ALL[builder], 'detections_per_img' if builder is retina_net else 'box_detections_per_img': 5}
    model = builder('resnet18_mrla', categories=CATEGORIES, image_mean=[0.5, 0.4, 0.3], **kwargs)
    randomize(model.backbone.body)
    save_pretrained(model, tmp_path / 'folder')
    assert sorted(path.name for path in (tmp_path / 'folder').iterdir()) == [
        'README.md',
        'config.json',
        'model.safetensors',
    ]
    card = (tmp_path / 'folder' / 'README.md').read_text()
    assert f"from_pretrained('{tmp_path}/folder')" in card
    url = push_to_hub(model, 'user/detector')
    assert url == f'{hub.url}/user/detector'
    assert "from_pretrained('hf-hub:user/detector')" in hub.find('user/detector', 'main')[0]['README.md'].decode()
    expected = detections(model, torch.float64)
    assert all(0 < len(image['boxes']) <= 5 for image in expected)
    name = f'{builder.__name__.replace("_", "")}_resnet18_mrla_fpn'
    for source in (str(tmp_path / 'folder'), 'hf-hub:user/detector'):
        for loaded in (from_pretrained(source), torchvision.models.get_model(name, weights=source, num_classes=4)):
            torch.testing.assert_close(detections(loaded, torch.float64), expected)
            assert loaded.config == {**model.config, 'requires': ['timm_mrla']}
            assert loaded.config['categories'] == CATEGORIES
            assert len(frozen_norms(loaded)) == 28
    assert from_pretrained(source).backbone.body.conv1.weight.requires_grad is False
    assert builder('resnet18_mrla', weights=source, min_size=32).transform.min_size == (32,)


@pytest.mark.parametrize('builder', [slow(faster_rcnn), retina_net])
def test_a_checkpoint_of_the_training_script(builder, tmp_path):
    """Also with norms that were not frozen. The checkpoint gives the number of classes."""
    model = builder('resnet18_mrla', **SMALL, **ALL[builder])
    randomize(model.backbone.body)
    path = str(tmp_path / 'model_0.pth')
    torch.save({'model': model.state_dict(), 'args': argparse.Namespace(lr=0.02), 'epoch': 0}, path)
    kwargs = {key: value for key, value in {**SMALL, **ALL[builder]}.items() if key != 'num_classes'}
    loaded = builder('resnet18_mrla', weights=path, trainable_backbone_layers=1, **kwargs)
    torch.testing.assert_close(detections(loaded, torch.float64), detections(model, torch.float64))
    assert loaded.config['num_classes'] == 4
    body = loaded.backbone.body
    assert by_name(body, lambda p: p.requires_grad) == {
        n for n, _ in body.named_parameters() if n.startswith('layer4.')
    }


def test_what_config_json_cannot_hold(tmp_path):
    anchors = torchvision.models.detection.anchor_utils.AnchorGenerator(
        ((8,), (16,), (32,), (64,), (128,)), ((1.0,),) * 5
    )
    model = faster_rcnn('resnet18_mrla', rpn_anchor_generator=anchors, **SMALL)
    with pytest.raises(ValueError, match=r'an argument that config\.json cannot hold: .*AnchorGenerator'):
        save_pretrained(model, tmp_path / 'folder')
    with pytest.raises(ValueError, match=r'not built by timm_mrla\.detection'):
        save_pretrained(fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None), tmp_path / 'folder')
    (tmp_path / 'taken').touch()
    with pytest.raises(FileExistsError, match='taken'):
        save_pretrained(faster_rcnn('resnet18_mrla', **SMALL), tmp_path / 'taken')
    assert [path.name for path in tmp_path.iterdir()] == ['taken']


UNREADABLE = {
    'string': '"mask_rcnn"',
    'list': '["mask_rcnn", "resnet18_mrla"]',
    'json': '{"architecture": ',
    'wrong': '{"architecture": "mask_rcnn", "backbone": ["resnet18_mrla"]}',
    'lists': '{"architecture": "resnet18_mrla", "pretrained_cfg": ["input_size", 3]}',
}


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Folders and checkpoints of a detector and of a classifier."""
    folder = tmp_path_factory.mktemp('files')
    detector = mask_rcnn('resnet18_mrla', **SMALL)
    save_pretrained(detector, folder / 'detector')
    torch.save({'model': detector.state_dict()}, folder / 'detector.pth')
    classifier = timm.create_model('resnet18_mrla')
    save_classifier(classifier, folder / 'classifier')
    torch.save({'state_dict': classifier.state_dict()}, folder / 'classifier.pth')
    save_classifier(timm.create_model('resnet18_mrla', in_chans=1), folder / 'grey')
    shutil.copytree(folder / 'grey', folder / 'older')  # older versions of timm wrote the backbone's input_size
    config = (folder / 'grey' / 'config.json').read_text()
    (folder / 'older' / 'config.json').write_text(re.sub(r'("input_size": \[\s*)1', r'\g<1>3', config))
    (folder / 'empty').mkdir()
    (folder / 'text.pth').write_text('no checkpoint')
    for name, config in UNREADABLE.items():
        (folder / name).mkdir()
        (folder / name / 'config.json').write_text(config)
    return folder


BAD = [
    (dict(backbone='resnet19_mrla'), "no model 'resnet19_mrla'"),
    (dict(backbone='resnet18_mrla.warmstart_a1_in1k'), "name 'resnet18_mrla', and 'warmstart_a1_in1k' as weights_back"),
    (
        dict(backbone='vit_tiny_patch16_224_mrla', weights_backbone='warmstart_x'),
        'vit_tiny_patch16_224_mrla has: 16',
    ),
    (dict(backbone='vit_base_patch16_clip_224'), 'vit_base_patch16_clip_224 has: 16'),
    (dict(backbone='vgg11'), 'vgg11 does not say which of its modules make its maps'),
    (dict(backbone='maxvit_tiny_tf_224_mrla'), 'any size; maxvit_tiny_tf_224_mrla takes 224 x 224'),
    (dict(num_classes=1), 'num_classes is 1, and the background is a class'),
    (
        dict(weights_backbone='warmstart_a9_in1k'),
        "'warmstart_a9_in1k' is no file, .*warmstart_a1_in1k, .*warmstart_tv_in1k",
    ),
    (dict(backbone='resnet18_mrlab', weights_backbone='warmstart_a1_in1k'), 'no tag of resnet18_mrlab; its tags: none'),
    (dict(weights_backbone='nowhere/last.pth.tar'), "'nowhere/last.pth.tar' is no file"),
    (dict(weights_backbone='{}/text.pth'), 'text.pth. cannot be read as weights alone'),
    (
        dict(weights_backbone='{}/detector.pth'),
        'detector.pth. contains a detector, not resnet18_mrla: pass it as `weights`',
    ),
    (dict(backbone='resnet18', weights_backbone='{}/detector.pth'), 'detector.pth. contains a detector, not resnet18:'),
    (dict(backbone='resnet18', weights_backbone='{}/classifier.pth'), 'classifier.pth. does not fit'),
    (dict(backbone='resnet34_mrla', weights_backbone='{}/classifier.pth'), r'it lacks layer1\.2'),
    (dict(weights_backbone='local-dir:{}/detector'), 'detector. holds mask_rcnn, and not resnet18_mrla'),
    (dict(backbone='resnet18', weights_backbone='local-dir:{}/classifier'), 'holds resnet18_mrla, and not resnet18'),
    (dict(weights_backbone='local-dir:{}/grey'), 'grey. takes images of 1 channels'),
    (dict(weights_backbone='local-dir:{}/older'), 'older. takes images of 1 channels'),
    (dict(weights_backbone='local-dir:{}/empty'), 'empty. holds no model'),
    (dict(weights_backbone='local-dir:{}/lists'), 'lists. holds no model'),
    (dict(weights_backbone='hf-hub:user/nothing'), "'hf-hub:user/nothing' holds no model: .*Repository Not Found"),
    (dict(weights='nowhere.pth'), "no checkpoint 'nowhere.pth'"),
    (dict(weights='{}/text.pth'), 'text.pth. cannot be read as weights alone'),
    (dict(weights='{}/classifier.pth'), 'not a checkpoint of a detector.*pass weights_backbone=.*/classifier.pth'),
    (
        dict(weights='{}/classifier'),
        'the classifier resnet18_mrla, not a detector.*weights_backbone=.local-dir:.*/classifier',
    ),
    (dict(weights='{}/empty'), 'empty. holds no model'),
    (dict(weights='hf-hub:user/nothing'), "'hf-hub:user/nothing' holds no model: .*Repository Not Found"),
    (dict(weights='{}/detector', num_classes=91), 'num_classes is 91, but .*detector. has 4'),
    (dict(weights='{}/detector.pth', num_classes=91), r'num_classes is 91, but .*detector\.pth. has 4'),
    (
        dict(backbone='resnet18', weights='{}/detector'),
        'backbone is resnet18, but .*detector. has resnet18_mrla',
    ),
    (dict(backbone='resnet34_mrla', weights='{}/detector.pth'), r'it lacks backbone\.body\.layer1\.2.* and \d+ more'),
    (
        dict(builder=faster_rcnn, weights='{}/detector'),
        'architecture is faster_rcnn, but .*detector. has mask_rcnn',
    ),
    (dict(builder=faster_rcnn, weights='{}/detector.pth'), r'the model has no roi_heads\.mask_head'),
    (dict(weights_backbone='{}/classifier.pth', trainable_backbone_layers=6), r'in the range \[0,5\], got 6'),
]


@pytest.mark.parametrize(('arguments', 'message'), BAD, ids=[message for _, message in BAD])
def test_bad_input(arguments, message, files, hub):
    """The error comes before any download, and is short."""
    arguments = {'builder': mask_rcnn, 'backbone': 'resnet18_mrla', **arguments}
    arguments = {k: v.format(files) if isinstance(v, str) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=f'(?s){message}') as e:
        arguments.pop('builder')(arguments.pop('backbone'), **arguments)
    assert len(str(e.value)) < 1000
    assert not [r for r in hub.requests if '/resolve/' in r and not r.endswith('config.json')]


def test_an_unknown_argument():
    for builder in ALL:
        with pytest.raises(TypeError, match="has no argument 'minimum_size'"):
            builder('resnet18_mrla', minimum_size=3)


def test_from_pretrained_of_a_checkpoint(files):
    with pytest.raises(ValueError, match=r"detector\.pth' does not say which detector it is for: build the detector"):
        from_pretrained(f'{files}/detector.pth')


@pytest.mark.parametrize(
    ('key', 'value'),
    [
        ('num_classes', '4'),
        ('backbone', 18),
        ('min_size', 'small'),
        ('max_size', [96]),
        ('image_mean', 0.5),
        ('image_std', ['a', 'b', 'c']),
        ('box_score_thresh', 'high'),
        ('categories', 5),
        ('categories', [{'id': 1}]),
    ],
)
def test_values_of_another_type_in_a_configuration(key, value, files, tmp_path):
    config = json.loads((files / 'detector' / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps({**config, key: value}))
    with pytest.raises(
        ValueError, match='holds no detector that can be built: its ' + re.escape(f'{key} is {value!r}')
    ):
        from_pretrained(str(tmp_path))


def detect(*args, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['timm-mrla', 'detect', *map(str, args)])
    main()


@pytest.mark.parametrize(
    ('builder', 'categories'),
    [(faster_rcnn, CATEGORIES), slow((mask_rcnn, CATEGORIES[:1]))],
)
def test_a_picture_of_what_is_found(builder, categories, tmp_path, monkeypatch):
    """Two objects of class 3 in each image, at a score of exp(4) / (exp(4) + 2)."""
    model = builder('resnet18_mrla', categories=categories, box_detections_per_img=2, **SMALL)
    scores = model.roi_heads.box_predictor.cls_score
    with torch.no_grad():
        scores.weight.zero_()
        scores.bias.copy_(torch.tensor([0.0, -9.0, 0.0, 4.0]))
    save_pretrained(model, tmp_path / 'detector')
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.randint(256, (3, *size), generator=generator).byte() for size in ((64, 80), (72, 60), (64, 64))]
    for i, picture in enumerate(pictures):
        to_pil_image(picture).save(tmp_path / f'{i}.png')
    paths = [tmp_path / f'{i}.png' for i in range(3)]
    detect(tmp_path / 'detector', *paths, '--out', tmp_path / 'found.png', monkeypatch=monkeypatch)

    with Image.open(tmp_path / 'found.png') as image:
        found = pil_to_tensor(image)
    assert found.shape == (3, 2 + 2 * (72 + 2), 2 + 2 * (80 + 2))  # two rows of two, with margins
    labels = ['star: 0.96' if categories is CATEGORIES else '3: 0.96'] * 2
    for i, picture in enumerate(pictures):
        with torch.inference_mode():
            (result,) = model.eval()([picture / 255])
        if builder is mask_rcnn:
            picture = draw_segmentation_masks(picture, result['masks'][:, 0] > 0.5, alpha=0.5, colors=['lime'] * 2)
        expected = draw_bounding_boxes(picture, result['boxes'], labels, ['lime'] * 2, width=2, fill_labels=True)
        top, left = 2 + i // 2 * 74, 2 + i % 2 * 82
        assert torch.equal(found[:, top : top + expected.shape[1], left : left + expected.shape[2]], expected)


def test_a_picture_of_nothing(tmp_path, monkeypatch):
    model = retina_net('resnet18_mrla', **SMALL)  # untrained, so its scores are low
    save_pretrained(model, tmp_path / 'detector')
    name = f'local-dir:{tmp_path}/detector'
    picture = torch.full((3, 64, 80), 90, dtype=torch.uint8)
    to_pil_image(picture).save(tmp_path / 'image.png')
    detect(name, tmp_path / 'image.png', '--out', tmp_path / 'found.png', monkeypatch=monkeypatch)
    with Image.open(tmp_path / 'found.png') as image:
        assert torch.equal(pil_to_tensor(image), picture)


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['{}/detector', '{}/text.pth'], "text.pth' is not an image that Pillow reads"),
        (['{}/detector', '{}/nothing.png'], "there is no image '"),
        (['{}/detector', '{}/image.png', '--out', '{}/found.txt'], "found.txt' does not end like a picture"),
        (['{}/detector', '{}/image.png', '--out', '{}/found.psd'], "found.psd' does not end like a picture"),
        (['local-dir:{}/nowhere', '{}/image.png'], "nowhere' holds no model"),
        (['{}/detector', '{}/image.png', '--out', '{}/nowhere/found.png'], "there is no folder '"),
        (['{}/classifier', '{}/image.png'], 'contains the classifier resnet18_mrla, not a detector'),
        (['{}/detector.pth', '{}/image.png'], 'does not say which detector it is for'),
        (['nowhere', '{}/image.png'], "there is no checkpoint 'nowhere'"),
        (['{}/string', '{}/image.png'], "string' holds no model: its config.json names no architecture"),
        (['{}/list', '{}/image.png'], "list' holds no model: its config.json names no architecture"),
        (['{}/json', '{}/image.png'], "json' holds no model: its config.json cannot be read"),
        (['{}/wrong', '{}/image.png'], "wrong' holds no detector that can be built"),
    ],
)
def test_bad_pictures(args, message, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new('RGB', (8, 8)).save(files / 'image.png')
    before = sorted(files.rglob('*'))
    with pytest.raises(SystemExit) as exit:
        detect(*(arg.format(files) for arg in args), monkeypatch=monkeypatch)
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert sorted(files.rglob('*')) == before
    assert not [*tmp_path.iterdir()]


@pytest.mark.downstream
@pytest.mark.parametrize('builder', ALL)
def test_onnx(builder, tmp_path):
    """With the tracing exporter: torch.export can export neither torchvision's detectors nor ours."""
    import onnxruntime

    model = builder('resnet18_mrla', **SMALL, **ALL[builder])
    randomize(model.backbone.body)
    image = batch()[0][0]
    with torch.inference_mode():
        (expected,) = model.eval()([image])
    assert len(expected['boxes']) > 3
    torch.onnx.export(model, ([image],), tmp_path / 'model.onnx', dynamo=False, opset_version=17)
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx')
    found = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    for (key, x), y in zip(expected.items(), found, strict=True):
        tolerance = 1e-2 if key == 'masks' else 1e-3  # in ONNX, another interpolation pastes the masks
        torch.testing.assert_close(torch.from_numpy(y), x, rtol=tolerance, atol=tolerance)
