"""What the benchmarks and the tests ask about the models of this package: plain backbone, input size, family."""

import timm
from timm.models import get_pretrained_cfg, model_entrypoint

from timm_mrla.models import BACKBONES, MODEL_ARGS


def backbone(name: str) -> tuple[str, dict[str, object]]:
    """The plain timm model of an entry, as arguments of `timm.create_model`. timm has no CeiT: its own entry."""
    return BACKBONES.get(name, name), MODEL_ARGS.get(name, {})


def input_size(name: str) -> tuple[int, int, int]:
    """Channels, height and width of an entry's default input."""
    return get_pretrained_cfg(name).input_size


def paper_entries() -> list[str]:
    """The entries of the paper's families."""
    light = [f'resnet{d}_mrla' for d in (18, 34, 50, 101, 152)] + [f'efficientnet_b{i}_mrla' for i in range(3)]
    light += timm.list_models(['deit_*_mrla', 'ceit_*_mrla'], exclude_filters='*384*') + [
        f'pvt_v2_b{i}_mrla' for i in range(6)
    ]
    return light + timm.list_models('*_mrlab')


def family(name: str) -> str:
    """The name of the module that defines an entry."""
    return model_entrypoint(name).__module__.rpartition('.')[2]
