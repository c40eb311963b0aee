"""The paper's equations in plain loops, one image, block, head and channel at a time."""

import math

import torch
import torch.nn.functional as F


def query_key(conv, x, dim_head):
    """[C, H, W] -> heads lists of dim_head numbers: the channel means through a 1-d convolution over the channels."""
    y = [x[c].mean() for c in range(len(x))]
    kernel = conv.weight.flatten()
    pad = len(kernel) // 2
    out = []
    for c in range(len(y)):
        taps = [kernel[i] * y[c + i - pad] for i in range(len(kernel)) if 0 <= c + i - pad < len(y)]
        out.append(sum(taps))
    return [out[c : c + dim_head] for c in range(0, len(out), dim_head)]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def value(conv, x):
    """[C, H, W] -> [C, H, W], channel by channel."""
    return torch.stack([F.conv2d(x[c][None, None], conv.weight[c : c + 1], padding=1)[0, 0] for c in range(len(x))])


def light(mrla, x, o):
    """What MRLA-light retrieves for one block, [B, C, H, W]: gates times values plus lam times the shortcut."""
    d = mrla.attn.dim_head
    out = []
    for x_i, o_i in zip(x, o, strict=True):
        q, k = query_key(mrla.attn.q, x_i, d), query_key(mrla.attn.k, x_i, d)
        v = mrla.act_v(mrla.norm_v(value(mrla.v, x_i)[None]))[0]
        channels = []
        for c in range(len(x_i)):
            g = 1 / (1 + torch.exp(-dot(q[c // d], k[c // d]) / math.sqrt(d)))
            channels.append(g * v[c] + mrla.lam[c] * o_i[c])
        out.append(torch.stack(channels))
    return torch.stack(out)


def base(mrlas, xs):
    """What MRLA-base retrieves for the last block of xs, [B, C, H, W], from it and the blocks before it."""
    d = mrlas[-1].attn.dim_head
    out = []
    for i in range(len(xs[0])):
        q = query_key(mrlas[-1].attn.q, xs[-1][i], d)
        keys = [query_key(mrla.attn.k, x[i], d) for mrla, x in zip(mrlas, xs, strict=True)]
        values = [value(mrla.v, x[i]) for mrla, x in zip(mrlas, xs, strict=True)]
        channels = []
        for c in range(len(xs[-1][i])):
            scores = [torch.exp(dot(q[c // d], k[c // d]) / math.sqrt(d)) for k in keys]
            channels.append(sum(s / sum(scores) * v[c] for s, v in zip(scores, values, strict=True)))
        out.append(torch.stack(channels))
    return torch.stack(out)
