"""Output that must not be replaced, a full disk and Ctrl-C: the right exit code, one line, and nothing half-written."""

import errno
import json
import resource
import shutil
from types import SimpleNamespace

import pytest
from filelock import FileLock
from refusals import INPUT, INTERRUPTED, RESOURCE, assert_one_line, change_weights, shards, truncate

from mla_convert.core import runtime
from mla_convert.core.progress import Progress
from mla_convert.report.report import Report
from mla_convert.write import writer


@pytest.fixture(params=[False, True], ids=["", "background"])
def background(request, monkeypatch):
    """Without and with files that are read and written while a layer is converted, as beside a GPU."""
    monkeypatch.setattr(runtime, "in_background", lambda device: request.param)


# ---- where to write


def test_output_that_is_not_ours_stays(refused, source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("precious")
    refused(INPUT, "--overwrite", source)


@pytest.mark.parametrize("place", [".", ".."])
def test_output_is_or_holds_the_working_folder(refused, source, tmp_path, monkeypatch, place):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    refused(INPUT, f"output folder {place}", source, "--overwrite", "--out", place)


def test_overwrite_replaces_what_is_not_ours(cli, source, small, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("no longer")
    assert_one_line(*cli(source, *small), INPUT, "--overwrite")
    assert cli(source, *small, "--overwrite")[0] == 0
    assert writer.is_ours(out) and not (out / "precious.txt").exists()
    assert cli(source, *small)[0] == 0, "what is ours needs no flag"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_overwrite_keeps_the_old_until_the_new_is_complete(refused, source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    change_weights(source, "model.layers.2.mlp.up_proj.weight", lambda tensor: tensor * float("nan"))
    refused(INPUT, "layers.2", source, "--overwrite")


def test_output_is_a_file(refused, source, tmp_path):
    (tmp_path / "out").write_text("a file")
    refused(INPUT, "out", source, "--overwrite")


@pytest.mark.parametrize("place", ["source", "."])
def test_output_is_or_holds_the_source(refused, source, tmp_path, place):
    refused(INPUT, "output folder", source, "--overwrite", "--out", tmp_path / place)


def test_parent_is_not_writable(refused, source, tmp_path, monkeypatch):
    def probe(dir, **_):
        raise PermissionError(errno.EACCES, "Permission denied", str(dir))

    refused(RESOURCE, "text.txt", source, "--out", tmp_path / "text.txt" / "out")
    monkeypatch.setattr("mla_convert.write.writer.tempfile.TemporaryFile", probe)
    refused(RESOURCE, "Permission denied", source)


@pytest.mark.parametrize("options", [("--rank", 0), ("--calib-samples", 9999)])
def test_refused_input_leaves_no_parent_folders(refused, source, tmp_path, options):
    refused(INPUT, "", source, *options, "--out", tmp_path / "new" / "folder" / "out")


def test_failed_conversion_leaves_no_parent_folders(refused, source, tmp_path):
    change_weights(source, "model.layers.2.mlp.up_proj.weight", lambda tensor: tensor * float("nan"))
    refused(INPUT, "layers.2", source, "--out", tmp_path / "new" / "folder" / "out")


def test_another_conversion_is_writing(cli, source, small, tmp_path):
    with FileLock(tmp_path / ".out.lock"):
        assert_one_line(*cli(source, *small), RESOURCE, "another conversion")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


# ---- disk full


def test_disk_too_small(refused, source, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    refused(RESOURCE, "free space", source)


def test_disk_full_for_real(refused, source):
    """The first shard is above the size that the system lets a file have."""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, hard))
    try:
        refused(RESOURCE, "free disk space", source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))


def test_disk_full_at_a_layer(refused, source, monkeypatch, background):
    real = writer.save_file

    def save(tensors, path, *metadata):
        if path.name.startswith("model-00003"):
            path.write_bytes(b"half a shard")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, *metadata)

    monkeypatch.setattr(writer, "save_file", save)
    refused(RESOURCE, "free disk space", source)


