"""Writes model cards: metadata for the Hugging Face Hub, code that loads the model, facts about its layer attention."""

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.data import resolve_input_data_config
from timm.layers import to_ntuple
from timm.models import PretrainedCfg, model_entrypoint
from timm.utils import unwrap_model
from torch import nn

from timm_mrla.checks import check_metrics, check_mrla_name
from timm_mrla.layers import MrlaLight, layer_attentions
from timm_mrla.layers.folding import is_folded
from timm_mrla.models import is_lost, weights_source

__all__ = ['IMAGE_MODES', 'INSTALL', 'check_trainable', 'model_card']

# true before and after the first release
INSTALL = """Install the package timm-mrla: `pip install timm-mrla` if PyPI has it, or else `pip install .` in a clone
of its repository. Then"""
IMAGE_MODES = {1: 'L', 3: 'RGB'}  # channels -> Pillow's mode of images with so many


def check_trainable(model: nn.Module) -> None:
    """Raise ValueError if a model is not of this package, a feature extractor, reparameterized, or lost its layers."""
    if 'classifier' not in model.pretrained_cfg:
        raise ValueError('a feature extractor has no classifier: save the whole model, without features_only')
    check_mrla_name(model.pretrained_cfg['architecture'])
    if any(is_folded(layer.norm) for layer in layer_attentions(model).values()):
        raise ValueError('a reparameterized model is for inference alone; save the one that it was made from')
    if lost := [name for name, module in model.named_modules() if is_lost(module)]:
        raise ValueError(f'the class of {", ".join(lost)} was changed, so its layer attention was never trained')


def _describe_layers(model: nn.Module) -> str:
    """A section of the card on layer attention: where it is, and what adapters and Grad-CAM need to know."""
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


def describe_backbone(card: ModelCard, weights: PretrainedCfg, fingerprint: str) -> None:
    """Say in the card of a saved adapter which weights its backbone has, once."""
    if card.data.get('base_model_relation') == 'adapter':
        return
    card.data.base_model = card.data.base_model or weights.hf_hub_id
    card.data.base_model_relation = 'adapter'
    card.text += f"""
## Backbone

`model.safetensors` contains what was trained: layer attention and the classifier. The backbone has the weights of
{weights_source(weights)}, unchanged, which timm loads first. Their fingerprint is `{fingerprint}`.
"""


def _usage(model: nn.Module, name: str) -> str:
    """Code that loads the model and runs it on an image file, or on a tensor if no image file has its channels."""
    size = resolve_input_data_config(model)['input_size']
    load = f'model = timm.create_model({name!r}, pretrained=True).eval()'
    if size[0] not in IMAGE_MODES:
        return f"""import timm
import timm_mrla  # registers the model
import torch

{load}
x = torch.zeros{(1, *size)}  # an image of {size[0]} channels, prepared as in training
with torch.inference_mode():
    probabilities = model(x).softmax(dim=1)"""
    return f"""import timm
import timm_mrla  # registers the model
import torch
from PIL import Image

{load}
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = Image.open('image.jpg').convert({IMAGE_MODES[size[0]]!r})
with torch.inference_mode():
    probabilities = model(transform(image).unsqueeze(0)).softmax(dim=1)"""


def model_card(
    model: nn.Module,
    name: str,
    license: str | None = None,
    datasets: list[str] | None = None,
    base_model: str | None = None,
    metrics: dict[str, float] | None = None,
) -> ModelCard:
    """Write the model card of a trained model, with the code that loads it.

    Args:
        model: The model.
        name: The name that `timm.create_model` loads it by, such as 'hf-hub:user/resnet50_mrla.in1k'.
        license: Identifier of the licence; by default the licence in the model's configuration.
        datasets: Identifiers of the Hub's datasets that the model was trained on.
        base_model: Repository of the model that training started from.
        metrics: Results on the first dataset by the Hub's identifier of the metric, such as `{'accuracy': 0.792}`.

    Raises:
        ValueError: There are metrics without a dataset, or the model is not one of this package.
    """
    check_metrics(metrics, datasets)
    model = unwrap_model(model)
    check_trainable(model)
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
    return ModelCard(f"""---
{data.to_yaml()}
---
# {title}

{model_entrypoint(architecture).__doc__.strip()} `{architecture}` of timm-mrla, timm's
backbone with layer attention ([MRLA, ICLR 2023](https://arxiv.org/abs/2302.03985)).

## Model Usage

{INSTALL}

```python
{_usage(model, name)}
```

{_describe_layers(model)}""")
