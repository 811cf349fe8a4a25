"""CUDA graphs: a replay computes what the call computes, and a call that cannot be recorded says why."""

import contextlib

import pytest
import torch

from mla_convert.core.cuda_graph import CapturedCall, CaptureError


def recorder(close=None):
    """A stand-in for torch.cuda.graph that raises `close` when it is closed after an error."""

    @contextlib.contextmanager
    def graph(_, pool=None, capture_error_mode="global"):
        try:
            yield
        except RuntimeError:
            if close:
                raise close from None
            raise

    return graph


@pytest.fixture
def without_device(monkeypatch):
    """Calls of torch.cuda that the CPU cannot serve do nothing."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    return lambda graph: monkeypatch.setattr(torch.cuda, "graph", graph)


def test_the_error_names_what_broke_the_recording(without_device):
    without_device(recorder(close=RuntimeError("operation failed due to a previous error during capture")))

    def reads_a_value():
        raise RuntimeError("cannot synchronise while a stream is captured")

    with pytest.raises(CaptureError, match="cannot synchronise while a stream is captured"):
        CapturedCall(reads_a_value)


def test_running_out_of_memory_stays_that_error(without_device):
    without_device(recorder(close=RuntimeError("capture ended")))

    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        CapturedCall(too_large)


@pytest.mark.gpu
def test_a_replay_computes_what_the_call_computes():
    weight = torch.randn(8, 8, device="cuda")
    first, second = torch.randn(2, 4, 8, device="cuda")
    captured = CapturedCall(lambda x: x @ weight, first, warm_up=2)
    assert torch.equal(captured(second), second @ weight)
    assert torch.equal(captured(first), first @ weight)
    assert torch.equal(captured(), first @ weight)
    other = CapturedCall(lambda x: x * 2, first, pool=captured.pool())
    assert torch.equal(other(second), second * 2)
    with pytest.raises(ValueError, match="argument"):
        captured(first, second)


@pytest.mark.gpu
def test_a_call_that_reads_on_the_host_is_refused_and_the_device_stays_usable():
    x = torch.ones(4, device="cuda")
    with pytest.raises(CaptureError, match="recorded as a CUDA graph"):
        CapturedCall(lambda x: x * x.sum().item(), x)
    assert float((x + x).sum()) == 8
