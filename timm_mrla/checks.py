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
    """Raise ValueError if there is no such file."""
    if not os.path.isfile(path):
        raise ValueError(f'there is no checkpoint {path!r}')


def check_new_folder(folder: str | os.PathLike) -> None:
    """Raise FileExistsError if the folder exists, PermissionError if it cannot be made."""
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
        if model_kwargs and isinstance(e, TypeError):
            raise ValueError(f'{name} cannot be built with {model_kwargs}: {e}') from e
        if ':' not in name:
            raise
        reason = e.__cause__ or e
        raise ValueError(f'{name!r} holds no model that timm can load: {type(reason).__name__}: {reason}') from e
