"""Watches each address that kernels read and write in Triton's interpreter.

On a GPU, the programs of a launch run at the same time, and so do the threads of a program between two barriers. The
interpreter runs one after the other, so in it, kernels give the right results even if they race.
"""

import contextlib
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from triton.language import bfloat16, int64
from triton.runtime import interpreter


class Watch:
    """The tensors that a launch may touch, and when it read and wrote each byte.

    A moment is the part of a program between two barriers. The moments of all programs of a launch are numbered in
    order, from 1.
    """

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.given = {}  # address -> tensor that was given to a launch: a later one may find the address in a table

    def start_launch(self, name: str, tensors: list[torch.Tensor]) -> None:
        self.name, self.tensors, self.storages, self.moment = name, [], {}, 0
        for tensor in tensors:
            self.given[tensor.data_ptr()] = weakref.ref(tensor)
            self.admit(tensor)

    def start_program(self) -> None:
        self.moment += 1
        self.program = self.moment  # its first moment

    def pass_barrier(self) -> None:
        self.moment += 1

    def admit(self, tensor: torch.Tensor) -> None:
        """Let the launch touch a tensor."""
        storage, low = tensor.untyped_storage(), tensor.data_ptr()
        base = storage.data_ptr()
        # of each byte, the moments of its write, its first read and its last read; 0 if there was none
        moments = self.storages.setdefault(base, np.zeros((3, storage.nbytes()), np.int64))
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        high = low + (last + 1) * tensor.itemsize
        self.tensors.append((low, high, moments[:, low - base : high - base]))

    def find(self, pointers, mask, action: str) -> tuple[np.ndarray, np.ndarray]:
        """The moments of the tensor that an access touches, and the bytes [elements, bytes of an element] in it."""
        addresses = pointers.data[mask.data].astype(np.int64)
        size = pointers.get_element_ty().primitive_bitwidth // 8
        for low, high, moments in self.tensors:
            if not addresses.size or (low <= addresses.min() and addresses.max() + size <= high):
                return moments, addresses[:, None] - low + np.arange(size)
        raise AssertionError(f'{self.name} {action} outside of its tensors')

    def is_of_another(self, moments: np.ndarray) -> np.ndarray:
        return (moments > 0) & (moments < self.program)

    def refuse(self, is_wrong: np.ndarray, action: str) -> None:
        assert not is_wrong.any(), f'{self.name} {action}'

    def read(self, pointers, mask) -> None:
        (written, first, last), at = self.find(pointers, mask, 'reads')
        self.refuse(self.is_of_another(written[at]), 'reads what another program writes')
        self.refuse(written[at] == self.moment, 'reads what it wrote, with no barrier between')
        first[at] = np.where(first[at] == 0, self.moment, first[at])
        last[at] = self.moment

    def look_at(self, values: np.ndarray, dtype) -> None:
        """Refuse values that were read and are NaN. Tensors whose addresses are among them may be touched."""
        if dtype == bfloat16:
            values = (values.astype(np.uint32) << 16).view(np.float32)
        self.refuse(values != values, 'reads what nothing wrote')
        for address in values.tolist() if dtype == int64 else ():
            tensor = self.given.get(address, lambda: None)()
            if tensor is not None:  # it was not freed
                self.admit(tensor)

    def write(self, pointers, mask) -> None:
        (written, first, last), at = self.find(pointers, mask, 'writes')
        self.refuse(self.is_of_another(written[at]), 'writes what another program writes')
        self.refuse(self.is_of_another(first[at]), 'writes what another program reads')
        self.refuse(last[at] == self.moment, 'writes what it read, with no barrier between')
        self.refuse(written[at] == self.moment, 'writes again, with no barrier between')
        self.refuse(np.diff(np.sort(at[:, 0])) == 0, 'writes an address twice')
        written[at] = self.moment


@contextlib.contextmanager
def watched(seed: int = 0) -> Iterator[None]:
    """Raise for each access that a GPU could refuse or order otherwise, while launches run programs in random order.

    New memory is full of NaN. Inputs must not contain any.
    """
    watch, builder, executor = Watch(seed), interpreter.interpreter_builder, interpreter.GridExecutor
    launch, set_grid_dim, set_grid_idx = executor.__call__, builder.set_grid_dim, builder.set_grid_idx
    load, store = builder.create_masked_load, builder.create_masked_store

    def watched_launch(self, *args, **kwargs):
        tensors = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, torch.Tensor)]
        watch.start_launch(self.fn.__name__, tensors)
        launch(self, *args, **kwargs)

    def shuffle(*grid):
        watch.order = watch.random.permutation(np.prod(grid))
        set_grid_dim(*grid)

    def start_program(*index):
        watch.start_program()
        index = watch.order[np.ravel_multi_index(index, builder.grid_dim)]
        set_grid_idx(*np.unravel_index(index, builder.grid_dim))

    def watched_load(pointers, mask, *args, **kwargs):
        watch.read(pointers, mask)
        result = load(pointers, mask, *args, **kwargs)
        watch.look_at(result.data[mask.data], result.dtype)
        return result

    def watched_store(pointers, value, mask, *args):
        watch.write(pointers, mask)
        return store(pointers, value, mask, *args)

    def refuse_atomics(*args):
        raise AssertionError(f'{watch.name} uses atomics, whose order differs between runs')

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, '__call__', watched_launch)
        for name, function in {
            'set_grid_dim': shuffle,
            'set_grid_idx': start_program,
            'create_masked_load': watched_load,
            'create_masked_store': watched_store,
            'create_barrier': watch.pass_barrier,
            'create_atomic_rmw': refuse_atomics,
            'create_atomic_cas': refuse_atomics,
        }.items():
            patch.setattr(builder, name, function)
        torch.use_deterministic_algorithms(True)  # fills new memory with NaN
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
