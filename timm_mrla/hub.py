"""Trained models as folders that timm loads and as repositories of the Hugging Face Hub."""

import os
import re
import tempfile
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from timm.layers import to_2tuple, to_ntuple
from timm.models import get_pretrained_cfg, is_model, load_state_dict, model_entrypoint, save_for_hf
from timm.utils import unwrap_model
from torch import nn

import timm_mrla.models
from timm_mrla.layers import MrlaLight, layer_attentions
from timm_mrla.models._loops import SelfWithOverrides
from timm_mrla.models._weights import StateDict, convert_state_dict

__all__ = ['load_checkpoint', 'load_folder', 'model_card', 'push_to_hub', 'save_pretrained']

_GATE = re.compile(r'\.mrla\.norm(_x)?\.(weight|bias)$')  # of these, all are zero until layer attention adds something


def check_model(name: str) -> None:
    """Raises ValueError if timm's registry has no model of a name."""
    if not is_model(name):
        raise ValueError(f"there is no model {name!r}; timm.list_models('*_mrla*') lists those with layer attention")


def check_ours(name: str) -> None:
    """Raises ValueError if a name is that of no model of this package."""
    check_model(name)
    if not model_entrypoint(name.partition('.')[0]).__module__.startswith(timm_mrla.models.__name__):
        raise ValueError(
            f"{name!r} is no model of timm-mrla; timm.list_models('*_mrla*') lists those, and timm's own "
            'push_to_hf_hub and save_for_hf are for others'
        )


@contextmanager
def built_with(name: str, model_kwargs: dict[str, Any]) -> Iterator[None]:
    """Makes a ValueError of arguments that a model cannot be built with, or of what its folder or repository holds."""
    try:
        yield
    except Exception as e:
        if model_kwargs and isinstance(e, TypeError):
            raise ValueError(f'{name} cannot be built with {model_kwargs}: {e}') from e
        if ':' not in name:
            raise
        reason = e.__cause__ or e
        raise ValueError(f'{name!r} holds no model that timm can load: {type(reason).__name__}: {reason}') from e


def check_file(path: str) -> None:
    """Raises ValueError if there is no such checkpoint."""
    if not os.path.isfile(path):
        raise ValueError(f'there is no checkpoint {path!r}')


def check_new(folder: str | os.PathLike) -> None:
    """Raises FileExistsError if a folder exists, and another OSError if it cannot be made."""
    if os.path.lexists(folder):
        raise FileExistsError(f'{str(folder)!r} exists; remove it or name another folder')
    parent = next(parent for parent in Path(folder).absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f'{str(folder)!r} cannot be made: {str(parent)!r} is no folder that can be written to')


def check_repo(repo_id: str) -> None:
    """Raises ValueError if an identifier is that of no repository."""
    if '/' not in repo_id:
        raise ValueError(f"{repo_id!r} does not say whose repository it is: 'user/{repo_id}'")
    validate_repo_id(repo_id)


def check_metrics(metrics: dict[str, float] | None, datasets: list[str] | None) -> None:
    """Raises ValueError if there are results on no dataset."""
    if metrics and not datasets:
        raise ValueError(f'the metrics {metrics} need the dataset that they were measured on')


@contextmanager
def new_folder(folder: str | os.PathLike) -> Iterator[str]:
    """A folder to make and write to, elsewhere: it gets its name once all is written, or is not there.

    Raises:
        FileExistsError: The folder exists.
        OSError: It cannot be written.
    """
    check_new(folder)
    parent = Path(folder).absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent) as tmp:
            out = os.path.join(tmp, 'model')
            yield out
            os.rename(out, folder)
    except (OSError, SafetensorError) as e:
        raise OSError(f'{str(folder)!r} cannot be written: {e}') from e


