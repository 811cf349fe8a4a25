"""Gluon as plain Python: enough of it to run the Hopper kernel on a CPU.

Triton's interpreter does not know Gluon. Here a partition is a thread, a barrier counts arrivals and bytes as the hardware
does, and a wait that lasts too long is a deadlock. What is not modelled: layouts, and the order of asynchronous products.
"""

import importlib.util
import sys
import threading
import types
from pathlib import Path

import torch

TOO_LONG = 20.0
KERNELS = Path(__file__).parents[2] / "kernels" / "torch-ext" / "mla_attention"
_here = threading.local()


class DeadlockError(Exception):
    """A barrier that is waited for in vain."""


class Value(torch.Tensor):
    """A tensor in registers. `type` holds its shape, as kernels ask for it."""

    @property
    def type(self):
        return types.SimpleNamespace(shape=list(self.shape), layout=None)

    def __iadd__(self, other):
        return self + other  # partitions share what they are given


def value(x, dtype=None):
    return torch.as_tensor(x, dtype=dtype).as_subclass(Value)


class Pointer:
    """Numbers in global memory, and which of them are meant."""

    def __init__(self, flat, at=0):
        self.flat, self.at = flat, at
        self.dtype = types.SimpleNamespace(element_ty=flat.dtype)

    def __add__(self, offset):
        return Pointer(self.flat, self.at + torch.as_tensor(offset, dtype=torch.int64))

    __radd__ = __add__

    def __getitem__(self, axes):
        return Pointer(self.flat, torch.as_tensor(self.at)[axes])


def flat(tensor):
    """All of a tensor's storage from its first number on."""
    length = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    return tensor.as_strided((length,), (1,))


def load(pointer, mask=None, other=0):
    at = torch.as_tensor(pointer.at)
    if mask is None:
        return value(pointer.flat[at])
    at, mask = torch.broadcast_tensors(at, torch.as_tensor(mask))
    return value(torch.where(mask, pointer.flat[torch.where(mask, at, 0)], other)).to(pointer.flat.dtype)


def store(pointer, x, mask=None):
    at, x = torch.broadcast_tensors(torch.as_tensor(pointer.at), torch.as_tensor(x))
    mask = torch.ones_like(at, dtype=torch.bool) if mask is None else torch.as_tensor(mask).expand(at.shape)
    pointer.flat[at[mask]] = x[mask].to(pointer.flat.dtype)


class Shared:
    """Shared memory, or a part of it; poisoned until it is written."""

    def __init__(self, data, barriers=None):
        self.data, self.barriers = data, barriers
        self.dtype = data.dtype
        self.type = types.SimpleNamespace(shape=list(data.shape))

    def index(self, i):
        return Shared(self.data[int(i)], self.barriers)

    def slice(self, start, length, dim=0):
        return Shared(self.data.narrow(dim, start, length))

    def permute(self, order):
        return Shared(self.data.permute(order))

    def load(self, layout):
        return value(self.data.clone())

    def store(self, x):
        assert x.dtype == self.dtype
        self.data.copy_(x)

    @property
    def barrier(self):
        return self.barriers[self.data.data_ptr()]


class Barrier:
    def __init__(self, count):
        self.count = self.pending = count
        self.bytes = self.phase = 0
        self.change = threading.Condition()

    def update(self, arrivals=0, arriving_bytes=0):
        with self.change:
            self.pending -= arrivals
            self.bytes += arriving_bytes
            assert self.pending >= 0, "more arrivals than the barrier counts"
            if self.pending == 0 and self.bytes == 0:
                self.phase += 1
                self.pending = self.count
                self.change.notify_all()

    def wait(self, parity):
        with self.change:
            if not self.change.wait_for(lambda: self.phase & 1 != int(parity), TOO_LONG):
                raise DeadlockError(f"phase {self.phase}, {self.pending} arrivals and {self.bytes} bytes missing")


def allocate(dtype, shape, layout):
    if dtype == torch.int64:
        return Shared(torch.zeros(shape, dtype=dtype), {})
    return Shared(torch.full(shape, torch.nan, dtype=dtype))


def init(bar, count):
    bar.barriers[bar.data.data_ptr()] = Barrier(count)


def copy_to_shared(descriptor, at, bar, target):
    """A box of a matrix, zeros outside of it."""
    matrix = descriptor.base.as_strided(descriptor.shape, descriptor.strides)
    assert list(target.data.shape) == list(descriptor.block_shape)
    (row, column), (height, width) = (int(x) for x in at), descriptor.block_shape
    assert row >= 0
    box = matrix[row : row + height, column : column + width]
    target.data.zero_()
    target.data[: box.shape[0], : box.shape[1]] = box
    bar.barrier.update(arriving_bytes=-target.data.numel() * target.data.element_size())


def product(a, b, acc, use_acc=True, is_async=False):
    a = a.data if isinstance(a, Shared) else a
    assert a.shape[0] == 64 and b.data.shape[1] <= 256
    return value(a.float() @ b.data.float() + (acc if use_acc else 0))


