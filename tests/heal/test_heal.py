"""Healing: runs, resuming, bad input, and the command line."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mla_convert.core.errors import InputError, UsageError
from mla_convert.core.progress import Progress
from mla_convert.core.report_schema import parse_report
from mla_convert.core.units import parse_lengths, parse_tokens
from mla_convert.heal import HealConfig, HealSettings, heal, loop, windows
from mla_convert.heal.record import ADAPTED_NOTE, ERRORS_NOTE
from mla_convert.report.html.page import page_text
from mla_convert.write.verify import verify

CPU = torch.device("cpu")
QUIET = Progress(quiet=True)


# The run


def test_heals(small, tmp_path):
    before = json.loads((small["folder"] / "report.json").read_text())
    report = heal(HealConfig(**small, original_cache="int8,int4", out=tmp_path / "healed"), QUIET)
    assert [entry["format"] for entry in report["original_cache"]["formats"]] == ["int8", "int4"]
    assert report["original_cache"]["text"] == report["evaluation"]["text"]
    (state,) = report["earlier_states"]
    assert state.name == "converted" and state.ratio == before["evaluation"]["ratio"]
    assert ERRORS_NOTE in report["notes"] and ADAPTED_NOTE not in report["notes"]
    record = report["heal"]
    assert [entry["tokens"] for entry in record["curve"]] == [0, *(6 * 512 * n for n in range(1, 5))]
    assert record["curve"][-1]["kl"] < 0.8 * record["curve"][0]["kl"]
    assert report["evaluation"]["ratio"] < record["before"]["evaluation"]["ratio"]
    assert report["probes"]["next_token"]["kl"]["value"] < record["before"]["probes"]["next_token"]["kl"]["value"]
    assert record.conversion.evaluation.as_dict() == before["evaluation"]
    verify(tmp_path / "healed")
    written = json.loads((tmp_path / "healed" / "report.json").read_text())
    assert written["checksums"] != before["checksums"] and written["heal"]["curve"] == record.as_dict()["curve"]
    assert "Healing" in page_text(parse_report(written)) and str(tmp_path) not in json.dumps(written)
    assert "distilled from the original on 12,288 tokens of text.txt" in (tmp_path / "healed" / "README.md").read_text()
    names = {file.name for file in small["folder"].iterdir()}
    assert {file.name for file in (tmp_path / "healed").iterdir()} == names
    assert {file.name for file in tmp_path.iterdir()} == {"healed"}  # no state, no lock


def test_in_place_and_attention_alone(small, tmp_path):
    folder = tmp_path / "copy"
    subprocess.run(["cp", "-r", small["folder"], folder], check=True)
    old = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    report = heal(HealConfig(**{**small, "folder": folder, "train": "attention"}), QUIET)
    verify(folder)
    new = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    changed = {name for name, tensor in new.items() if not torch.equal(tensor, old[name])}
    assert changed and all(".self_attn." in name for name in changed)
    assert "everything else is the original's" in (folder / "README.md").read_text()
    # again, on the healed model
    again = heal(HealConfig(**{**small, "folder": folder, "train": "attention", "tokens": 8 * 512}), QUIET)
    assert again["heal"]["before"]["evaluation"]["ratio"] == report["evaluation"]["ratio"]


def test_lora(small, tmp_path):
    pytest.importorskip("peft")
    report = heal(HealConfig(**{**small, "train": "lora", "lr": 0.01, "lora_rank": 8}, out=tmp_path / "out"), QUIET)
    curve = report["heal"]["curve"]
    verify(tmp_path / "out")
    assert curve[-1]["kl"] < 0.9 * curve[0]["kl"]
    # the adapters are merged into their projections
    assert report["evaluation"]["ratio"] < report["heal"]["before"]["evaluation"]["ratio"]


def test_same_seed_same_bytes(small, tmp_path):
    first, second, other = (
        heal(HealConfig(**{**small, "tokens": 8 * 512, "seed": seed}, out=tmp_path / name), QUIET)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first["checksums"] == second["checksums"] != other["checksums"]
    noisy = heal(HealConfig(**{**small, "tokens": 8 * 512, "noise": 0.3}, out=tmp_path / "d"), QUIET)
    assert noisy["checksums"] != first["checksums"]


@pytest.mark.slow
def test_every_try_of_a_race_has_its_own_loss(small, tmp_path):
    benchmark, results = Path(__file__).parents[2] / "benchmarks" / "heal", tmp_path / "race.jsonl"
    common = "lr=0.01,noise=0,self_share=0"
    tries = [common, common, f"{common},ce_weight=4", f"{common},hidden_weight=1", f"{common},temperature=2", common]
    command = [sys.executable, benchmark, "race", small["folder"], "--teacher", small["teacher"], "--data", small["data"],
               "--eval", small["data"], "--results", results, "--work", tmp_path / "work", "--length", 48,
               "--step-tokens", 480, "--steps", 6, "--tokens", 9999, "--try", *tries]  # fmt: skip
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    first, again, *others, last = (row["held_out"] for row in rows if row["part"] == "race")
    assert first == again == last and len(others) == 3
    for other in others:
        assert other[0] == first[0] and other[-1] != first[-1]


def test_killed_and_resumed(small, tmp_path):
    """After SIGKILL the same command resumes, and gives the loss curve and the bytes of an uninterrupted run."""
    options = {**small, "tokens": 24 * 512, "checkpoint_minutes": 0.0}
    whole = heal(HealConfig(**options, out=tmp_path / "whole"), QUIET)
    code = (
        "import json, sys; from mla_convert.heal import HealConfig, heal; from mla_convert.core.progress import Progress\n"
        "heal(HealConfig(**json.loads(sys.argv[1])), Progress(quiet=True))"
    )
    arguments = json.dumps({**options, "out": str(tmp_path / "killed")}, default=str)
    process = subprocess.Popen([sys.executable, "-c", code, arguments])
    checkpoint = tmp_path / ".killed.heal" / "checkpoint" / "run.json"

    def step():
        try:
            return json.loads(checkpoint.read_text())["step"]
        except (OSError, ValueError):
            return 0

    while step() < 7:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists() and 7 <= step() < 24
    seen = []
    advance = Progress.advance
    resumed = Progress(quiet=True)
    resumed.advance = lambda done: seen.append(done) or advance(resumed, done)
    report = heal(HealConfig(**options, out=tmp_path / "killed"), resumed)
    assert seen[0] > 7  # it resumed, and did not start again
    for key in ("loss", "kl", "perplexity", "tokens"):
        assert [e[key] for e in report["heal"]["curve"]] == [e[key] for e in whole["heal"]["curve"]]
    assert report["checksums"] == whole["checksums"]
    assert not (tmp_path / ".killed.heal").exists()


@pytest.mark.parametrize("kind", ["nan", "spike"])
def test_bad_losses_stop_the_run_and_the_best_state_is_kept(small, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(loop, "RECENT", 4)
    monkeypatch.setattr(loop, "SPIKES", 2)
    original, calls = loop.Trainer._step, []

    def step(self, number):
        calls.append(number)
        found = original(self, number)
        if number >= 14:
            found = found * (float("nan") if kind == "nan" else 100.0)
            with torch.no_grad():  # as such a gradient would
                for parameter in self.parameters:
                    parameter.add_(float("nan") if kind == "nan" else 1.0)
        return found

    monkeypatch.setattr(loop.Trainer, "_step", step)
    report = heal(HealConfig(**small, out=tmp_path / "out"), QUIET)
    assert report["heal"]["stopped"] == ("the loss was not finite" if kind == "nan" else "the loss ran away")
    assert len(calls) < 24 and report["heal"]["best_tokens"] == 12 * 512
    assert report["evaluation"]["ratio"] < report["heal"]["before"]["evaluation"]["ratio"]
    verify(tmp_path / "out")


def test_nothing_gained_nothing_written(small, convert_pico, tmp_path):
    exact = convert_pico("llama", rank="full", rope_dim="full").out
    with pytest.raises(InputError, match="nothing better than the start"):
        heal(HealConfig(**{**small, "folder": exact, "lr": 1.0, "patience": 1}, out=tmp_path / "out"), QUIET)
    assert not list(tmp_path.iterdir())


def test_early_stop(small, tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "EVALUATION_MIN", 256)
    monkeypatch.setattr(loop, "rate_factor", lambda step, steps: 1.0 if step < 6 else 0.0)
    settings = {**small, "tokens": 60 * 512, "evaluations": 10, "patience": 2}
    report = heal(HealConfig(**settings, out=tmp_path / "out"), QUIET)
    record = report["heal"]
    assert record["stopped"] == "no improvement in 2 held-out evaluations"
    assert record["tokens"] == 18 * 512 and record["best_tokens"] == 6 * 512


def test_patience_counts_from_the_first_evaluation_behind_the_start(small, tmp_path, monkeypatch):
    """The loss may rise above the start before it falls: the run continues while it improves."""
    # The last three are those of the states between start and end.
    losses, held_out = iter([1.0, 3.0, 2.5, 2.0, 1.5, 0.5, 1.0, 1.0, 1.0]), loop.Trainer.held_out
    monkeypatch.setattr(loop.Trainer, "held_out", lambda self: {**held_out(self), "loss": next(losses)})
    monkeypatch.setattr(windows, "EVALUATION_MIN", 256)
    settings = {**small, "tokens": 20 * 512, "evaluations": 5, "patience": 2}
    record = heal(HealConfig(**settings, out=tmp_path / "out"), QUIET)["heal"]
    assert record["stopped"] is None and record["best_tokens"] == record["tokens"] == 20 * 512


def test_evaluations_take_a_small_part_of_a_run():
    for tokens, most, found in ((2 * 10**7, 20, (20, 1 << 17)), (4 * 10**6, 20, (20, 40000)), (200_000, 20, (9, 4444)),
                                (20_000, 20, (4, 4096)), (10**8, 3, (3, 1 << 17))):  # fmt: skip
        assert windows.evaluations(tokens, most) == found


def test_schedule_of_the_learning_rate():
    rates = [loop.rate_factor(step, 100) for step in range(100)]
    assert rates[0] == 0.2 and max(rates) == rates[4] == 1.0 and rates[-1] < 0.03
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))


def test_several_processes_give_the_same_curve(small, tmp_path):
    """Two processes by DDP: the same windows, the same losses, one output."""
    options = {**small, "tokens": 8 * 512}
    alone = heal(HealConfig(**options, out=tmp_path / "alone"), QUIET)
    names = {"folder": None, "eval": "--eval"}
    words = [str(options["folder"])]
    for key, value in {**options, "out": tmp_path / "both"}.items():
        if names.get(key, "") is not None:
            words += [f"--{key.replace('_', '-')}", str(value)]
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "mla_convert.heal"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *launch, *words, "--json", "-q"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout[done.stdout.index("{") :])
    assert report["heal"]["processes"] == 2
    for ours, theirs in zip(report["heal"]["curve"], alone["heal"]["curve"], strict=True):
        assert ours["kl"] == pytest.approx(theirs["kl"], rel=1e-3)
    verify(tmp_path / "both")


SHARDED = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from mla_convert.heal.settings import HealSettings
from mla_convert.heal.teacher_student import TeacherStudent
from mla_convert.source.load_model import find_model, load_model

dist.init_process_group("gloo")
rank, mesh, cpu = dist.get_rank(), init_device_mesh("cpu", (2,)), torch.device("cpu")
torch.manual_seed(0)
ids = torch.randint(4, 264, (2, 32))
for train in ("all", "attention"):
    settings = HealSettings(tokens=1, train=train)
    whole, sharded = (
        TeacherStudent.build(*(load_model(find_model(name), torch.float32, cpu) for name in sys.argv[1:]), settings, torch.float32)
        for _ in range(2)
    )
    whole(ids, ids)[0].backward()
    for layer in sharded._layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    sharded(ids[rank : rank + 1], ids[rank : rank + 1])[0].backward()
    wanted = dict(whole.named_parameters())
    for name, parameter in sharded.named_parameters():
        if parameter.requires_grad:
            gradient, expected = parameter.grad.full_tensor(), wanted[name].grad
            assert (gradient - expected).norm() < 1e-4 * expected.norm(), name
"""


