"""Saves detectors to folders, loads them, and publishes them on the Hugging Face Hub."""

import json
import os
import tempfile
from pathlib import Path

import safetensors.torch
from huggingface_hub import ModelCard, ModelCardData
from timm.utils import unwrap_model
from torchvision.models.detection import MaskRCNN

from timm_mrla.checks import check_repo
from timm_mrla.detection.backbone import Detector
from timm_mrla.detection.build import build_detector
from timm_mrla.detection.weights import open_weights
from timm_mrla.hub import new_folder, upload
from timm_mrla.model_card import INSTALL
from timm_mrla.state_dict import gather_state_dict


def from_pretrained(name: str) -> Detector:
    """Load a detector from a folder, by its path or `local-dir:` name, or from the Hub, by its `hf-hub:` name.

    Raises:
        ValueError: There is no detector that `save_pretrained` wrote, or it cannot be downloaded or read.
    """
    saved, _ = open_weights(name)
    if 'backbone' not in saved:
        raise ValueError(f'{name!r} does not say which detector it is for: build the detector, with weights={name!r}')
    try:
        return build_detector(saved['architecture'], saved['backbone'], weights=name)
    except (TypeError, LookupError, AttributeError) as e:  # config.json may contain anything
        raise ValueError(f'{name!r} holds no detector that can be built: {type(e).__name__}: {e}') from e


def save_pretrained(model: Detector, folder: str | os.PathLike) -> None:
    """Write a detector to a folder that `from_pretrained` and `weights` load.

    Writes config.json, model.safetensors and README.md, or nothing at all if an error occurs.

    Args:
        model: A detector that a function of `timm_mrla.detection` built.
        folder: The folder, which must not exist yet.

    Raises:
        ValueError: The detector was built elsewhere, or has an argument that JSON cannot hold.
        FileExistsError: The folder exists.
        OSError: It cannot be written.
    """
    _save(model, folder, str(folder))


def _save(model: Detector, folder: str | os.PathLike, name: str) -> None:
    """Write the folder; the code in the model card loads the detector by this name."""
    plain = unwrap_model(model)
    if not hasattr(plain, 'config'):
        raise ValueError(
            'this detector was not built by timm_mrla.detection, so that nothing says how to build it again'
        )
    try:
        config = json.dumps({**plain.config, 'requires': ['timm_mrla']}, indent=2)
    except TypeError as e:
        raise ValueError(f'this detector has an argument that config.json cannot hold: {e}') from e
    state_dict = gather_state_dict(model)
    if not state_dict:  # only the first process has it
        return
    with new_folder(folder) as out:
        os.mkdir(out)
        Path(out, 'config.json').write_text(config)
        safetensors.torch.save_file(state_dict, os.path.join(out, 'model.safetensors'), {'format': 'pt'})
        _model_card(plain, name).save(os.path.join(out, 'README.md'))


def _model_card(model: Detector, name: str) -> ModelCard:
    kind, backbone = type(model).__name__, model.config['backbone']
    task = 'image-segmentation' if isinstance(model, MaskRCNN) else 'object-detection'
    data = ModelCardData(library_name='timm-mrla', pipeline_tag=task, tags=[task, 'timm-mrla', 'layer-attention'])
    return ModelCard(f"""---
{data.to_yaml()}
---
# {name.rpartition('/')[2].rpartition(':')[2]}

torchvision's {kind} with a feature pyramid on `{backbone}` of timm, by timm-mrla.

## Model Usage

{INSTALL}

```python
import torch
from PIL import Image
from timm_mrla.detection import from_pretrained
from torchvision.transforms.functional import to_tensor

model = from_pretrained({name!r}).eval()
image = to_tensor(Image.open('image.jpg').convert('RGB'))
with torch.inference_mode():
    detections = model([image])[0]
```
""")


def push_to_hub(
    model: Detector,
    repo_id: str,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str = 'Add model',
) -> str:
    """Publish a detector in a repository of the Hugging Face Hub; arguments as for `timm_mrla.hub.push_to_hub`."""
    check_repo(repo_id)
    with tempfile.TemporaryDirectory() as tmp:
        folder = os.path.join(tmp, 'model')
        _save(model, folder, f'hf-hub:{repo_id}')
        return upload(folder, repo_id, token, private, commit_message)
