"""Counts parameters and multiply-adds of entries and their plain backbones: the table of docs/models.md.

    python benchmarks/flops.py
    python benchmarks/flops.py --models convnext_tiny_mrla vit_small_patch14_reg4_dinov2_mrla

torch.utils.flop_counter counts the MACs of convolutions and matrix products, at the entry's input size.
"""

import argparse

import timm
import torch
from entries import backbone, family, input_size, paper_entries
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import timm_mrla

FAMILIES = ('resnet', 'deit', 'ceit', 'efficientnet', 'pvt_v2')


class Without(nn.Module):
    """Replaces a layer attention and adds nothing."""

    def forward(self, x: torch.Tensor, *args) -> torch.Tensor:
        return x


def costs(name: str, size: tuple[int, int, int], plain: bool = False, **kwargs) -> tuple[int, int]:
    """Parameters and MACs of a registered model, on the meta device; plain=True removes layer attention."""
    model = timm.create_model(name, device='meta', **kwargs).eval().requires_grad_(False)
    if plain:
        for module in model.modules():
            if hasattr(module, 'mrla'):
                module.mrla = Without()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, *size, device='meta'))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--models', nargs='+', metavar='NAME', help="entries; the paper's by default")
    args = parser.parse_args()
    print(f'timm-mrla {timm_mrla.__version__}, timm {timm.__version__}, torch {torch.__version__}\n')
    print('| model | params (M) | MACs (G) | plain backbone | params (M) | MACs (G) | warm starts |')
    print('|---|---|---|---|---|---|---|')
    table = {name: costs(name, input_size(name)) for name in args.models or paper_entries()}
    for name in table if args.models else sorted(table, key=lambda name: (FAMILIES.index(family(name)), table[name])):
        plain, kwargs = backbone(name)
        label = 'CeiT' if plain == name else f'`{plain}`' + (', deep stem' if kwargs else '')
        params, macs = table[name]
        plain_params, plain_macs = costs(plain, input_size(name), plain=True, **kwargs)
        print(
            f'| `{name}` | {params / 1e6:.2f} | {macs / 1e9:.3f} | {label} '
            f'| {plain_params / 1e6:.2f} | {plain_macs / 1e9:.3f} | {len(timm.list_pretrained(f"{name}.*"))} |'
        )


if __name__ == '__main__':
    main()
