"""A full or failing disk, or a kill, at any change of a file: nothing is half-written, and the next run gives the same bytes."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mla_convert.write.intact import check_intact

FULL, BROKEN, KILL = 1, 2, 3
RESOURCE = 5
HERE = Path(__file__).parents[1]
COMPILER = shutil.which("cc") or shutil.which("gcc")
TIMED = ("report.json", "report.html", "export.json", "SHA256SUMS")  # they contain durations
pytestmark = pytest.mark.skipif(
    not COMPILER or not sys.platform.startswith("linux"), reason="needs Linux and a C compiler"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Runs a command in which the n-th change of a file fails."""
    layer = tmp_path_factory.mktemp("layer") / "fault_layer.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", layer, HERE / "fault_layer.c", "-ldl"], check=True)
    env = {**os.environ, "LD_PRELOAD": str(layer), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, HERE / "fault_server.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               text=True, env=env)  # fmt: skip

    def run(argv, below, at=-1, kind=0):
        asked = {"argv": [*map(str, argv)], "below": str(below), "at": at, "kind": kind}
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield run
    process.stdin.close()
    process.wait(timeout=30)


def contents(folder):
    """Checksums of all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def lasting(found):
    return {name: content for name, content in found.items() if name not in TIMED}


class Job:
    """A command and the folder that it writes; `before`: the existing folder, or None."""

    def __init__(self, server, work, argv, before=None):
        self.server, self.work, self.argv, self.before = server, work / "work", argv, before
        self.out = self.work / "out"
        done = self.again()
        assert done["code"] == 0, done["err"]
        self.changes, self.after = done["counted"], contents(self.out)
        assert self.left() == [] and self.changes > 10

    def again(self, at=-1, kind=0):
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        if self.before:
            shutil.copytree(self.before, self.out)
        return self.server(self.argv(self.out), self.work, at, kind)

    def left(self):
        return sorted(path.name for path in self.work.iterdir() if path != self.out)

    def is_old(self):
        return contents(self.out) == contents(self.before) if self.before else not self.out.exists()

    def is_new(self):
        if not self.out.exists() or lasting(contents(self.out)) != lasting(self.after):
            return False
        check_intact(self.out)
        return True

    def fail(self, at, kind):
        """A full disk, or one failure: one line of error, and nothing is changed."""
        found = self.again(at, kind)
        where = f"change {at} of {self.changes}, kind {kind}: {found}"
        if found["code"] == 0:  # the failed call was not necessary: a deletion, or a sync
            assert self.is_new(), where
        else:
            assert found["code"] == RESOURCE and len(found["err"].splitlines()) == 1, where
            assert found["err"].startswith("mla-convert: "), where
            assert self.is_old(), where
        assert self.left() == [] or self.may_keep(), f"{where}: {self.left()}"

    def may_keep(self):
        """Healing keeps its state for the next run."""
        return self.left() == [".out.heal"] and (self.work / ".out.heal" / "checkpoint" / "run.json").exists()

    def kill(self, at):
        """A kill: the output is the old or the new folder, and the same command then completes the new one."""
        found = self.again(at, KILL)
        where = f"killed at change {at} of {self.changes}: {found}"
        assert found["code"] in (-9, 0), where
        assert self.is_old() or self.is_new(), where
        done = self.server(self.argv(self.out), self.work)
        assert done["code"] == 0 and self.is_new() and self.left() == [], f"{where}, then {done}, {self.left()}"

    def some(self, count, seed=0):
        """Changes to try: the first, the last ones (the renames), and others."""
        draw = random.Random(seed)
        last = range(self.changes - 6, self.changes)
        return sorted({0, draw.choice(last), *(draw.randrange(self.changes) for _ in range(count))})

    def try_all(self, places):
        for at in places:
            self.kill(at)
            self.fail(at, FULL)
            self.fail(at, BROKEN)


@pytest.fixture(scope="module")
def text(sources):
    return sources("llama").parent / "text.txt"


@pytest.fixture(scope="module")
def converted(convert_pico):
    return convert_pico("llama", rank=10, rope_dim=8, rope_selection="engine_table").out


@pytest.fixture(scope="module")
def jobs(server, sources, converted, text, tmp_path_factory):
    """Jobs by name, each made once."""
    small = ["--calib", text, "--eval", text, "--calib-samples", 2, "--calib-length", 16, "--eval-windows", 1, "--eval-length", 16,
             "--refine-steps", 0, "--device", "cpu", "-q"]  # fmt: skip
    made = {}

    def old(folder):
        shutil.copytree(converted, folder)
        (folder / "SHA256SUMS").unlink()
        (folder / "modeling_mla.py").write_text("# as it was\n")
        report = json.loads((folder / "report.json").read_text())
        report["versions"]["mla_convert"] = "0.1.0"
        (folder / "report.json").write_text(json.dumps(report))
        return folder

    def make(name, work):
        if name.startswith("convert"):
            before = converted if name == "convert over" else None
            return Job(
                server, work, lambda out: ["convert", sources("llama"), "--rank", 10, "--out", out, *small], before
            )
        if name == "export":
            return Job(
                server,
                work,
                lambda out: [
                    "export",
                    converted,
                    "--profile",
                    "hf-code",
                    "--pad",
                    "none",
                    "--out",
                    out,
                    "--overwrite",
                    "-q",
                ],
            )
        if name == "refresh":
            return Job(server, work, lambda out: ["refresh", out, "-q"], old(work / "old"))
        return Job(server, work, lambda out: [
            "heal", converted, "--teacher", sources("llama"), "--data", text, "--eval", small_text(text, work), "--tokens", "400",
            "--length", 32, "--step-tokens", 64, "--self-share", 0, "--eval-windows", 1, "--eval-length", 32, "--evaluations", 2,
            "--checkpoint-minutes", 0, "--device", "cpu", "--out", out, "-q"])  # fmt: skip

    def get(name):
        if name not in made:
            made[name] = make(name, tmp_path_factory.mktemp("faults"))
        return made[name]

    return get


def small_text(text, work):
    path = work / "other.txt"
    path.write_text(text.read_text()[-4000:])
    return path


JOBS = {"convert": 2, "convert over": 0, "export": 0, "refresh": 1, "heal": 0}


@pytest.mark.parametrize("name", JOBS)
def test_at_some_changes(jobs, name):
    job = jobs(name)
    job.try_all(job.some(JOBS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_at_every_change(jobs, name):
    job = jobs(name)
    job.try_all(range(job.changes))
