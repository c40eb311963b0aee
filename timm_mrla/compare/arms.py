"""The arms of a comparison: a model with layer attention, and its plain backbone."""

from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass

import timm
from timm.models import is_model_pretrained
from timm.utils import ParseKwargs

from timm_mrla.checks import check_model_name, explain_build_errors
from timm_mrla.models import BACKBONES, MODEL_ARGS, TAG


@dataclass(frozen=True)
class Arm:
    """A model that is trained once for each seed, and arguments to build it with, beside the user's."""

    model: str
    model_args: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The model and its arguments."""
        return '+'.join((self.model, *self.model_args))

    @property
    def is_plain(self) -> bool:
        """Whether the model has no layer attention."""
        return self.model.partition('.')[0] not in BACKBONES

    def kwargs(self, shared: Iterable[str]) -> list[str]:
        """The arguments of all arms that are for this model too, and its own."""
        return [*(arg for arg in shared if not (self.is_plain and arg.startswith('mrla_'))), *self.model_args]

    def check(self, shared: Iterable[str]) -> None:
        """Raise ValueError if the model cannot be built with its arguments; they are read as train.py does."""
        kwargs = self.kwargs(shared)
        for arg in kwargs:
            name, equals, _ = arg.partition('=')
            if not (name and equals):
                raise ValueError(f'{arg!r} of {self.name} is no argument with a value, such as mrla_identity=True')
        ParseKwargs([], 'kwargs')(None, parsed := Namespace(), kwargs)
        with explain_build_errors(self.model, parsed.kwargs):
            timm.create_model(self.model, device='meta', **parsed.kwargs)


def plain_and_ours(name: str, kwargs: Iterable[str] = ()) -> tuple[Arm, Arm]:
    """The arms for a model: its plain backbone, and the model itself.

    Args:
        name: The model, and arguments of its own as `MODEL+KEY=VALUE`. Those that begin with `mrla_` are not for the
            plain backbone.
        kwargs: Arguments `KEY=VALUE` of all arms. They replace those that the model has for its backbone.
    """
    model, *own = name.split('+')
    check_model_name(model)
    name, _, tag = model.partition('.')
    if name not in BACKBONES:
        raise ValueError(f'{model!r} has no plain backbone in timm that it could be compared with')
    if tag and not is_model_pretrained(model):
        raise ValueError(f"{name} has no warm start {tag!r}; timm.list_pretrained('{name}.*') lists those it has")
    plain = '.'.join(filter(None, (BACKBONES[name], tag.removeprefix(TAG))))
    given = {arg.partition('=')[0] for arg in (*kwargs, *own)}
    plain_args = [f'{key}={value}' for key, value in MODEL_ARGS.get(name, {}).items() if key not in given]
    return Arm(plain, (*plain_args, *(arg for arg in own if not arg.startswith('mrla_')))), Arm(model, (*own,))
