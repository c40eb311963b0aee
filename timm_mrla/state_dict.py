"""State dicts: removes prefixes of wrappers, translates the paper's names, and checks that one fits a model."""

import hashlib
import re

import torch
from timm.layers import to_ntuple
from timm.models import PretrainedCfg
from torch import nn

__all__ = [
    'WRAPPERS',
    'StateDict',
    'convert_state_dict',
    'fingerprint',
    'fit_state_dict',
    'gather_state_dict',
    'listed',
]

StateDict = dict[str, torch.Tensor]

# parts of names that torch's wrappers add
WRAPPERS = re.compile(r'^module\.|\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.')

# names in the authors' code -> our names
_AUTHORS_NAMES = (
    # the stages of their ResNets with MRLA-base; blocks of timm's models have none of these parts at this depth
    (r'^stages\.(\d)(?=\.\d+\.(conv\d|bn\d|bn_mrla|downsample|mrla\.mrla)\.)', lambda m: f'layer{int(m[1]) + 1}'),
    (r'^i2t\.(backbone\.)?', 'patch_embed.proj.'),
    (r'\.(leff|feedforward)\.', '.mlp.'),
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


def listed(names: list[str]) -> str:
    """Names as text, the first five of them."""
    return ', '.join(names[:5]) + (f' and {len(names) - 5} more' if len(names) > 5 else '')


def fit_state_dict(state_dict: StateDict, model: nn.Module, cfg: PretrainedCfg, strict: bool = True) -> StateDict:
    """Return a state dict that fits a model, or raise RuntimeError if a name or a shape differs.

    The classifier and the first convolution may differ, because timm adapts them. If strict is False, names of the
    backbone may be missing or too many, because timm has such weights.
    """
    if not state_dict or not all(isinstance(tensor, torch.Tensor) for tensor in state_dict.values()):
        raise RuntimeError('there is no state dict in it')
    if isinstance(getattr(model, 'norm', None), nn.Identity):  # average pooling: the norm comes after it
        state_dict = {re.sub(r'^norm\.', 'fc_norm.', name): tensor for name, tensor in state_dict.items()}
    adapted = [name for names in (cfg.classifier, cfg.first_conv) if names for name in to_ntuple(1)(names)]
    ours, theirs = (
        {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.rpartition('.')[0] not in adapted}
        for tensors in (model.state_dict(), state_dict)
    )
    missing, unexpected = (
        [name for name in some if name not in others and (strict or '.mrla.' in name)]
        for some, others in ((ours, theirs), (theirs, ours))
    )
    differing = [k for k in ours if theirs.get(k, ours[k]) != ours[k]]
    differing = [f'its {k} is {theirs[k]} and the model has {ours[k]}' for k in differing]
    problems = [
        what + listed(names)
        for what, names in (('it lacks ', missing), ('the model has no ', unexpected), ('', differing))
        if names
    ]
    if problems:
        hint = '' if ours.keys() & theirs.keys() else '; no name fits: a prefix is dropped only if all names have it'
        if len(problems) == 1 and {*missing} == {name for name in ours if '.mrla.' in name}:
            hint = "; if these are the plain backbone's weights, add the tag of a warm start to the model's name"
        raise RuntimeError('; '.join(problems) + hint)
    return state_dict


def fingerprint(state_dict: StateDict, cfg: PretrainedCfg) -> str:
    """SHA-256 of the names, shapes, dtypes and values of a backbone's checkpoint, without its classifier."""
    digest, classifier = hashlib.sha256(), to_ntuple(1)(cfg.classifier)
    for name, tensor in sorted(convert_state_dict(state_dict).items()):
        if name.rpartition('.')[0] not in classifier:
            digest.update(f'{name} {tensor.dtype} {[*tensor.shape]}'.encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def gather_state_dict(model: nn.Module) -> StateDict:
    """The whole state dict of a wrapped or sharded model, under the names of the plain model.

    Only the first process gets it, the others get an empty one. All tensors are contiguous.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict  # slow to import

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state_dict = convert_state_dict(get_model_state_dict(model, options=options))
    return {name: tensor.contiguous() for name, tensor in state_dict.items()}
