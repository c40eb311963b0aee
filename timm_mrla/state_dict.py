"""Names in state dicts: removes the prefixes of wrappers and translates the names of the paper's code."""

import re

import torch
from torch import nn

__all__ = ['WRAPPERS', 'StateDict', 'convert_state_dict', 'gather_state_dict']

StateDict = dict[str, torch.Tensor]

# parts of names that torch's wrappers add
WRAPPERS = re.compile(r'^module\.|\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.')

# names in the authors' code -> our names
_AUTHORS_NAMES = (
    (r'\.bn_mrla\.', '.mrla.norm.'),
    (r'\.norm_mrla\.', '.mrla.norm_x.'),
    (r'\.mrla\.norm(x|o)\.', r'.mrla.norm_\1.'),
    (r'\.mrla\.lambda_t$', '.mrla.lam'),
    (r'\.(mrla|mla)\.W(q|k)\.', r'.attn.\2.'),
    (r'\.(mrla|mla)\.Wv\.', '.v.'),
    (r'\.(mrla|mla)\.bn_v\.', '.norm_v.'),
)


def convert_state_dict(state_dict: StateDict) -> StateDict:
    """Rename the weights of a checkpoint of the paper's code; names of this package stay.

    The state dict may lie under the key `state_dict` or `model`. Prefixes of torch's wrappers are removed, and so is a
    prefix that all names share.
    """
    state_dict = state_dict.get('state_dict', state_dict.get('model', state_dict))
    # AveragedModel has a counter beside the model
    state_dict = {WRAPPERS.sub('', name): tensor for name, tensor in state_dict.items() if name != 'n_averaged'}
    while len(state_dict) > 1 and len({name.partition('.')[0] for name in state_dict}) == 1:
        state_dict = {name.partition('.')[2]: tensor for name, tensor in state_dict.items()}
    out = {}
    for name, tensor in state_dict.items():
        for pattern, replacement in _AUTHORS_NAMES:
            name = re.sub(pattern, replacement, name)
        out[name] = tensor.flatten() if name.endswith('.mrla.lam') else tensor
    for name in [name for name in out if name.endswith('.mrla.attn.q.weight')]:
        k = name.replace('.q.weight', '.k.weight')
        if k in out:  # the paper's code has two 1-d convolutions, [1, 1, K] each; ours are one
            out[name.replace('.q.weight', '.qk.weight')] = torch.cat([out.pop(name), out.pop(k)])[:, :, None]
    return out


def gather_state_dict(model: nn.Module) -> StateDict:
    """The whole state dict of a wrapped or sharded model, under the names of the plain model.

    Only the first process gets it, the others get an empty one. All tensors are contiguous.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict  # slow to import

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state_dict = convert_state_dict(get_model_state_dict(model, options=options))
    return {name: tensor.contiguous() for name, tensor in state_dict.items()}
