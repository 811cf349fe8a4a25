"""The CUDA kernels for Hopper without a card: their source compiles and fits a multiprocessor.

Their results need a card: test_gpu.py and benchmarks/kernels_gpu.
"""

import re
import shutil
import subprocess

import pytest
import torch

from mla_attention import decode as launcher
from mla_attention.hopper import Arguments, source
from mla_attention.nvrtc import KernelUnavailableError
from mla_attention.problem import DecodeProblem
from mla_attention.tuning import hopper_config, hopper_groups, hopper_parts, hopper_shared_memory, hopper_workers


def small_problem(rank: int) -> DecodeProblem:
    """One query token of 4 heads on a cache of 8 tokens, all zeros."""
    query, cache = torch.zeros(1, 1, 4, rank), torch.zeros(1, 8, rank)
    lengths = torch.tensor([8], dtype=torch.int32)
    return DecodeProblem(
        query, torch.zeros(1, 1, 4, 64), cache, torch.zeros(1, 8, 64), lengths, None, 1.0, 0, 0.0, 0, None, None,
        query.clone(), torch.zeros(1, 4, 1),
    )  # fmt: skip


CONSTANTS = {"BF16": 1, "PAGE": 0, "MASK": 0, "WINDOW": 0, "SOFTCAP": 0, "PDL": 1}
SIZES = [(512, 64, {}), (256, 64, {"PAGE": 16}), (96, 32, {"BF16": 0})]
RARE = [(576, 128, {"MASK": 1}), (320, 0, {"WINDOW": 1, "SOFTCAP": 1}), (16, 16, {"MASK": 1, "SOFTCAP": 1})]


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no CUDA compiler")
@pytest.mark.parametrize(
    ("rank", "rope_dim", "changed"), [*SIZES, *(pytest.param(*size, marks=pytest.mark.slow) for size in RARE)]
)
def test_compiles(tmp_path, rank, rope_dim, changed):
    config = hopper_config(rank, rope_dim)
    constants = {
        "RANK": rank,
        "ROPE": rope_dim,
        "BLOCK_N": config.block_n,
        "STAGES": config.stages,
        **CONSTANTS,
        **changed,
    }
    (tmp_path / "kernel.cu").write_text(source(constants))
    target = "-gencode=arch=compute_90a,code=sm_90a"
    done = subprocess.run(
        ["nvcc", target, "-std=c++17", "-cubin", "-Xptxas", "-v", "-o", tmp_path / "kernel.cubin", tmp_path / "kernel.cu"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "serialized" not in done.stderr  # the assembler's warning about products that wait for each other
    if changed in [size[2] for size in SIZES]:
        assert set(re.findall(r"(\d+) bytes spill stores", done.stderr)) == {"0"}
    registers = max(int(count) for count in re.findall(r"Used (\d+) registers", done.stderr))
    assert registers <= 65536 // ((hopper_groups(rank) + 1) * 128)


def test_every_size_fits():
    for rank in range(16, 577, 16):
        for rope_dim in range(0, 129, 16):
            config = hopper_config(rank, rope_dim)
            step = hopper_groups(rank) if rank <= 256 else 1  # each stage belongs to one warpgroup
            assert config.stages >= 2 and config.stages % step == 0

            def memory(stages, rank=rank, rope_dim=rope_dim, config=config):
                return hopper_shared_memory(rank, rope_dim, config.block_n, stages)

            assert memory(config.stages) <= 227 * 1024
            assert config.stages + step > 8 or memory(config.stages + step) > 227 * 1024


def test_arguments_are_laid_out_as_the_compiler_does():
    struct = source({"RANK": 64, "BLOCK_N": 64, "BF16": 1}).split("struct Arguments {")[1].split("};")[0]
    lines = [line.strip().rstrip(";") for line in struct.strip().splitlines()]
    names = [name.strip(" *") for line in lines for name in re.sub(r"^(const )?(unsigned )?\w+ ", "", line).split(",")]
    assert names == [name for name, _ in Arguments._fields_]


def test_without_a_compiler_the_triton_kernels_serve(monkeypatch, recwarn):
    import mla_attention.hopper

    def missing(*_):
        raise KernelUnavailableError("no NVRTC")

    monkeypatch.setattr(mla_attention.hopper, "hopper_launch", missing)
    monkeypatch.setattr(launcher, "_unavailable", False)
    monkeypatch.setattr(launcher, "hopper_possible", lambda *_: True)
    served = []
    monkeypatch.setattr(launcher, "_launch_triton", lambda *arguments: served.append(arguments[-1]))
    for _ in range(2):
        launcher.launch_decode(small_problem(512))
    assert len(served) == 2 and not any(config.hopper for config in served)
    assert [str(warning.message) for warning in recwarn] == [
        "mla_attention: the CUDA kernels for Hopper do not serve here: no NVRTC"
    ]


def test_one_sequence_alone_gets_fewer_programs():
    assert hopper_workers(132, 1, 1, 16384) == 66 and hopper_workers(132, 1, 1, 131072) == 88
    assert hopper_workers(132, 1, 2, 16384) == 132 and hopper_workers(132, 2, 1, 16384) == 66
    assert hopper_workers(1, 1, 1, 64) == 1 == hopper_workers(2, 4, 8, 64)


def test_parts():
    assert hopper_parts(132, 32, 8192) == 4 and hopper_parts(66, 32, 8192) == 2 and hopper_parts(132, 128, 8192) == 1
    assert hopper_parts(132, 1, 8192) == 0  # tiles of one sequence are distributed evenly anyway
    assert hopper_parts(132, 100, 8192) == 0  # too many programs would be idle
    assert hopper_parts(132, 8, 2048) == 0 and hopper_parts(132, 200, 8192) == 0


@pytest.mark.parametrize(
    ("setting", "rank", "on_hopper"),
    [("", 512, True), ("", 128, True), ("", 16, True), ("1", 128, True), ("0", 512, False), ("0", 128, False)],
)
def test_kernel_chosen_on_hopper(monkeypatch, setting, rank, on_hopper):
    monkeypatch.setenv("MLA_ATTENTION_HOPPER", setting)
    monkeypatch.setattr(launcher, "_unavailable", False)
    monkeypatch.setattr(launcher, "hopper_possible", lambda *_: True)
    launched = []
    monkeypatch.setattr(launcher, "_launch_hopper", lambda *arguments: launched.append("cuda") or True)
    monkeypatch.setattr(launcher, "_launch_triton", lambda *arguments: launched.append("triton"))
    launcher.launch_decode(small_problem(rank))
    assert launched == ["cuda" if on_hopper else "triton"]
