"""The arms of a comparison: a model with layer attention, and its plain backbone."""

from collections.abc import Iterable
from dataclasses import dataclass

from timm.models import is_model_pretrained

from timm_mrla.checks import check_model_name
from timm_mrla.models._registry import BACKBONES, MODEL_ARGS
from timm_mrla.models._weights import TAG


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


def plain_and_ours(name: str, kwargs: Iterable[str] = ()) -> tuple[Arm, Arm]:
    """The arms for a model: its plain backbone, and the model itself.

    Args:
        name: The model, and arguments of its own as `MODEL+KEY=VALUE`. Those that begin with `mrla_` are not for the
            plain backbone.
        kwargs: Arguments `KEY=VALUE` of all arms. They replace those that the model's entry has for its backbone.
    """
    model, *own = name.split('+')
    check_model_name(model)
    for arg in own:
        if '=' not in arg:
            raise ValueError(f'{arg!r} in {name!r} is no argument with a value, such as mrla_identity=True')
    entry, _, tag = model.partition('.')
    if entry not in BACKBONES:
        raise ValueError(f'{model!r} has no plain backbone in timm that it could be compared with')
    if tag and not is_model_pretrained(model):
        raise ValueError(f"{entry} has no warm start {tag!r}; timm.list_pretrained('{entry}.*') lists those it has")
    plain = '.'.join(filter(None, (BACKBONES[entry], tag.removeprefix(TAG))))
    given = {arg.partition('=')[0] for arg in (*kwargs, *own)}
    stock = [f'{key}={value}' for key, value in MODEL_ARGS.get(entry, {}).items() if key not in given]
    return Arm(plain, (*stock, *(arg for arg in own if not arg.startswith('mrla_')))), Arm(model, (*own,))
