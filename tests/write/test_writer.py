"""Shards that are written in the background, as beside a GPU."""

import json
import threading

import pytest
import torch

from mla_convert.core import runtime
from mla_convert.write import writer

TENSORS = {"weight": torch.ones(2, 2)}


@pytest.fixture
def held(monkeypatch):
    """Writing waits for `held.set()`; it is in the background."""
    monkeypatch.setattr(runtime, "in_background", lambda device: True)
    gate, save = threading.Event(), writer.save_file

    def waiting(*given):
        assert gate.wait(30)
        save(*given)

    monkeypatch.setattr(writer, "save_file", waiting)
    return gate


def test_the_run_goes_on_while_a_shard_is_written(held, tmp_path):
    with writer.Writer(tmp_path / "out", {}) as output:
        output.write_shard("a.safetensors", TENSORS, {"layer": 0})
        assert not (output.folder / "a.safetensors").exists()
        assert output.finished == {"a.safetensors": {"note": {"layer": 0}}}
        held.set()
        output.write_shard("b.safetensors", TENSORS)
        assert list(output.checksums()) == ["a.safetensors", "b.safetensors"]
        output.write_index()
        output.publish()
    index = json.loads((tmp_path / "out" / writer.INDEX).read_text())
    assert index["metadata"]["total_size"] == 32


def test_an_interruption_keeps_the_shard_that_is_being_written(held, tmp_path):
    def run():
        with writer.Writer(tmp_path / "out", {}) as output:
            output.write_shard("a.safetensors", TENSORS, {"layer": 0})
            threading.Timer(0.2, held.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="1 layers are kept"):
        run()
    with writer.Writer(tmp_path / "out", {}) as output:
        assert output.finished["a.safetensors"]["note"] == {"layer": 0}
        assert torch.equal(output.load_shard("a.safetensors")["weight"], TENSORS["weight"])


def test_a_failure_in_the_background_is_raised_before_the_folder_gets_its_name(held, tmp_path, monkeypatch):
    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "save_file", full)
    with pytest.raises(writer.ResourceError, match="free disk space"), writer.Writer(tmp_path / "out", {}) as output:
        output.write_shard("a.safetensors", TENSORS)
        output.write_index()
    assert not list(tmp_path.iterdir())