def warp_specialize(partitions, warps, registers):
    """Every partition at once; the first failure is raised."""
    program, failures = _here.program, []

    def run(function, arguments):
        _here.program = program
        try:
            function(*arguments)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise min(failures, key=lambda failure: isinstance(failure, DeadlockError))


class Kernel:
    """`kernel[grid](...)`: all programs, one after another."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *arguments):
        return self.function(*arguments)

    def __getitem__(self, grid):
        def launch(*arguments, num_warps, maxnreg, launch_pdl=False, **constants):
            arguments = [Pointer(flat(x)) if isinstance(x, torch.Tensor) else x for x in arguments]
            for x in arguments:
                if hasattr(x, "block_shape"):
                    x.dtype = x.base.dtype
            for column in range(grid[1]):
                for row in range(grid[0]):
                    _here.program = (value(row, torch.int32), value(column, torch.int32))
                    self.function(*arguments, **constants)

        return launch


def jit(function=None, **_):
    return Kernel if function is None else function


def _language():
    def two(function):
        return lambda a, b: value(function(torch.as_tensor(a), torch.as_tensor(b)))

    def one(function):
        return lambda x: value(function(torch.as_tensor(x)))

    layout = types.SimpleNamespace
    return types.SimpleNamespace(
        constexpr=lambda x: x, int32=torch.int32, int64=torch.int64, float32=torch.float32, static_range=range,
        maximum=two(torch.maximum), minimum=two(torch.minimum), exp2=one(torch.exp2), log2=one(torch.log2),
        abs=one(torch.abs), max=lambda x, dim: value(x.amax(dim)), sum=lambda x, dim: value(x.sum(dim, dtype=x.dtype)),
        where=lambda c, a, b: value(torch.where(torch.as_tensor(c), torch.as_tensor(a), torch.as_tensor(b))),
        arange=lambda a, b, layout=None: value(torch.arange(a, b, dtype=torch.int32)),
        zeros=lambda shape, dtype, layout=None: value(torch.zeros(shape, dtype=dtype)),
        full=lambda shape, x, dtype, layout=None: value(torch.full(shape, x, dtype=dtype)),
        zeros_like=lambda x: value(torch.zeros_like(x)), convert_layout=lambda x, layout: x,
        associative_scan=lambda x, dim, add: value(x.cumsum(dim, dtype=x.dtype)), load=load, store=store,
        program_id=lambda axis: _here.program[axis], allocate_shared_memory=allocate, thread_barrier=lambda: None,
        warp_specialize=warp_specialize, NVMMASharedLayout=lambda *_: None, NVMMADistributedLayout=lambda *_: None,
        SliceLayout=lambda *_: None, BlockedLayout=lambda *_: None, SwizzledSharedLayout=lambda *_: None,
        DotOperandLayout=lambda *_: None, layout=layout,
    )  # fmt: skip


def loop(*bounds):
    """range, whose numbers are values."""
    return (value(i, torch.int32) for i in range(*(int(bound) for bound in bounds)))


def emulated(name):
    """The module of kernels `name`, on the emulator."""
    language = _language()
    hopper = types.SimpleNamespace(
        fence_async_shared=lambda: None,
        mbarrier=types.SimpleNamespace(
            init=init, MBarrierLayout=lambda: None, wait=lambda bar, parity: bar.barrier.wait(parity),
            arrive=lambda bar, count=1: bar.barrier.update(arrivals=count),
            expect=lambda bar, size: bar.barrier.update(arrivals=1, arriving_bytes=size),
        ),
        tma=types.SimpleNamespace(async_copy_global_to_shared=copy_to_shared),
        warpgroup_mma=product,
        warpgroup_mma_wait=lambda _, deps: deps[0] if len(deps) == 1 else tuple(deps),
    )  # fmt: skip
    stand_ins = {
        "triton.language.extra.cuda": types.SimpleNamespace(gdc_wait=lambda: None, gdc_launch_dependents=lambda: None),
        "triton.experimental": types.SimpleNamespace(gluon=types.SimpleNamespace(jit=jit)),
        "triton.experimental.gluon": types.SimpleNamespace(language=language, jit=jit),
        "triton.experimental.gluon.language.nvidia.hopper": hopper,
    }
    before = {key: sys.modules.get(key) for key in (*stand_ins, "emulated")}
    sys.modules.update(stand_ins)
    extra = sys.modules["triton.language.extra"]
    cuda, extra.cuda = extra.cuda, stand_ins["triton.language.extra.cuda"]
    package = types.ModuleType("emulated")
    package.__path__ = [str(KERNELS)]
    stand_ins["emulated"] = sys.modules["emulated"] = package
    try:
        spec = importlib.util.spec_from_file_location(f"emulated.{name}", KERNELS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        module.range = loop
        spec.loader.exec_module(module)
    finally:
        extra.cuda = cuda
        sys.modules.pop("emulated.hopper_pieces", None)
        for key, old in before.items():
            sys.modules.pop(key)
            if old is not None:
                sys.modules[key] = old
    return module
