"""The CUDA kernel on packed rows without a card: its source compiles, fits a multiprocessor, and reads every byte once.

Its results need a card: test_gpu.py and benchmarks/kernels_gpu.
"""

import re
import shutil
import subprocess

import pytest
import torch

from mla_attention import RowFormat
from mla_attention import decode as launcher
from mla_attention.hopper_packed import (
    PackedArguments,
    constants_of,
    packed_hopper_config,
    shared_memory,
    source,
)
from mla_attention.problem import DecodeProblem
from mla_attention.tuning import DecodeConfig


def small_problem(rank, rope_dim, form, heads=32, page_size=0) -> DecodeProblem:
    """One query token on a cache of 64 tokens, all zeros."""
    query, rope = torch.zeros(1, 1, heads, rank).bfloat16(), torch.zeros(1, 1, heads, rope_dim).bfloat16()
    rows = torch.zeros(1, page_size or 64, form.layout(rank, rope_dim).row_bytes, dtype=torch.uint8)
    table = torch.zeros(1, 2, dtype=torch.int32) if page_size else None
    return DecodeProblem(
        query, rope, rows, None, torch.tensor([8], dtype=torch.int32), table, 1.0, 0, 0.0, 0, None, None, query.clone(),
        torch.zeros(1, heads, 1), form,
    )  # fmt: skip


SIZES = [(512, 64, RowFormat(512, 1), {}), (512, 64, RowFormat(0, 0, 128), {})]
RARE = [
    (96, 32, RowFormat(96, 0, 32, 1), {"MASK": 1, "QUERIES": 16}),
    (112, 16, RowFormat(16, 0, 0, 1), {"SOFTCAP": 1, "PAGE": 16, "PIECE": 16}),
    (256, 0, RowFormat(256, 1), {"QUERIES": 64, "WINDOW": 1}),
]


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no CUDA compiler")
@pytest.mark.parametrize(
    ("rank", "rope_dim", "form", "changed"), [*SIZES, *(pytest.param(*size, marks=pytest.mark.slow) for size in RARE)]
)
def test_compiles(tmp_path, rank, rope_dim, form, changed):
    problem = small_problem(rank, rope_dim, form)
    (tmp_path / "kernel.cu").write_text(source(constants_of(problem, packed_hopper_config(problem)) | changed))
    target = "-gencode=arch=compute_90a,code=sm_90a"
    done = subprocess.run(
        ["nvcc", target, "-std=c++17", "-cubin", "-Xptxas", "-v", "-o", tmp_path / "kernel.cubin", tmp_path / "kernel.cu"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "serialized" not in done.stderr  # the assembler's warning about products that wait for each other
    if not changed:
        assert max(int(count) for count in re.findall(r"(\d+) bytes spill stores", done.stderr)) < 256
    assert max(int(count) for count in re.findall(r"Used (\d+) registers", done.stderr)) <= 65536 // 384


def test_sizes_that_are_served():
    """Everything of up to 8 blocks of 64 channels whose groups a lane's bytes do not cross, with two tiles or more."""
    for rank in range(16, 1025, 16):
        for form in (RowFormat(rank, 1), RowFormat(rank, 0, 64, 1), RowFormat(0, 0, 128), RowFormat(16, 0)):
            for rows in (1, 32, 128):
                problem = small_problem(rank, 64, form, rows)
                config = packed_hopper_config(problem)
                if config is None:
                    assert rank > 384 or form.group or (rank - form.wide) % 32
                    continue
                assert config.stages in (2, 4, 6, 8) and config.block_m in (16, 32, 64)
                assert shared_memory(constants_of(problem, config)) <= 227 * 1024
    assert packed_hopper_config(small_problem(512, 64, RowFormat(512, 1))).block_m == 32
    assert packed_hopper_config(small_problem(576, 64, RowFormat(576, 1))) is None
    for rank in (272, 352, 384):  # a rest of one or two blocks after a unit of four
        assert packed_hopper_config(small_problem(rank, 64, RowFormat(rank, 1)))
        assert packed_hopper_config(small_problem(rank, 64, RowFormat(32 - rank % 32, 0)))


def test_rows_that_lie_side_by_side_are_copied_at_once():
    """Rows of a multiple of 64 bytes are padded, as their reads would meet in a bank of shared memory, and copied one by one."""
    odd, even, padded = RowFormat(0, 0, 128), RowFormat(0, 0, 64, 1), RowFormat(512, 0, 16)  # 400, 352 and 704 bytes
    for form, page_size, piece in (
        (odd, 0, 64), (odd, 64, 64), (odd, 128, 64), (odd, 16, 16), (odd, 48, 1), (even, 0, 64), (even, 32, 32), (padded, 0, 1),
    ):  # fmt: skip
        problem = small_problem(512, 64, form, page_size=page_size)
        constants = constants_of(problem, DecodeConfig(32, 64, stages=2, hopper=True))
        assert constants["PIECE"] == piece
        assert constants["STRIDE"] - constants["ROW_BYTES"] == (16 if form == padded else 0)


def test_arguments_are_laid_out_as_the_compiler_does():
    problem = small_problem(64, 16, RowFormat(64, 1))
    struct = source(constants_of(problem, packed_hopper_config(problem))).split("struct Packed {")[1].split("};")[0]
    lines = [line.strip().rstrip(";") for line in struct.strip().splitlines()]
    names = [name.strip(" *") for line in lines for name in re.sub(r"^(const )?\w+ ", "", line).split(",")]
    assert names == [name for name, _ in PackedArguments._fields_]


@pytest.mark.parametrize(
    ("setting", "rank", "on_hopper"), [("", 512, True), ("", 16, True), ("", 1024, False), ("0", 512, False)]
)
def test_kernel_chosen_on_hopper(monkeypatch, setting, rank, on_hopper):
    from mla_attention import packed

    monkeypatch.setenv("MLA_ATTENTION_HOPPER", setting)
    monkeypatch.setattr(launcher, "_unavailable", False)
    monkeypatch.setattr(packed, "packed_hopper_possible", lambda *_: True)
    launched = []
    monkeypatch.setattr(packed, "launch_packed_hopper", lambda *_: launched.append("cuda"))
    monkeypatch.setattr(packed, "_launch_triton", lambda *_: launched.append("triton"))
    launcher.launch_decode(small_problem(rank, 64, RowFormat(rank, 1)))
    assert launched == ["cuda" if on_hopper else "triton"]
