"""The kernels are compiled for Hopper on a machine without a card."""

import os
import subprocess
import sys
from pathlib import Path


def test_kernels_compile_and_launch(triton):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    here = Path(__file__).parent
    root = here.parents[1]
    environment["PYTHONPATH"] = os.pathsep.join([str(here), str(root), str(root / "kernels" / "torch-ext")])
    done = subprocess.run(
        [sys.executable, str(here / "without_gpu.py")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["mla_decode_fwd_kernel_split", "1", "18", "1"],
        ["mla_decode_fwd_kernel_combine", "96", "4", "1"],
        ["mla_decode_fwd_kernel_split", "1", "9", "1"],
        ["mla_decode_fwd_kernel_combine", "81", "1", "1"],
        ["mla_decode_packed_kernel_split", "1", "9", "1"],
        ["mla_decode_fwd_kernel_combine", "24", "1", "1"],
        ["mla_write_packed_kernel", "3", "2", "1"],
        ["mla_decode_packed_kernel_split", "1", "9", "1"],
        ["mla_decode_fwd_kernel_combine", "24", "1", "1"],
        ["mla_write_packed_kernel", "3", "2", "1"],
        ["mla_decode_packed_kernel_split", "1", "24", "1"],
        ["mla_decode_fwd_kernel_combine", "24", "3", "1"],
        ["mla_write_packed_kernel", "3", "1", "1"],
        ["mla_write_joint_kernel", "3", "3", "1"],
        ["mla_write_joint_kernel", "3", "3", "1"],
        ["mla_write_joint_kernel", "3", "3", "1"],
        ["absorb_and_write_kernel", "4", "4", "1"],
        ["absorb_and_write_kernel", "2", "20", "1"],
        ["attend", "1", "132", "1"],
        ["combine_parts", "3", "32", "4"],
        ["attend", "2", "12", "1"],
        ["combine_rows", "3", "16", "1"],
        ["attend", "1", "132", "1"],
        ["combine_parts", "3", "9", "1"],
    ]