def test_disk_full_at_the_report(refused, source, monkeypatch):
    def write(_, folder):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "report.json"))

    monkeypatch.setattr(Report, "write", write)
    refused(RESOURCE, "No space left on device", source, "--quiet")


def test_out_of_memory(refused, source, monkeypatch):
    def layer_done(*_):
        raise MemoryError

    monkeypatch.setattr(Progress, "layer_done", layer_done)
    refused(RESOURCE, "out of memory", source)


# ---- Ctrl-C


def interrupt(monkeypatch, at, method="layer_done"):
    """A Ctrl-C at the `at`-th call of a progress method (from 0)."""
    calls = []

    def raising(*_):
        calls.append(1)
        if len(calls) > at:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, method, raising)


def test_interrupt_before_the_first_layer_leaves_nothing(refused, source, monkeypatch):
    interrupt(monkeypatch, 0, "start")
    refused(INTERRUPTED, "interrupted", source)


@pytest.mark.parametrize("finished", [1, 2])
def test_interrupted_run_is_resumed(cli, source, small, tmp_path, monkeypatch, finished, background):
    options = (*small, "--refine-steps", 3, "--kv-ratio", 0.4)
    assert cli(source, *options, "--out", tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        interrupt(patch, finished - 1)
        assert_one_line(*cli(source, *options), INTERRUPTED, "interrupted")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.lock").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in shards(tmp_path / ".out.partial")}
    assert len(kept) == finished + 2  # and the two ends
    assert cli(source, *options)[0] == 0
    assert not (tmp_path / ".out.partial").exists()
    for path in shards(tmp_path / "whole"):
        again = tmp_path / "out" / path.name
        assert again.read_bytes() == path.read_bytes()
        assert kept.get(path.name, again.stat().st_mtime_ns) == again.stat().st_mtime_ns, (
            "a kept shard is not rewritten"
        )
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("out", "whole")]
    assert reports[0]["evaluation"] == reports[1]["evaluation"]


@pytest.mark.parametrize("change", [("--seed", 1), ("--kv-ratio", 0.3), "damage"])
def test_what_no_longer_fits_is_not_resumed(cli, source, small, tmp_path, monkeypatch, change):
    with monkeypatch.context() as patch:
        interrupt(patch, 1)
        assert cli(source, *small)[0] == INTERRUPTED
    if change == "damage":
        truncate(shards(tmp_path / ".out.partial")[1])
        change = ()
    assert cli(source, *small, *change)[0] == 0
    assert cli(source, *small, *change, "--out", tmp_path / "whole")[0] == 0
    for path in shards(tmp_path / "whole"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("steps, layers", [(9, 2), (12, 3)])
def test_interrupted_before_the_last_steps(cli, source, small, tmp_path, monkeypatch, steps, layers, background):
    """Where all layers take the last steps together, blocks are kept before them: of 8 steps, of 3, then the last 3."""
    options = (*small, "--refine-steps", 3, "--refine-block", 2, "--block-steps", 2, "--output-steps", 3, "--output-layers", 3,
               "--kv-ratio", 0.4)  # fmt: skip
    assert cli(source, *options, "--out", tmp_path / "whole")[0] == 0
    counts = []
    for at in (steps, 10**9):
        with monkeypatch.context() as patch:
            taken = []

            def step(*_, at=at, taken=taken):
                taken.append(1)
                if len(taken) > at:
                    raise KeyboardInterrupt

            patch.setattr(Progress, "step", step)
            code, out, err = cli(source, *options)
        counts.append(len(taken))
        if at == steps:
            assert_one_line(code, out, err, INTERRUPTED, f"{layers} layers are kept")
    assert code == 0 and counts == [steps + 1, 14 - (8 if layers == 2 else 11)]
    for path in shards(tmp_path / "whole"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert not [*(tmp_path / "out").glob("draft*")] and not (tmp_path / ".out.partial").exists()
