"""Compiles kernels for GPUs without having one, and reads the registers and the stack of a thread from the code."""

import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

POINTERS = {torch.float32: '*fp32', torch.bfloat16: '*bf16', torch.float16: '*fp16', torch.int64: '*i64'}


def record(monkeypatch, launch):
    """The distinct kernel launches of `launch()`, as (kernel, arguments, number of warps). No kernel runs."""
    launches = {}

    def run(kernel, *args, grid, warmup, num_warps=4, **kwargs):
        arguments = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
        variant = (kernel.__name__, num_warps, str(specialize(kernel, arguments)))
        launches[variant] = (kernel, arguments, num_warps)

    monkeypatch.setattr(JITFunction, 'run', run)
    launch()
    monkeypatch.undo()
    return [*launches.values()]


def specialize(kernel, arguments):
    """Signature, constants and attributes with which Triton would compile a kernel for some arguments."""
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value, parameter = arguments[name], kernel.params[i]
        special = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and value == 1):
            signature[name], constants[(i,)] = 'constexpr', value
            continue
        is_tensor = isinstance(value, torch.Tensor)
        signature[name] = POINTERS[value.dtype] if is_tensor else 'fp32' if isinstance(value, float) else 'i32'
        if is_tensor or (special and value % 16 == 0):
            attributes[(i,)] = [['tt.divisibility', 16]]
    return signature, constants, attributes


def resources(launch, capability):
    """Registers of a thread and bytes of its stack, where it spills, on a GPU of a compute capability such as 90."""
    kernel, arguments, num_warps = launch
    signature, constants, attributes = specialize(kernel, arguments)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget('cuda', capability, 32)
    compiled = triton.compile(source, target=target, options={'num_warps': num_warps})
    cuobjdump = next(p for p in Path(triton.__file__).parent.rglob('cuobjdump') if p.is_file())
    with tempfile.NamedTemporaryFile(suffix='.cubin') as f:
        f.write(compiled.asm['cubin'])
        f.flush()
        command = [str(cuobjdump), '--dump-resource-usage', f.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r'REG:(\d+) STACK:(\d+)', usage).groups()
    return int(registers), int(stack)