def read_checkpoint(path: str) -> StateDict:
    """Read the state dict that a training script wrote; nothing in the checkpoint is run.

    Values that are not finite, as of training that diverged, are a warning.

    Raises:
        ValueError: There is no such file, or it holds more than weights.
    """
    check_file(path)
    try:
        state_dict = convert_state_dict(load_state_dict(path))
    except Exception as e:  # whatever a file may hold
        reason = '. '.join(str(e).split('. ')[:2])  # what timm says after that is of no use here
        raise ValueError(f'{path!r} cannot be read as weights alone: {type(e).__name__}: {reason}') from e
    for name, tensor in state_dict.items():
        if isinstance(tensor, torch.Tensor) and not tensor.float().isfinite().all():
            warnings.warn(f'{path!r} has values in {name} that are not finite', stacklevel=2)
            break
    return state_dict


def load_checkpoint(path: str, model_name: str, **model_kwargs) -> nn.Module:
    """Load what a training script wrote, timm's or the authors' of the paper.

    The averaged (EMA) weights are taken where there are any, as timm does. Nothing in the checkpoint is run.

    Args:
        path: The file, in torch's or safetensors' format: a state dict, bare or with optimizer and epoch beside it.
        model_name: The model, by its name in timm's registry.
        **model_kwargs: Arguments of `timm.create_model` that it was trained with. The number of classes need not be
            among them: it is the checkpoint's.

    Raises:
        ValueError: There is no such model or file, the file holds more than weights, or it does not fit; or it embeds
            positions on a grid, and no img_size says on which, since 8 x 18 are as many as 12 x 12.
    """
    check_model(model_name)
    state_dict = read_checkpoint(path)
    if any(name.startswith('backbone.body.') for name in state_dict):
        raise ValueError(f'{path!r} is of a detector, not of {model_name}: `weights` of timm_mrla.detection takes it')

    if 'img_size' not in model_kwargs and getattr(state_dict.get('pos_embed'), 'ndim', 0) == 3:
        raise ValueError(
            f'{path!r} does not say for which size its pos_embed is; give the img_size, such as img_size=224'
        )
    classifier = to_ntuple(1)(get_pretrained_cfg(model_name).classifier)[0]
    if f'{classifier}.weight' in state_dict:
        model_kwargs.setdefault('num_classes', len(state_dict[f'{classifier}.weight']))
    overlay = {'state_dict': state_dict, 'num_classes': model_kwargs.get('num_classes', 1000)}
    if 'img_size' in model_kwargs:  # from which timm infers the grid that is in the checkpoint
        overlay['input_size'] = (3, *to_2tuple(model_kwargs['img_size']))
    try:
        with built_with(model_name, model_kwargs):
            model = timm.create_model(model_name, pretrained=True, pretrained_cfg_overlay=overlay, **model_kwargs)
    except RuntimeError as e:
        reason = textwrap.shorten(str(e.__cause__ or e), 800, placeholder=' ...')  # torch names each parameter
        raise ValueError(f'{path!r} does not fit: {reason}') from e
    for name, tensor in model.state_dict().items():
        if name in state_dict and state_dict[name].shape != tensor.shape:
            shapes = f'{tuple(state_dict[name].shape)} and not {tuple(tensor.shape)}'
            raise ValueError(f'{path!r} does not fit: its {name} is {shapes}; give the img_size that it was trained at')
    del model.pretrained_cfg['state_dict']
    return model


def load_folder(folder: str) -> tuple[nn.Module, ModelCard | None]:
    """Load the model in a folder that timm wrote or `save_pretrained`, and its model card, if it has one.

    Raises:
        ValueError: There is no model of timm's in the folder, it does not fit, or README.md is no model card.
    """
    name, card = f'local-dir:{folder}', os.path.join(folder, 'README.md')
    with built_with(name, {}):
        model = timm.create_model(name, pretrained=True)
    try:
        return model, ModelCard.load(card) if os.path.exists(card) else None
    except Exception as e:  # whatever a file may hold
        raise ValueError(f'{card!r} is no model card: {e}') from e


