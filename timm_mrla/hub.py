"""Saves trained models to folders that timm loads, loads them, and publishes them on the Hugging Face Hub."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import HfApi, ModelCard
from safetensors import SafetensorError
from timm.models import save_for_hf
from timm.utils import unwrap_model
from torch import nn

from timm_mrla._version import __version__
from timm_mrla.adapters import load_adapter, shrink
from timm_mrla.checkpoints import load_checkpoint
from timm_mrla.checks import check_new_folder, check_repo, explain_build_errors
from timm_mrla.model_card import check_trainable, describe_backbone, model_card
from timm_mrla.models import Adapter, SelfWithOverrides
from timm_mrla.state_dict import gather_state_dict

__all__ = ['load_adapter', 'load_checkpoint', 'load_folder', 'model_card', 'push_to_hub', 'save_pretrained']

# norms among the output scales, all zero as long as layer attention adds nothing; by name, because layers of a sharded
# model do not hold their whole tensors
_OUTPUT_NORM = re.compile(r'\.mrla\.norm(_x)?\.(weight|bias)$')


@contextmanager
def new_folder(folder: str | os.PathLike) -> Iterator[str]:
    """Give a path to make a folder at; move it to its final place afterwards, or leave nothing if an error occurs.

    Raises:
        FileExistsError: The folder exists.
        OSError: It cannot be written.
    """
    check_new_folder(folder)
    parent = Path(folder).absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent) as tmp:
            out = os.path.join(tmp, 'model')
            yield out
            os.rename(out, folder)
    except (OSError, SafetensorError) as e:
        raise OSError(f'{str(folder)!r} cannot be written: {e}') from e


def load_folder(folder: str) -> tuple[nn.Module, ModelCard | None]:
    """Load a model from a folder that timm or `save_pretrained` wrote, and its model card if it has one.

    Raises:
        ValueError: The folder contains no model of timm's, the weights do not fit, or README.md is no model card.
    """
    name, card = f'local-dir:{folder}', os.path.join(folder, 'README.md')
    with explain_build_errors(name, {}):
        model = timm.create_model(name, pretrained=True)
    try:
        return model, ModelCard.load(card) if os.path.exists(card) else None
    except Exception as e:  # a file may contain anything
        raise ValueError(f'{card!r} is no model card: {e}') from e


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike,
    card: ModelCard | None = None,
    data_config: dict[str, Any] | None = None,
) -> None:
    """Write a trained model to a folder that `timm.create_model('local-dir:FOLDER', pretrained=True)` loads.

    Writes config.json, model.safetensors and README.md, or nothing at all if an error occurs. Of an adapter whose
    backbone has the unchanged weights of a tag of timm's, model.safetensors has layer attention, the classifier and
    whatever else was trained; if frozen tensors of the backbone differ from the weights, a warning names them and the
    whole model is written. The model may be wrapped
    by torch.compile, averaging (EMA), data parallelism or sharding (FSDP). Only the first of several processes writes;
    all of them must call this to save a sharded model.

    Args:
        model: A model that `timm.create_model` built.
        folder: The folder, which must not exist yet.
        card: Its model card; by default `model_card(model, 'local-dir:FOLDER')`.
        data_config: How its images were prepared, where this differs from the model's configuration.

    Raises:
        ValueError: The model is not one of this package, or its layer attention was never trained.
        FileExistsError: The folder exists.
        OSError: It cannot be written.
    """
    check_new_folder(folder)
    plain = unwrap_model(model)
    check_trainable(plain)
    state_dict = gather_state_dict(model)
    if not state_dict:  # only the first process has it
        return
    if not any(tensor.any() for name, tensor in state_dict.items() if _OUTPUT_NORM.search(name)):
        raise ValueError(
            'the layer attention of this model adds nothing yet, as a warm start leaves it; train it first'
        )
    card, config = card or model_card(model, f'local-dir:{folder}'), {'requires': ['timm_mrla']}
    if small := shrink(plain, state_dict):
        state_dict, config['model_args'] = small[0], {'mrla_adapter': small[1]}
        describe_backbone(card, plain.backbone_weights, small[1])
    elif isinstance(plain, Adapter):
        config['model_args'] = {'mrla_adapter': True}
    with new_folder(folder) as out:
        view = SelfWithOverrides(plain, state_dict=lambda: state_dict)
        save_for_hf(view, out, model_config=config, data_config=data_config, safe_serialization=True)
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

    Creates the repository if it does not exist. A model card in the repository is kept. The weights are uploaded as
    safetensors only.

    Args:
        model: A model that `timm.create_model` built.
        repo_id: The repository, 'user/name'.
        card: The model card; by default `model_card(model, 'hf-hub:user/name')`. If its code loads the model from a
            folder, the code is changed to load it from the repository.
        token: A token of the Hub; by default the token of the user who is logged in.
        private: Whether a new repository is private; by default the setting of the user's account.
        commit_message: Message of the commit.

    Returns:
        The address of the repository.

    Raises:
        ValueError: The model is not one of this package, its layer attention was never trained, or repo_id names no
            owner.
        RuntimeError: The Hub cannot be reached, or refuses.
    """
    check_repo(repo_id)
    card = card or model_card(model, f'hf-hub:{repo_id}')
    literal = r"""(['"`])local-dir:(\\.|(?!\1).)+\1"""  # in quotes, which the folder's name may have too
    card.content = re.sub(literal, f"'hf-hub:{repo_id}'", card.content)
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
    """Upload a folder to a repository of the Hub, if this process wrote it; arguments as for `push_to_hub`."""
    api = HfApi(token=token, library_name='timm-mrla', library_version=__version__)
    if os.path.exists(folder):
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            ignore = ['README.md'] if api.file_exists(repo_id, 'README.md') else None
            api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=commit_message, ignore_patterns=ignore
            )
        except Exception as e:  # also errors of the HTTP library, which differs between versions of the client
            raise RuntimeError(f'{repo_id} cannot be pushed: {e}') from e
    return f'{api.endpoint}/{repo_id}'
