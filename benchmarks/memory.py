"""Measures the bytes that a training step saves for backward, relative to timm's plain backbone.

    python benchmarks/memory.py --models resnet50_mrla resnet50_mrlab

It counts each storage that autograd saves once, without parameters. On CUDA, it also measures peak allocated memory.
"""

import argparse
import itertools

import timm
import torch
from entries import backbone, input_size
from report import report
from torch import nn
from tqdm import tqdm

import timm_mrla


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes of the storages that a forward pass saves for backward."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)  # noqa: F841  keeps saved tensors alive, so that no address is reused
    return sum(size for pointer, size in saved.items() if pointer not in parameters)


def measure(name: str, kwargs: dict[str, object], entry: str, args: argparse.Namespace) -> tuple[float, float]:
    """MiB saved for backward, and peak MiB of a training step, both per image."""
    where = {'device': args.device, 'memory_format': torch.channels_last}
    model, x = timm.create_model(name, **kwargs).to(**where).train(), torch.randn(args.batch_size, *input_size(entry))
    x, peak = x.to(**where), 0
    with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == 'bfloat16'):
        saved = saved_bytes(model, x)
        if args.device == 'cuda':
            torch.cuda.reset_peak_memory_stats()
            model(x).sum().backward()
            peak = torch.cuda.max_memory_allocated()
    return saved / 2**20 / args.batch_size, peak / 2**20 / args.batch_size


def main() -> None:
    """Measure all models and print their table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--models', nargs='+', default=['resnet50_mrla'])
    parser.add_argument('--batch-size', type=int, default=2)
    parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
    parser.add_argument('--fused', nargs='+', choices=('on', 'off'), default=['on'], help='kernels, on a GPU')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--json', metavar='PATH', help='write the results there too')
    args = parser.parse_args()

    rows = []
    for entry in tqdm(args.models):
        plain, kwargs = backbone(entry)
        plain_saved, plain_peak = measure(plain, kwargs, entry, args)
        for fused, recompute in itertools.product(args.fused, (False, True)):
            timm_mrla.set_fused(fused == 'on')
            saved, peak = measure(entry, {'mrla_recompute': recompute}, entry, args)
            row = {
                'model': entry,
                'fused': fused,
                'mrla_recompute': recompute,
                'MiB per image': saved,
                'backbone': plain,
                'its MiB': plain_saved,
                'ratio': saved / plain_saved,
            }
            rows.append({**row, 'peak': peak, 'its peak': plain_peak} if args.device == 'cuda' else row)
    report(rows, args.device, args.json)


if __name__ == '__main__':
    main()
