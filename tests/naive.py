"""Reference for the tests: the paper's equations in plain loops over images, blocks, heads and channels."""

import math

import torch
import torch.nn.functional as F


def dim_head(attn, x):
    """Channels per head for a map [C, H, W]."""
    return len(x) // attn.num_heads


def query_key(kernel, x, dim_head):
    """[C, H, W] -> a list of dim_head numbers for each head: a 1-d convolution of the channel means."""
    y = [x[c].mean() for c in range(len(x))]
    kernel = kernel.flatten()
    pad = len(kernel) // 2
    out = []
    for c in range(len(y)):
        taps = [kernel[i] * y[c + i - pad] for i in range(len(kernel)) if 0 <= c + i - pad < len(y)]
        out.append(sum(taps))
    return [out[c : c + dim_head] for c in range(0, len(out), dim_head)]


def query(attn, x):
    return query_key(attn.qk.weight[0], x, dim_head(attn, x))


def key(attn, x):
    return query_key(attn.qk.weight[1], x, dim_head(attn, x))


def kernel_size(dim):
    """Kernel size of the convolutions of query and key."""
    t = int(abs((math.log2(dim) + 1) / 2))
    return t if t % 2 else t + 1


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def value(conv, x):
    """[C, H, W] -> [C, H, W]: the 3x3 convolution of each channel."""
    return torch.stack([F.conv2d(x[c][None, None], conv.weight[c : c + 1], padding=1)[0, 0] for c in range(len(x))])


def light(mrla, x, o):
    """m of MRLA-light for one block, [B, C, H, W]: gate times value plus lam times shortcut."""
    d = dim_head(mrla.attn, x[0])
    out = []
    for x_i, o_i in zip(x, o, strict=True):
        q, k = query(mrla.attn, x_i), key(mrla.attn, x_i)
        v = mrla.norm_v(value(mrla.v, x_i)[None])[0]
        if mrla.form == 'pre':
            v = v * (1 + torch.erf(v / math.sqrt(2))) / 2
        channels = []
        for c in range(len(x_i)):
            g = 1 / (1 + torch.exp(-dot(q[c // d], k[c // d]) / math.sqrt(d)))
            channels.append(g * v[c] + mrla.lam[c] * o_i[c])
        out.append(torch.stack(channels))
    return torch.stack(out)


def base(mrlas, xs):
    """m of MRLA-base for the last block of xs, [B, C, H, W], from all blocks of xs."""
    d = dim_head(mrlas[-1].attn, xs[-1][0])
    out = []
    for i in range(len(xs[0])):
        q = query(mrlas[-1].attn, xs[-1][i])
        keys = [key(mrla.attn, x[i]) for mrla, x in zip(mrlas, xs, strict=True)]
        values = [value(mrla.v, x[i]) for mrla, x in zip(mrlas, xs, strict=True)]
        channels = []
        for c in range(len(xs[-1][i])):
            scores = [torch.exp(dot(q[c // d], k[c // d]) / math.sqrt(d)) for k in keys]
            channels.append(sum(s / sum(scores) * v[c] for s, v in zip(scores, values, strict=True)))
        out.append(torch.stack(channels))
    return torch.stack(out)
