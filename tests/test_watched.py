"""Tests of the watch over kernels in Triton's interpreter: it finds what is wrong on purpose in the kernels here.

Without a GPU, `test_fused.py` runs this file in a separate process, in the interpreter.
"""

import pytest
import torch
from fused import INTERPRETER, watched

triton = pytest.importorskip('triton')
tl, InterpreterError = triton.language, triton.runtime.errors.InterpreterError
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not INTERPRETER, reason='no interpreter')]


@triton.jit
def copy(x_ptr, out_ptr):
    i = tl.program_id(0)
    tl.store(out_ptr + i, tl.load(x_ptr + i))


@triton.jit
def read_outside(x_ptr, out_ptr):
    i = tl.program_id(0)
    tl.store(out_ptr + i, tl.load(x_ptr + i + 1))


@triton.jit
def write_outside(x_ptr, out_ptr):
    i = tl.program_id(0)
    tl.store(out_ptr + i - 1, tl.load(x_ptr + i))


@triton.jit
def write_from_two_programs(x_ptr, out_ptr):
    tl.store(out_ptr, tl.load(x_ptr))


@triton.jit
def write_from_two_lanes(x_ptr, out_ptr):
    i = tl.arange(0, 2)
    tl.store(out_ptr + tl.program_id(0) + i * 0, tl.load(x_ptr + i))


@triton.jit
def read_before_the_other_writes(x_ptr, out_ptr):
    i = tl.program_id(0)
    tl.store(x_ptr + i, tl.load(x_ptr + 1 - i))


@triton.jit
def write_before_the_other_reads(x_ptr, out_ptr):
    i = tl.program_id(0)
    tl.store(x_ptr + i, 1.0)
    tl.store(out_ptr + i, tl.load(x_ptr + 1 - i))


@triton.jit
def reverse(x_ptr, out_ptr, BARRIER: tl.constexpr = False):
    i = tl.arange(0, 2)
    if tl.program_id(0) == 0:
        tl.store(out_ptr + i, tl.load(x_ptr + i))
        if BARRIER:
            tl.debug_barrier()
        tl.store(x_ptr + i, tl.load(out_ptr + 1 - i))


@triton.jit
def write_what_was_read(x_ptr, out_ptr):
    i = tl.arange(0, 2)
    if tl.program_id(0) == 0:
        tl.store(x_ptr + i, tl.load(x_ptr + 1 - i))


@triton.jit
def write_again(x_ptr, out_ptr):
    tl.store(out_ptr + tl.program_id(0), 1.0)
    tl.store(out_ptr + tl.program_id(0), 2.0)


@triton.jit
def add(x_ptr, out_ptr):
    tl.atomic_add(out_ptr, tl.load(x_ptr))


@triton.jit
def store_address(table_ptr, x_ptr):
    tl.store(table_ptr, x_ptr.to(tl.int64))


@triton.jit
def read_by_address(table_ptr, out_ptr):
    i = tl.program_id(0)
    tl.store(out_ptr + i, tl.load(tl.load(table_ptr).to(out_ptr.dtype) + i))


FAULTS = {
    read_outside: 'reads outside of its tensors',
    write_outside: 'writes outside of its tensors',
    write_from_two_programs: 'writes what another program writes',
    write_from_two_lanes: 'writes an address twice',
    read_before_the_other_writes: 'reads what another program writes',
    write_before_the_other_reads: 'writes what another program reads',
    reverse: 'reads what it wrote, with no barrier between',
    write_what_was_read: 'writes what it read, with no barrier between',
    write_again: 'writes again, with no barrier between',
    add: 'uses atomics',
}


@pytest.mark.parametrize('kernel', FAULTS, ids=lambda kernel: kernel.__name__)
def test_faults_are_found(kernel):
    """The tensors are parts of one storage, in which accesses outside of them meet others."""
    x, _, out = torch.randn(6).split(2)
    with watched(), pytest.raises(InterpreterError, match=f'{kernel.__name__} {FAULTS[kernel]}'):
        kernel[(2,)](x, out)


def test_right_kernels_pass():
    x = torch.randn(2)
    expected, out = x.clone(), torch.zeros(2)
    with watched():
        copy[(2,)](x, out)
        assert torch.equal(out, expected)
        reverse[(2,)](x, out, BARRIER=True)
        assert torch.equal(x, expected.flip(0))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_memory_that_nothing_wrote_is_found(dtype):
    with watched(), pytest.raises(InterpreterError, match='copy reads what nothing wrote'):
        copy[(2,)](torch.empty(2, dtype=dtype), torch.empty(2, dtype=dtype))


def test_tensors_whose_addresses_are_in_a_table_may_be_read_while_they_live():
    table, x, out = torch.empty(1, dtype=torch.int64), torch.randn(2), torch.empty(2)
    with watched():
        store_address[(1,)](table, x)
        read_by_address[(2,)](table, out)
        assert torch.equal(out, x)
        del x
        with pytest.raises(InterpreterError, match='read_by_address reads outside'):
            read_by_address[(2,)](table, torch.empty(2))
