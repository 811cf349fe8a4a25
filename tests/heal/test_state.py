"""A healing run resumes only from a checkpoint of the same weights and the same text."""

import os
import shutil

import pytest
from safetensors.torch import load_file

from mla_convert.core.errors import InputError, ResourceError
from mla_convert.core.progress import Progress
from mla_convert.core.sums import SUMS
from mla_convert.heal import HealConfig, heal, run
from mla_convert.heal.fingerprint import content_of, text_content
from mla_convert.heal.state import StateFolder
from mla_convert.write.verify import verify


class Notes(Progress):
    def __init__(self):
        super().__init__(quiet=True)
        self.said = []

    def note(self, words):
        self.said.append(words)


@pytest.fixture
def stopped(convert_pico, sources, tmp_path, monkeypatch):
    """Settings of a run that was interrupted after its first checkpoint, with files that a test may change."""
    converted = shutil.copytree(convert_pico("llama", rank=16, rope_dim=6, refine_steps=4).out, tmp_path / "converted")
    source = shutil.copytree(sources("llama"), tmp_path / "source")
    text = shutil.copy(sources("llama").parent / "text.txt", tmp_path / "text.txt")
    settings = {
        "folder": converted, "teacher": str(source), "data": str(text), "device": "cpu", "tokens": 6 * 512, "length": "64",
        "step_tokens": 512, "evaluations": 3, "lr": 0.01, "eval_windows": 2, "eval_length": 48, "checkpoint_minutes": 0.0,
        "eval": "package:mla_demo/calibration.txt.gz", "self_share": 0, "out": tmp_path / "out",
    }  # fmt: skip
    save = StateFolder.save

    def once(self, *content):
        save(self, *content)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StateFolder, "save", once)
        with pytest.raises(KeyboardInterrupt):
            heal(HealConfig(**settings), Progress(quiet=True))
    assert (tmp_path / ".out.heal" / "checkpoint" / "run.json").exists() and not (tmp_path / "out").exists()
    return settings


def test_what_follows_the_training_is_repeated_without_it(stopped, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_weights", lambda *_: (_ for _ in ()).throw(ResourceError("no room")))
        with pytest.raises(ResourceError, match=r"no room; a checkpoint after 6 steps is in .*: run the same command"):
            heal(HealConfig(**stopped), Progress(quiet=True))
    kept = tmp_path / ".out.heal" / "checkpoint"
    assert sorted(path.name for path in kept.iterdir()) == ["best.safetensors", "run.json"]
    monkeypatch.setattr(run, "Trainer", None)
    report = heal(HealConfig(**stopped), Progress(quiet=True))
    assert report["heal"]["steps"] == 6 and report["heal"]["curve"] and (tmp_path / "out" / "config.json").exists()
    assert not kept.exists()


def rewrite(path, change):
    """Change the content of a file, but not its size and times."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def exponent(content):
    content[-4 * 48 : -4 * 47] = bytes(4)


def letters(content):
    content[:] = content.replace(b"the", b"thy")


CHANGES = {
    "nothing": None,
    "the original": lambda settings, folder: rewrite(folder / "source" / "model.safetensors", exponent),
    "the text": lambda settings, folder: rewrite(folder / "text.txt", letters),
    "a setting": lambda settings, folder: settings.update(lr=0.011),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_starts_anew(stopped, tmp_path, what):
    if CHANGES[what]:
        CHANGES[what](stopped, tmp_path)
    notes = Notes()
    heal(HealConfig(**stopped), notes)
    anew = [words for words in notes.said if "starting anew" in words]
    assert len(anew) == (what != "nothing") and all(what in words for words in anew)
    fresh = tmp_path / "fresh"
    heal(HealConfig(**{**stopped, "out": fresh}), Progress(quiet=True))
    for path in fresh.glob("*.safetensors"):
        ours, theirs = load_file(tmp_path / "out" / path.name), load_file(path)
        assert all(ours[name].equal(theirs[name]) for name in theirs)
    verify(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_values_of_another_measurement_are_not_reused(stopped, tmp_path):
    before = {path.name for path in (tmp_path / ".out.heal").glob("before-*")}
    report = heal(HealConfig(**{**stopped, "eval_windows": 1}), Progress(quiet=True))
    assert before and report["heal"]["before"]["evaluation"]["before"]["windows"] == 1


def test_a_damaged_folder_is_refused(stopped, tmp_path):
    rewrite(stopped["folder"] / "model-00002-of-00005.safetensors", exponent)
    with pytest.raises(InputError, match="model-00002"):
        heal(HealConfig(**stopped), Progress(quiet=True))


def test_files_of_others_are_named_before_anything_is_replaced(stopped):
    (stopped["folder"] / SUMS).unlink()
    (stopped["folder"] / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt"):
        heal(HealConfig(**{**stopped, "out": None}), Progress(quiet=True))


def test_full_disk_at_the_first_write(stopped, tmp_path, monkeypatch):
    shutil.rmtree(tmp_path / ".out.heal")

    def full(*names, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mla_convert.heal.state.write_file", full)
    with pytest.raises(ResourceError, match="No space left"):
        heal(HealConfig(**stopped), Progress(quiet=True))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_fingerprints(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"x")
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / "x.gguf").write_bytes(b"y")
    assert content_of(tmp_path).keys() == {"a.safetensors"} and content_of(tmp_path, "x.gguf").keys() == {"x.gguf"}
    assert text_content(str(tmp_path / "report.json")) and text_content("package:mla_demo/calibration.txt.gz")
    assert text_content(None) is None and text_content("some/data@train") is None