def _check_layers(model: nn.Module) -> None:
    """Raises ValueError if a model has no layer attention of ours, as one that could be trained further."""
    check_ours(model.pretrained_cfg['architecture'])
    if not layer_attentions(model):
        raise ValueError('a reparameterized model is for inference alone; save the one that it was made from')


def _about_layers(model: nn.Module) -> str:
    """What people ask about the layer attention of a model, as a section of its card."""
    layers = layer_attentions(model)
    blocks = [name.removesuffix('.mrla') for name in layers]
    count, added = (sum(p.numel() for m in ms for p in m.parameters()) for ms in ([model], layers.values()))
    head = to_ntuple(1)(model.pretrained_cfg['classifier'])
    kernels = {layer.v.out_channels: layer.attn.qk.kernel_size[1] for layer in layers.values()}
    if isinstance(layers[f'{blocks[-1]}.mrla'], MrlaLight):
        target = f"what you would in timm's plain backbone, such as `model.get_submodule('{blocks[-1]}')`"
    else:
        target = 'a stage or a layer in a block: a block itself returns its memory beside its output'
    return f"""## Layer attention

{len(blocks)} blocks have it, `{blocks[0]}` to `{blocks[-1]}`, each as its child `mrla`,
{added:,} of {count:,} parameters.

- **As an adapter**: PEFT's `modules_to_save={['mrla', *head]}` trains it and the head alone. LoRA's usual
  `target_modules`, such as `qkv` and `fc1`, are names of the backbone's layers and of none in it.
- **For Grad-CAM** name {target}.
- **The kernels of queries and keys**, by the block's channels: {', '.join(f'{k} at {c}' for c, k in kernels.items())}.
- **In bfloat16** a checkpoint keeps 8 bits of each weight, two to three decimals.
"""


def model_card(
    model: nn.Module,
    name: str,
    license: str | None = None,
    datasets: list[str] | None = None,
    base_model: str | None = None,
    metrics: dict[str, float] | None = None,
) -> ModelCard:
    """The model card of a trained model, with the code that loads it.

    Args:
        model: The model.
        name: What `timm.create_model` is to load, such as 'hf-hub:user/resnet50_mrla.in1k'.
        license: Identifier of the licence, that of the model's configuration if None.
        datasets: Identifiers of the Hub's datasets that it was trained on.
        base_model: Repository of the model that it was trained from.
        metrics: Results on the first dataset by the Hub's identifier of the metric, such as `{'accuracy': 0.792}`.

    Raises:
        ValueError: There are metrics and no dataset, or the model has no layer attention of ours.
    """
    check_metrics(metrics, datasets)
    model = unwrap_model(model)
    _check_layers(model)
    architecture = model.pretrained_cfg['architecture']
    title = name.rpartition('/')[2].rpartition(':')[2]
    data = ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'timm-mrla', 'layer-attention'],
        license=license or model.pretrained_cfg.get('license'),
        datasets=datasets,
        base_model=base_model,
        model_name=title,
        eval_results=[
            EvalResult(
                task_type='image-classification',
                dataset_type=datasets[0],
                dataset_name=datasets[0],
                metric_type=metric,
                metric_value=value,
            )
            for metric, value in (metrics or {}).items()
        ]
        or None,
    )
    mode = 'L' if timm.data.resolve_model_data_config(model)['input_size'][0] == 1 else 'RGB'
    return ModelCard(f"""---
{data.to_yaml()}
---
# {title}

{model_entrypoint(architecture).__doc__.strip()} `{architecture}` of [timm-mrla](https://pypi.org/project/timm-mrla),
timm's backbone with layer attention ([MRLA, ICLR 2023](https://arxiv.org/abs/2302.03985)).

## Model Usage

`pip install timm-mrla`, then

```python
import timm
import timm_mrla  # registers the model
import torch
from PIL import Image

model = timm.create_model('{name}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = Image.open('image.jpg').convert('{mode}')
with torch.inference_mode():
    probabilities = model(transform(image).unsqueeze(0)).softmax(dim=1)
```

{_about_layers(model)}""")


