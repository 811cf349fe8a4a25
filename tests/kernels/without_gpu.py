"""Run as a program: compile the Triton kernels for sm_90a, and launch all kernels on a driver that does not execute them.

The kernels of the vLLM plugin are among them. Finds errors that only a launch shows: arguments that Triton's launcher refuses,
and code that the assembler refuses. The generator of Triton's C launcher runs here. PYTHONPATH has both packages and cases.py.
"""

import ctypes

import torch
import triton.backends.nvidia.driver as nvidia
from cases import as_problem, make_case, pack_case
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from mla_attention import RowFormat, hopper, nvrtc
from mla_attention import decode as launcher
from mla_attention.tuning import DecodeConfig
from mla_attention.write import write_triton
from mla_convert.publish.engines.served.absorb_kernels import absorb_and_write

launched = []


class Utils:
    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}

    def load_binary(self, name, kernel, shared, device):
        return 1, 2, 168, 0, 1024  # module, function, registers, spills, threads

    def fill_tma_descriptor(self, *arguments):
        return arguments

    def unload_module(self, *arguments):
        pass


class Launcher:
    def __init__(self, source, metadata):
        constants = {
            (source.fn.arg_names.index(k),) if isinstance(k, str) else k: v for k, v in source.constants.items()
        }
        maps = getattr(metadata, "tensordesc_meta", None)
        nvidia.make_launcher(constants, source.signature, maps)
        self.name = metadata.name
        self.launch = nvidia.wrap_handle_tensordesc(self.record, source.signature, maps)

    def record(self, *arguments):
        launched.append((self.name, arguments[:3]))

    def __call__(self, x, y, z, stream, function, *arguments):
        self.launch(x, y, z, stream, function, 0, 0, None, None, *arguments)


class Driver:
    launcher_cls = Launcher
    utils = Utils()

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def launch(config, rank, rope_dim, heads=32, tokens=1, page_size=0, num_splits=0, dtype=torch.bfloat16):
    case = make_case(3, tokens, heads, rank, rope_dim, [400, 64, 5], dtype, page_size)
    out, lse = torch.empty_like(case["q_latent"]), torch.empty(3, heads, tokens)
    launcher.launch_decode(as_problem(case, out, lse, num_splits), config)


def launch_packed(rank, rope_dim, form, page_size=0):
    case = pack_case(make_case(3, 1, 8, rank, rope_dim, [400, 64, 5], torch.bfloat16, page_size), form)
    out, lse = torch.empty_like(case["q_latent"]), torch.empty(3, 8, 1)
    launcher.launch_decode(as_problem(case, out, lse))
    latent, key, query = (
        torch.zeros(*size).bfloat16() for size in ((3, 1, rank), (3, 1, rope_dim), (3, 1, 8, rope_dim))
    )
    tables, positions = torch.zeros(2, 3, 1, rope_dim // 2), torch.zeros(3, 1, dtype=torch.int64)
    write_triton(
        latent,
        key,
        query,
        *tables,
        case["latent_cache"],
        None,
        positions,
        case.get("block_table"),
        torch.empty_like(query),
        form,
    )


def write_joint(rank, rope_dim, form, page_size=0, heads=20, dtype=torch.bfloat16):
    """Rows whose last channels are the rotary key."""
    size = form.layout(rank + rope_dim, 0).row_bytes
    latent, key, query, out = (
        torch.zeros(*size, dtype=dtype)
        for size in ((3, 1, rank), (3, 1, rope_dim), (3, 1, heads, rope_dim), (3, 1, heads, rank + rope_dim))
    )
    tables, positions = torch.zeros(2, 3, 1, rope_dim // 2), torch.zeros(3, 1, dtype=torch.int64)
    rows, table = torch.zeros(3, page_size or 9, size, dtype=torch.uint8), torch.zeros(3, 1, dtype=torch.int32)
    basis = torch.eye(rope_dim, dtype=dtype)
    write_triton(
        latent, key, query, *tables, rows, None, positions, table if page_size else None, out[..., rank:], form, basis
    )  # fmt: skip


def absorb(tokens, heads, nope, rank, rope_dim, dtype=torch.bfloat16):
    def zeros(*size):
        return torch.zeros(*size, dtype=dtype)

    absorb_and_write(
        zeros(tokens, heads, nope + rope_dim), zeros(heads, nope, rank), zeros(tokens, rank), zeros(tokens, rope_dim),
        *torch.zeros(2, tokens, rope_dim // 2), zeros(2, 16, rank + rope_dim), torch.zeros(tokens, dtype=torch.int64),
    )  # fmt: skip


class Kernel:
    def __init__(self, name):
        self.name = name

    def launch(self, grid, arguments, pdl):
        launched.append((self.name, grid))
        assert [len(bytes(argument)) for argument in arguments] == [128] * (len(arguments) - 1) + [
            ctypes.sizeof(hopper.Arguments)
        ]


def main():
    driver.set_active(Driver())
    hopper._kernels = lambda *_: (Kernel("attend"), Kernel("combine_rows"), Kernel("combine_parts"))
    hopper.matrix_map = lambda x, rows: (nvrtc.TensorMap(), x.stride(0) // x.stride(1))
    launcher.device_limits = lambda device: (132, 232448, "")
    launch(None, 512, 64)
    launch(None, 96, 32, heads=9, tokens=3, page_size=16)
    launch_packed(96, 32, RowFormat(96, 1, 0, 1))
    launch_packed(80, 16, RowFormat(16, 0, 32, 0), page_size=16)
    launch_packed(352, 0, RowFormat(0, 0, 48), page_size=64)
    write_joint(224, 128, RowFormat(0, 0, 48))
    write_joint(72, 24, RowFormat(16, 0, 0), page_size=16)
    write_joint(512, 128, RowFormat(64, 0, 48), dtype=torch.float32)
    absorb(1, 4, 64, 272, 32)
    absorb(16, 2, 128, 512, 64, torch.float32)
    launcher.hopper_possible = lambda *_: True
    launch(None, 512, 64)
    launch(None, 576, 128, heads=128, page_size=64, num_splits=4)
    launch(DecodeConfig(64, 64, stages=4, min_tiles=2, hopper=True), 96, 0, heads=9, dtype=torch.float16)
    for name, grid in launched:
        print(name, *grid)


if __name__ == "__main__":
    main()
