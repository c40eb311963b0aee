"""Checks the names, paths and numbers that a user typed, before anything is built, downloaded or written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.utils import validate_repo_id
from timm.models import is_model, model_entrypoint


def check_model_name(name: str) -> None:
    """Raise ValueError if timm's registry has no such model."""
    if not is_model(name):
        raise ValueError(f"there is no model {name!r}; timm.list_models('*_mrla*') lists those with layer attention")


def check_mrla_name(name: str) -> None:
    """Raise ValueError if this package has no such model."""
    check_model_name(name)
    if not model_entrypoint(name.partition('.')[0]).__module__.startswith('timm_mrla.models.'):
        raise ValueError(
            f"{name!r} is no model of timm-mrla; timm.list_models('*_mrla*') lists those, and timm's own "
            'push_to_hf_hub and save_for_hf are for others'
        )


def check_checkpoint(path: str) -> None:
    """Raise ValueError if there is no such file, or nothing in it."""
    if not os.path.isfile(path):
        raise ValueError(f'there is no checkpoint {path!r}')
    if not os.path.getsize(path):
        raise ValueError(f'the checkpoint {path!r} is an empty file')


def check_new_folder(folder: str | os.PathLike) -> None:
    """Raise an OSError if the folder has no name, exists or cannot be made."""
    if not os.fspath(folder):
        raise FileNotFoundError('the name of the folder is empty')
    if os.path.lexists(folder):
        raise FileExistsError(f'{str(folder)!r} exists; remove it or name another folder')
    parent = next(parent for parent in Path(folder).absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f'{str(folder)!r} cannot be made: {str(parent)!r} is no folder that can be written to')


def check_repo(repo_id: str) -> None:
    """Raise ValueError if a repository of the Hub cannot have this name."""
    if '/' not in repo_id:
        raise ValueError(f"{repo_id!r} does not say whose repository it is: 'user/{repo_id}'")
    validate_repo_id(repo_id)


def check_metrics(metrics: dict[str, float] | None, datasets: list[str] | None) -> None:
    """Raise ValueError if there are results without a dataset."""
    if metrics and not datasets:
        raise ValueError(f'the metrics {metrics} need the dataset that they were measured on')


@contextmanager
def explain_build_errors(name: str, model_kwargs: dict[str, Any]) -> Iterator[None]:
    """Turn errors of `timm.create_model` into a ValueError that names the bad arguments, folder or repository."""
    try:
        yield
    except Exception as e:
        cause = e.__cause__ or e
        reason = f'{type(cause).__name__}: {cause}'
        one_sentence = isinstance(e, ValueError | RuntimeError | OSError) and str(e)
        if model_kwargs and not one_sentence:  # timm looks a name up, or computes with a value of another type
            reason = str(e) if isinstance(e, TypeError) else reason
            raise ValueError(f'{name} cannot be built with {model_kwargs}: {reason}') from e
        if ':' not in name:
            raise
        raise ValueError(f'{name!r} holds no model that timm can load: {reason}') from e
