"""Layers that are read while the one before is converted, as beside a GPU."""

import threading

import pytest

from mla_convert.core import runtime
from mla_convert.core.errors import InputError
from mla_convert.pipeline.layer_files import LayerReader


class Source:
    """A source whose layers have one number for tensors, and that records which thread reads."""

    device = None

    def __init__(self):
        self.threads = {}

    def layer_tensors(self, index):
        self.threads[index] = threading.current_thread() is threading.main_thread()
        if index == 3:
            raise InputError("layer 3 is damaged")
        return {"index": index}


@pytest.mark.parametrize("background", [False, True])
def test_the_next_layer_is_read_ahead(monkeypatch, background):
    monkeypatch.setattr(runtime, "in_background", lambda device: background)
    source = Source()
    with LayerReader(source) as reader:
        reader.begin(1)
        assert reader.read(1) == {"index": 1} and reader.read(2) == {"index": 2}
        reader.begin(5)
        assert reader.read(4) == {"index": 4}, "what was begun is not what is asked for"
        reader.begin(3)
        with pytest.raises(InputError, match="layer 3 is damaged"):
            reader.read(3)
    assert source.threads[1] is not background and source.threads[2]
