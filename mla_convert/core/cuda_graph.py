"""CUDA graphs: record the kernels of one call, and launch all of them at once.

The launches of a small model's pass take longer than its kernels; a replay is one launch. A call can be recorded if it
works on tensors at fixed addresses and reads no value back to the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Output = TypeVar("Output")


class CaptureError(RuntimeError):
    """A call that cannot be recorded, for example because it reads a value on the host."""


class CapturedCall(Generic[Output]):
    """A call recorded as a CUDA graph on copies of its inputs.

    The recording does not execute the kernels: the first replay is their first execution.

    Attributes:
        inputs: the tensors that the graph reads, copies of the examples.
        output: the value that `run` returned while it was recorded; every replay overwrites its tensors.
    """

    inputs: tuple[Tensor, ...]
    output: Output

    def __init__(self, run: Callable[..., Output], *examples: Tensor, warm_up: int = 0, pool: Any = None):
        """Record `run(*examples)`.

        Args:
            run: the function; its kernels must not depend on values that the host reads.
            *examples: tensors on CUDA with the shapes and dtypes of all later inputs; they are copied.
            warm_up: calls that are executed before the recording, on a side stream, so that whatever compiles, allocates
                or tunes at the first call does it before. They change state as every call does.
            pool: the `pool()` of a graph whose memory this one shares; the two must never run at the same time.

        Raises:
            CaptureError: `run` cannot be recorded. The device is usable, and state is as before the recording.
            torch.OutOfMemoryError: the graph's own memory does not fit; a graph does not reuse that of earlier calls.
        """
        # A replay reads the addresses that were recorded, so these tensors have to live as long as the graph does.
        self.inputs = tuple(example.clone() for example in examples)
        if warm_up:
            _run_on_side_stream(run, self.inputs, warm_up)
        self._graph = torch.cuda.CUDAGraph()
        first_error = None  # closing a broken recording raises another error on top of the one that broke it
        try:
            # synchronises, and releases the cached memory that earlier calls left
            # other threads, such as NCCL's watchdog, may call CUDA meanwhile
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                try:
                    self.output = run(*self.inputs)
                except RuntimeError as error:
                    first_error = error
                    raise
        except RuntimeError as error:
            torch.cuda.synchronize()
            cause = first_error or error
            # Too little memory says nothing about `run`: callers try a smaller batch, or name the options that need
            # less.
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            raise CaptureError(f"cannot be recorded as a CUDA graph: {cause}") from cause

    def __call__(self, *inputs: Tensor) -> Output:
        """Copy `inputs` into the graph's tensors and replay; without inputs, replay on what the tensors hold.

        Returns:
            `output`, valid until the next replay.
        """
        if inputs:
            for target, source in zip(self.inputs, inputs, strict=True):
                target.copy_(source)
        self._graph.replay()
        return self.output

    def pool(self) -> Any:
        """Handle of the graph's memory, for the `pool` of another graph."""
        return self._graph.pool()


def _run_on_side_stream(run: Callable[..., Any], inputs: tuple[Tensor, ...], times: int) -> None:
    """Call `run(*inputs)` on a stream of its own, as capture needs: the default stream cannot be captured."""
    side = torch.cuda.Stream()
    # Streams run independently: the inputs must be written before the side stream reads them, and its results must be
    # there before the current one continues.
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(times):
            run(*inputs)
    torch.cuda.current_stream().wait_stream(side)