@pytest.mark.slow
def test_sharded_gradients_are_the_same(small):
    """FSDP2 over two processes on the CPU, for two models and for a pair that shares its frozen weights."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = Path(small["folder"]).parent / "sharded.py"
    script.write_text(SHARDED)
    done = subprocess.run([*launch, script, small["folder"], small["teacher"]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# Bad input


@pytest.mark.parametrize(
    "change, kind, words",
    [
        ({"folder": "nowhere"}, InputError, "not a folder"),
        ({"teacher": None}, UsageError, "give --teacher"),
        ({"length": "512"}, UsageError, "longer than the model's context of 256"),
        ({"data": "nowhere.txt"}, InputError, "not found"),
        ({"eval": "same"}, UsageError, "is the text to train on"),
        ({"teacher": "itself"}, InputError, "is a converted model"),
    ],
)
def test_refuses(small, tmp_path, change, kind, words):
    change = {
        key: {"same": small["data"], "itself": str(small["folder"])}.get(value, value) for key, value in change.items()
    }
    with pytest.raises(kind, match=words):
        heal(HealConfig(**{**small, **change}, out=tmp_path / "out"), QUIET)
    assert not list(tmp_path.iterdir())


def test_amounts():
    assert [parse_tokens(text) for text in ("200k", "20M", "1.5b", "77", 5)] == [
        200_000,
        20_000_000,
        1_500_000_000,
        77,
        5,
    ]
    assert parse_lengths("1024:3,4096:1") == ((1024, 0.75), (4096, 0.25)) and parse_lengths(64) == ((64, 1.0),)
    for bad in ("", "k", "many", "0", "-3M"):
        with pytest.raises(ValueError, match="number of tokens"):
            parse_tokens(bad)
    for bad in ("", "8", "64:0", "64,64", "64:x"):
        with pytest.raises(ValueError, match="length"):
            parse_lengths(bad)


# On the command line, and as part of a conversion


def test_command(cli, small, tmp_path):
    words = ["--teacher", small["teacher"], "--data", small["data"], "--tokens", "4k", "--length", "64:0.5,128:0.5",
             "--step-tokens", 512, "--eval", small["eval"], "--eval-windows", 2, "--eval-length", 48, "--device", "cpu",
             "--lr", 0.01, "--passkey-length", 200, "--out", tmp_path / "out"]  # fmt: skip
    code, out, err = cli("heal", small["folder"], *words)
    assert code == 0, err
    assert (
        "perplexity over the original's" in out
        and "pass key found, 200 tokens" in out
        and "windows of 64:0.5,128:0.5" in out
    )
    code, _, err = cli("heal", small["folder"], "--tokens", "many")
    assert code == 2 and "'many' is no number of tokens" in err
    code, _, err = cli("heal", small["folder"], "--kl-weight", 0)
    assert code == 2 and "every weight of the loss is 0" in err


def test_conversion_that_heals(cli, sources, tmp_path):
    text = sources("llama").parent / "text.txt"
    words = ["--calib", text, "--calib-samples", 8, "--calib-length", 32, "--refine-steps", 0, "--rank", 16, "--rope-dim", 6,
             "--uniform", "--eval", "package:mla_demo/calibration.txt.gz", "--eval-windows", 2, "--eval-length", 48,
             "--device", "cpu"]  # fmt: skip
    out = tmp_path / "out"
    code, shown, err = cli(sources("llama"), *words, "--heal-tokens", "40k", "--heal-length", 64, "--out", out)
    assert code == 0, err
    report = json.loads((out / "report.json").read_text())
    assert report["heal"]["text"] == "text.txt" and "perplexity, not healed" in shown
    assert report["evaluation"]["ratio"] < report["heal"]["before"]["evaluation"]["ratio"]
    recipe = (out / "recipe.yaml").read_text()
    assert "heal_tokens: 40000" in recipe and "heal_length: '64'" in recipe and "heal_lr" not in recipe
    verify(out)
    # settings with which healing would fail are refused before the conversion
    for more, words_ in ((["--heal-tokens", "40k", "--heal-length", 512], "context of 256"),
                         (["--heal-lr", 0.1], "heal_lr means nothing without heal_tokens"),
                         (["--heal-tokens", "40k", "--heal-data", "nowhere.txt"], "not found")):  # fmt: skip
        code, _, err = cli(sources("llama"), *words, *more, "--out", tmp_path / "refused")
        assert code and words_ in err and not (tmp_path / "refused").exists()


@pytest.mark.slow
def test_demo_heals_in_a_minute(cli, tmp_path):
    """A short `mla-convert demo --heal-tokens 200k` at a quarter of the cache recovers a tenth of the loss."""
    code, _, err = cli("demo", "--kv-ratio", 0.25, "--refine-steps", 4, "--calib-samples", 8, "--calib-length", 128, "--uniform",
                       "--eval-windows", 2, "--eval-length", 256, "--heal-tokens", "20k", "--heal-length", 256, "--device", "cpu",
                       "--out", tmp_path / "out")  # fmt: skip
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    before, after = report["heal"]["before"]["evaluation"]["ratio"], report["evaluation"]["ratio"]
    assert after - 1 < 0.9 * (before - 1)
    assert Path(tmp_path / "out" / "report.html").read_text().count("Healing")


def test_the_default_rate_falls_with_the_width():
    rates = {
        train: [loop.peak_rate(HealSettings(train=train), width) for width in (64, 576, 1152)] for train in loop.RATES
    }
    assert rates == {"attention": [0.004, 0.004, 0.002], "all": [0.001, 0.001, 0.0005], "lora": [0.001] * 3}
    assert loop.peak_rate(HealSettings(lr=0.01), 4096) == 0.01
