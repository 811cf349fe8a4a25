"""A conversion in several processes (Gloo, on the CPU): the model of one process, one line for a failure, nothing half-written."""

import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from mla_convert.core.report_file import read_content
from mla_convert.write.verify import verify

TIMEOUT = 300
# Every stage of refinement, sizes by layer, self-generated text, and windows that two processes cannot share evenly.
SETTINGS = {
    "uniform": False, "kv_ratio": 0.5, "calib_samples": 33, "calib_length": 48, "calib_self_generated": 0.3,
    "eval_windows": 5, "suite_windows": 1, "refine_steps": 6, "refine_batch": 4, "refine_block": 2, "block_steps": 4,
    "output_steps": 2, "output_layers": 3,
}  # fmt: skip


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def start(sources, tmp_path):
    """Start the command in two processes: settings -> the process."""
    folder = sources("llama")

    def run(launch=("-m", "mla_convert"), own=("--gpus", "2"), **settings):
        text = str(folder.parent / "text.txt")
        given = {"calib": text, "eval": text, "eval_length": 48, "out": tmp_path / "two", "device": "cpu", **settings}
        words = [str(folder)]
        for key, value in given.items():
            if value is not False:
                words += [f"--{key.replace('_', '-')}", str(value)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.Popen(
            [sys.executable, *launch, "convert", *words, *own, "-q"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    return run


def until_written(out, process, layers=1):
    """Wait until a shard of that many layers, and of the embeddings, is written."""
    journal = out.with_name(f".{out.name}.partial") / "journal.jsonl"
    began = time.monotonic()
    while not journal.exists() or len(journal.read_text().splitlines()) < 3 + layers:
        assert process.poll() is None and time.monotonic() - began < TIMEOUT, process.communicate()
        time.sleep(0.02)


def follower(process):
    """The second process of a run."""
    (found,) = [child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "1"]
    return found


def difference(one, two):
    """Largest relative difference of a tensor between two folders."""
    worst = 0.0
    for file in sorted(one.glob("*.safetensors")):
        ours, theirs = load_file(file), load_file(two / file.name)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            if not tensor.is_floating_point():
                assert torch.equal(tensor, theirs[name])
                continue
            worst = max(worst, float((tensor - theirs[name]).norm() / tensor.norm().clamp_min(1e-12)))
    return worst


def test_two_processes_make_the_model_of_one(start, convert_folder, sources, tmp_path):
    process = start(**SETTINGS)
    one = convert_folder(sources("llama"), out=tmp_path / "one", **SETTINGS).out
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err
    assert err == "" and out.count("written to") == 1
    assert 0 < difference(one, tmp_path / "two") < 1e-4  # sums in another order
    ours, theirs = read_content(one), read_content(tmp_path / "two")
    assert theirs["device"] == f"2 × {ours['device']}".replace("2 threads", "1 threads")
    for key in ("kl", "ratio"):
        value = ours["evaluation"][key]
        assert theirs["evaluation"][key] == pytest.approx(value, rel=1e-4)
    assert ours["evaluation"]["suite"].keys() == theirs["evaluation"]["suite"].keys()
    assert theirs["settings"] == ours["settings"]
    verify(tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_a_killed_process_ends_the_run(start, tmp_path):
    process = start(**{**SETTINGS, "refine_block": 1, "output_layers": 1, "block_steps": 0, "refine_steps": 100})
    until_written(tmp_path / "two", process)
    follower(process).send_signal(signal.SIGKILL)
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 5 and out == ""
    assert err.splitlines() == ["mla-convert: process 2 of 2 was killed (SIGKILL): run the same command again; layers that "
                                "were written are kept"]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == [".two.partial"]
    assert (tmp_path / ".two.partial" / "model-00002-of-00005.safetensors").exists()


@pytest.mark.slow
def test_an_interrupted_run_continues_with_the_same_bytes(start, tmp_path):
    settings = {**SETTINGS, "refine_block": 1, "output_layers": 1, "block_steps": 0, "refine_steps": 200}
    process = start(**settings)
    until_written(tmp_path / "two", process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130 and len(err.splitlines()) == 1 and "run the same command to go on" in err
    assert start(**settings).wait(TIMEOUT) == 0
    whole = start(**{**settings, "out": tmp_path / "whole"})
    assert whole.wait(TIMEOUT) == 0
    assert difference(tmp_path / "two", tmp_path / "whole") == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings, code, words",
    [({"calib": "nowhere.txt"}, 4, "not found"), ({"calib_samples": 1, "calib_length": 48}, 2, "cannot share 1"),
     ({"device": "cpu:0"}, 2, "is one device"), ({"rank": 7000}, 4, "rank")],
)  # fmt: skip
def test_an_error_is_one_line(start, settings, code, words, tmp_path):
    process = start(**{"refine_steps": 0, **settings})
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == code and out == "" and len(err.splitlines()) == 1 and words in err
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow
def test_two_hosts_started_by_torchrun(start, tmp_path, free_port):
    """Two hosts are two nodes of torchrun, which `accelerate launch` starts on GPUs; here both are on one machine."""
    torchrun = ("-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1")
    nodes = [
        start(
            (*torchrun, "--master-port", str(free_port), "--node-rank", str(rank), "-m", "mla_convert"), (), **SETTINGS
        )
        for rank in range(2)
    ]
    said = ""
    for node in nodes:
        out, err = node.communicate(timeout=TIMEOUT)
        assert node.returncode == 0, err
        said += out
    assert said.count("written to") == 1 and read_content(tmp_path / "two")["device"].startswith("2 × ")
