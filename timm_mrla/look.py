"""Looks at a model by name, with images and checkpoints from files, and writes the picture."""

import os
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
from matplotlib.figure import Figure
from timm.data import create_transform, resolve_model_data_config

from timm_mrla.attention import by_block, feature_maps, find, layer_attention
from timm_mrla.checkpoints import load_checkpoint
from timm_mrla.checks import check_checkpoint, check_model_name, explain_build_errors
from timm_mrla.picture import check_picture, open_image
from timm_mrla.plot import plot_attention, plot_feature_maps

__all__ = ['look']


def look(
    model: str,
    images: list[str],
    out: str,
    checkpoints: list[str] | None = None,
    pretrained: bool = False,
    heads: bool = False,
    features: str | None = None,
    npz: bool = False,
    **model_kwargs,
) -> None:
    """Draw the layer attention of a model, each checkpoint's and each image's side by side.

    Args:
        model: A name that `timm.create_model` takes.
        images: Paths of images.
        out: Path of the picture; its ending says which of matplotlib's formats it has.
        checkpoints: Paths of what a training script wrote, as for `timm_mrla.hub.load_checkpoint`.
        pretrained: Take the weights that come with the model.
        heads: Draw each head.
        features: Name of a block whose maps before and after layer attention are drawn instead.
        npz: Write the numbers too, next to the picture: the arrays of `layer_attention` by stage or those of
            `feature_maps` as `before` and `after`, in the order in which the picture has them from left to right.
        **model_kwargs: Arguments of `timm.create_model`, those that the checkpoints were trained with.

    Raises:
        ValueError: There is no such model or block, or a file is not what it should be.
        RuntimeError: The weights that come with the model cannot be had.
        OSError: There is no such file, or the picture cannot be written.
    """
    out = Path(out)
    check_picture(out, {f'.{ending}' for ending in Figure().canvas.get_supported_filetypes()})
    for path in checkpoints or []:
        check_checkpoint(path)
    opened = [open_image(image) for image in images]

    if ':' not in model:  # else timm finds out what model it is in a folder or repository
        check_model_name(model)
    with explain_build_errors(model, model_kwargs):
        skeleton = timm.create_model(model, device='meta', **model_kwargs)
    find(skeleton, features) if features else by_block(skeleton)

    found, titles = [], []
    for checkpoint in checkpoints or [None]:
        if checkpoint:
            net = load_checkpoint(checkpoint, model, **model_kwargs)
        else:
            with explain_build_errors(model, model_kwargs):
                net = timm.create_model(model, pretrained=pretrained, **model_kwargs)
        data_config = resolve_model_data_config(net)
        transform = create_transform(**data_config)
        mode = 'L' if data_config['input_size'][0] == 1 else 'RGB'
        batch = torch.stack([transform(image.convert(mode)) for image in opened])
        found.append(feature_maps(net, batch, features) if features else layer_attention(net, batch))
        weights = checkpoint or (model if pretrained else 'random weights')
        titles += [f'{image}, {weights}' for image in images]
    name = net.pretrained_cfg['architecture']

    if features:
        before, after = (torch.cat(maps) for maps in zip(*found, strict=True))
        numbers = {'before': before, 'after': after}
        figure = plot_feature_maps(before, after, f'Layer attention in {features} of {name}', titles)
    else:
        numbers = found[0]
        numbers.update({stage: torch.cat([attention[stage] for attention in found]) for stage in numbers})
        figure = plot_attention(numbers, f'What the blocks of {name} retrieve', titles, heads)
    with tempfile.TemporaryDirectory(dir=out.parent) as tmp:
        figure.savefig(Path(tmp, out.name))
        if npz:
            np.savez(Path(tmp, 'numbers.npz'), **{name: x.numpy() for name, x in numbers.items()})
            os.replace(Path(tmp, 'numbers.npz'), out.with_suffix('.npz'))
        os.replace(Path(tmp, out.name), out)
