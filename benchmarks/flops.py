"""Parameters and multiply-adds of every entry and of its plain backbone, as the README's table.

    python benchmarks/flops.py

MACs are those of convolutions and matrix products at the entry's input size, as torch.utils.flop_counter counts them.
"""

import re

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import timm_mrla

FAMILIES = ('resnet', 'deit', 'ceit', 'efficientnet', 'pvt_v2')
DEEP_STEM = {'stem_type': 'deep', 'stem_width': 32}


def backbone(name: str) -> tuple[str, dict[str, object]]:
    """The plain timm model of an entry, as arguments of `timm.create_model`. CeiT, which timm lacks, is its own."""
    plain, variant = re.fullmatch(r'(.+)_(mrlab?)', name).groups()
    if plain.startswith('ceit'):
        plain = name
    if plain.startswith('deit'):
        plain += '_patch16_224'
    return plain, DEEP_STEM if plain.startswith('resnet') and variant == 'mrlab' else {}


class Without(nn.Module):
    """In the place of a layer attention: adds nothing."""

    def forward(self, x: torch.Tensor, *args) -> tuple[torch.Tensor, list]:
        return x, args[-1]


def input_size(name: str) -> tuple[int, int, int]:
    """Channels, height and width of an entry's own input."""
    return get_pretrained_cfg(name).input_size


def costs(name: str, size: tuple[int, int, int], plain: bool = False, **kwargs) -> tuple[int, int]:
    """Parameters and MACs of a model of timm's registry, on the meta device; plain drops layer attention."""
    model = timm.create_model(name, device='meta', **kwargs).eval()
    if plain:
        for module in model.modules():
            if hasattr(module, 'mrla'):
                module.mrla = Without()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, *size, device='meta'))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def main() -> None:
    """Print the table."""
    print(f'timm-mrla {timm_mrla.__version__}, timm {timm.__version__}, torch {torch.__version__}\n')
    print('| model | params (M) | MACs (G) | plain backbone | params (M) | MACs (G) | warm start |')
    print('|---|---|---|---|---|---|---|')
    for family in FAMILIES:
        table = {name: costs(name, input_size(name)) for name in timm.list_models(f'{family}*_mrla*')}
        for name in sorted(table, key=table.get):
            plain, kwargs = backbone(name)
            label = 'CeiT' if plain == name else f'`{plain}`' + (', deep stem' if kwargs else '')
            params, macs = table[name]
            plain_params, plain_macs = costs(plain, input_size(name), plain=True, **kwargs)
            weights = ', '.join(n.partition('.')[2] for n in timm.list_pretrained(f'{name}.*')) or 'none'
            print(
                f'| `{name}` | {params / 1e6:.2f} | {macs / 1e9:.3f} '
                f'| {label} | {plain_params / 1e6:.2f} | {plain_macs / 1e9:.3f} | {weights} |'
            )


if __name__ == '__main__':
    main()
