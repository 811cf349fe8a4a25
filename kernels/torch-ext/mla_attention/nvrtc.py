"""CUDA C++ compiled at first use by NVRTC, the compiler library of PyTorch's CUDA builds, and launched through the driver.

No CUDA toolkit and no C++ compiler are needed. Kernels on the Hugging Face Hub may depend on PyTorch and Triton alone, and
PyTorch's own interface to NVRTC is private, so this module calls both libraries through ctypes.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

# Enumerators of cuda.h.
_FLOAT16, _BFLOAT16, _SWIZZLE_128B, _L2_256B = 6, 9, 3, 3
_MAX_DYNAMIC_SHARED, _PROGRAMMATIC_SERIALIZATION = 8, 6


class KernelUnavailableError(RuntimeError):
    """A kernel that cannot be compiled or loaded on this machine."""


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    major = (torch.version.cuda or "13").split(".")[0]
    spec = importlib.util.find_spec("nvidia")  # the package in which PyTorch's wheels install it
    folders = [Path(root) for root in (spec.submodule_search_locations or ())] if spec else []
    beside = [str(path) for folder in folders for path in sorted(folder.glob(f"*/lib/libnvrtc.so.{major}"))]
    for name in (f"libnvrtc.so.{major}", *beside, "libnvrtc.so"):
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            problem = error
    raise KernelUnavailableError(f"the compiler library NVRTC is not installed: {problem}")


def _check(result: int, what: str) -> None:
    if result:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(result, ctypes.byref(text))
        raise RuntimeError(f"{what}: {text.value.decode() if text.value else result}")


def cached_cubin(source: str, options: tuple[str, ...]) -> bytes:
    """`compile_cubin` with a cache on disk: the folder MLA_ATTENTION_CACHE, or mla_attention in the user's cache folder."""
    folder = os.environ.get("MLA_ATTENTION_CACHE")
    folder = (
        Path(folder) if folder else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "mla_attention"
    )
    key = hashlib.sha256("\0".join([source, *options, str(torch.version.cuda)]).encode()).hexdigest()
    path = folder / f"{key}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        code = compile_cubin(source, options)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(code)
        os.replace(file.name, path)
    except OSError:  # a read-only home: the next process compiles again
        pass
    return code


def compile_cubin(source: str, options: tuple[str, ...]) -> bytes:
    """Compile CUDA C++ source to machine code.

    Raises:
        KernelUnavailableError: there is no compiler library, or the source does not compile; the message is the compiler's.
    """
    lib, program = _nvrtc(), ctypes.c_void_p()
    if lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"mla_attention.cu", 0, None, None):
        raise KernelUnavailableError("NVRTC could not create a program")
    try:
        arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = lib.nvrtcCompileProgram(program, len(options), arguments)
        size = ctypes.c_size_t()
        if failed:
            lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            text = ctypes.create_string_buffer(size.value)
            lib.nvrtcGetProgramLog(program, text)
            raise KernelUnavailableError(f"NVRTC: {text.value.decode(errors='replace')}")
        lib.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        lib.nvrtcGetCUBIN(program, code)
        return code.raw
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


class Kernel:
    """A kernel of a loaded module."""

    def __init__(self, module: ctypes.c_void_p, name: str, threads: int, shared_bytes: int):
        """Look up the kernel `name` of `module`, for programs of `threads` threads and `shared_bytes` of dynamic memory."""
        self.function, self.threads, self.shared_bytes = ctypes.c_void_p(), threads, shared_bytes
        driver = _driver()
        _check(driver.cuModuleGetFunction(ctypes.byref(self.function), module, name.encode()), name)
        if shared_bytes:
            _check(driver.cuFuncSetAttribute(self.function, _MAX_DYNAMIC_SHARED, shared_bytes), "shared memory")

    def launch(self, grid: tuple[int, int, int], arguments: tuple, pdl: bool) -> None:
        """Launch on PyTorch's current stream.

        Args:
            grid: numbers of programs.
            arguments: ctypes objects, passed by address.
            pdl: programmatic dependent launch: the kernel may begin before the one before it has ended.
        """
        attribute = _Attribute(id=_PROGRAMMATIC_SERIALIZATION, value=1)
        config = _LaunchConfig(
            *grid, self.threads, 1, 1, self.shared_bytes, torch.cuda.current_stream().cuda_stream,
            ctypes.pointer(attribute), int(pdl),
        )  # fmt: skip
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        _check(_driver().cuLaunchKernelEx(ctypes.byref(config), self.function, pointers, None), "launch")


def load_kernels(code: bytes, *kernels: tuple[str, int, int]) -> tuple[Kernel, ...]:
    """Load kernels of compiled code on the current device.

    Args:
        code: machine code of `compile_cubin`.
        *kernels: name, threads and bytes of dynamic shared memory of each.

    Raises:
        KernelUnavailableError: the driver refuses them.
    """
    module = ctypes.c_void_p()
    try:
        _check(_driver().cuModuleLoadData(ctypes.byref(module), code), "loading kernels")
        return tuple(Kernel(module, *kernel) for kernel in kernels)
    except RuntimeError as error:
        raise KernelUnavailableError(str(error)) from error


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_byte * 60)]


class _LaunchConfig(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint),
    ]  # fmt: skip


class TensorMap(ctypes.Structure):
    """Descriptor of a matrix for the tensor memory accelerator: 128 bytes, 64-byte aligned."""

    _fields_ = [("opaque", ctypes.c_byte * 128)]


@functools.lru_cache(maxsize=4096)
def tensor_map(pointer: int, bf16: bool, rows: int, columns: int, stride: int, box_rows: int) -> TensorMap:
    """Descriptor of a matrix of 16-bit numbers, read in boxes.

    Args:
        pointer: address of the matrix.
        bf16: bfloat16, or else float16.
        rows: rows of the matrix.
        columns: columns of the matrix.
        stride: numbers from one row to the next.
        box_rows: rows of a box; its columns are 64.
    """
    memory = ctypes.create_string_buffer(192)
    result = TensorMap.from_buffer(memory, -ctypes.addressof(memory) % 64)
    result.memory = memory
    _check(
        _driver().cuTensorMapEncodeTiled(
            ctypes.byref(result), _BFLOAT16 if bf16 else _FLOAT16, 2, ctypes.c_void_p(pointer),
            (ctypes.c_uint64 * 2)(columns, rows), (ctypes.c_uint64 * 1)(stride * 2), (ctypes.c_uint32 * 2)(64, box_rows),
            (ctypes.c_uint32 * 2)(1, 1), 0, _SWIZZLE_128B, _L2_256B, 0,
        ),
        "tensor map",
    )  # fmt: skip
    return result


def matrix_map(x: Tensor, box_rows: int) -> tuple[TensorMap, int]:
    """Descriptor of (outer, inner, d) as a matrix of rows, and the number of rows from one outer index to the next."""
    stride = x.stride(1)
    outer_rows = x.stride(0) // stride if x.shape[0] > 1 else x.shape[1]
    rows = (x.shape[0] - 1) * outer_rows + x.shape[1]
    return tensor_map(x.data_ptr(), x.dtype == torch.bfloat16, rows, x.shape[2], stride, box_rows), outer_rows