def full_state_dict(model: nn.Module) -> StateDict:
    """The state dict of the model in what is wrapped around it, whole and contiguous; of the first process alone."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict  # slow to import

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state_dict = convert_state_dict(get_model_state_dict(model, options=options))
    return {name: tensor.contiguous() for name, tensor in state_dict.items()}


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike,
    card: ModelCard | None = None,
    data_config: dict[str, Any] | None = None,
) -> None:
    """Write a trained model to a folder that `timm.create_model('local-dir:FOLDER', pretrained=True)` loads.

    The folder gets config.json, model.safetensors and README.md, or is not there. What compilation, averaging (EMA),
    data parallelism or sharding (FSDP) wrap around the model is seen through. Of several processes only the first
    writes; a sharded model is saved by all of them together.

    Args:
        model: A model that `timm.create_model` built.
        folder: The folder, which must not exist yet.
        card: Its model card, `model_card(model, 'local-dir:FOLDER')` if None.
        data_config: How its images were prepared, where this differs from the model's configuration.

    Raises:
        ValueError: The model has no layer attention of ours, or one that was never trained.
        FileExistsError: The folder exists.
        OSError: It cannot be written.
    """
    check_new(folder)
    plain = unwrap_model(model)
    _check_layers(plain)
    state_dict = full_state_dict(model)
    if not state_dict:  # the first process has it
        return
    if not any(tensor.any() for name, tensor in state_dict.items() if _GATE.search(name)):
        raise ValueError(
            'the layer attention of this model adds nothing yet, as a warm start leaves it; train it first'
        )
    card = card or model_card(model, f'local-dir:{folder}')
    requires = {'requires': ['timm_mrla']}
    with new_folder(folder) as out:
        view = SelfWithOverrides(plain, state_dict=lambda: state_dict)
        save_for_hf(view, out, model_config=requires, data_config=data_config, safe_serialization=True)
        card.save(os.path.join(out, 'README.md'))


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    card: ModelCard | None = None,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str = 'Add model',
) -> str:
    """Publish a trained model in a repository of the Hugging Face Hub, as timm's `push_to_hf_hub` does.

    The repository is made if there is none; a model card that it has stays. The weights go as safetensors alone.

    Args:
        model: A model that `timm.create_model` built.
        repo_id: The repository, 'user/name'.
        card: The model card, `model_card(model, 'hf-hub:user/name')` if None. Where it loads the model from a folder,
            it is made to load it from the repository.
        token: A token of the Hub, the one that is logged in if None.
        private: Whether a new repository is private, what the user's account says if None.
        commit_message: Message of the commit.

    Returns:
        The address of the repository.

    Raises:
        ValueError: The model has no layer attention of ours, or one that was never trained; repo_id has no owner.
        RuntimeError: The Hub cannot be reached, or refuses.
    """
    check_repo(repo_id)
    card = card or model_card(model, f'hf-hub:{repo_id}')
    card.content = re.sub(r'local-dir:[^\'"`]+', f'hf-hub:{repo_id}', card.content)
    with tempfile.TemporaryDirectory() as tmp:
        folder = os.path.join(tmp, 'model')
        save_pretrained(model, folder, card)
        return upload(folder, repo_id, token, private, commit_message)


def upload(
    folder: str,
    repo_id: str,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str = 'Add model',
) -> str:
    """Publish a folder in a repository of the Hub, if this process has written it; else as `push_to_hub`."""
    api = HfApi(token=token, library_name='timm-mrla', library_version=timm_mrla.__version__)
    if os.path.exists(folder):
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            ignore = ['README.md'] if api.file_exists(repo_id, 'README.md') else None
            api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=commit_message, ignore_patterns=ignore
            )
        except Exception as e:  # among them those of the HTTP library, which changes with the client's version
            raise RuntimeError(f'{repo_id} cannot be pushed: {e}') from e
    return f'{api.endpoint}/{repo_id}'
