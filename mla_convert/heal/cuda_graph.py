"""Forward and backward passes of training; on one GPU, a shape that recurs is captured as a CUDA graph."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mla_convert.core.cuda_graph import CapturedCall
from mla_convert.heal.windows import Batch

# Eager passes of a shape before it is captured: whatever is compiled has to be compiled by then.
EAGER_PASSES = 4
# A captured pass is kept if its loss and the norm of its gradients are those of an eager one, up to rounding.
LOSS_TOLERANCE, NORM_TOLERANCE = 0.01, 0.03

# ids (B, L), labels (B, L), positions (B, L) or None, counted (B, L) or None, scale of the loss -> scaled loss (); adds up
# gradients
Run = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, float], Tensor]


class GraphedStep:
    """Runs a forward and backward pass, eagerly or as the CUDA graph of its shape.

    Graphs write the gradients at fixed addresses: nothing may set them to None between calls.
    """

    def __init__(self, run: Run, parameters: list[nn.Parameter], capture: bool):
        """Capture nothing yet.

        Args:
            run: the pass; its inputs are on CUDA if `capture` is set.
            parameters: whose gradients it adds to.
            capture: whether to capture passes; `self.capture` is unset when one cannot be.
        """
        self._run, self._parameters, self.capture = run, parameters, capture
        self._seen: Counter = Counter()
        self._captured: dict[tuple, CapturedCall[Tensor]] = {}

    def __call__(self, batch: Batch, grad_scale: float, first: bool) -> Tensor:
        """One pass.

        Args:
            batch: on the device of the parameters.
            grad_scale: factor of the loss and its gradients.
            first: the pass is the first of a step, so that all gradients are zero.

        Returns:
            The scaled loss (), valid until the next call.
        """
        # The scale is a number in the recorded kernels: a step's last, smaller pass has a scale, and so a graph, of its
        # own.
        key = (tuple(batch.ids.shape), grad_scale)
        # transformers reads the positions of a packed window on the host, which no recording allows, and the number of counted
        # tokens is no constant.
        if not self.capture or batch.positions is not None or batch.counted is not None:
            return self._run(batch.ids, batch.labels, batch.positions, batch.counted, grad_scale)
        if key in self._captured:
            return self._captured[key](batch.ids, batch.labels)
        self._seen[key] += 1
        loss = self._run(batch.ids, batch.labels, None, None, grad_scale)
        # Only the first pass of a step leaves gradients of its own alone, with which a replay can be compared.
        if first and self._seen[key] > EAGER_PASSES:
            return self._checked(key, batch, grad_scale, loss)
        return loss

    def _checked(self, key: tuple, batch: Batch, grad_scale: float, loss: Tensor) -> Tensor:
        """Capture the pass that has just run, and replay it: loss and gradients have to be the same."""
        eager = torch.stack([loss, self._norm()])

        def run(ids: Tensor, labels: Tensor) -> Tensor:
            return self._run(ids, labels, None, None, grad_scale)

        try:
            captured = CapturedCall(run, batch.ids, batch.labels)
        except RuntimeError as error:  # the model reads values on the host, as experts do; or memory does not suffice
            self.capture = False
            warnings.warn(f"training runs without CUDA graphs: {error}", stacklevel=2)
            return loss
        # Recording executed nothing, so these gradients are the eager pass's; the replay has to make its own.
        self._zero()
        replayed = torch.stack([captured(batch.ids, batch.labels), self._norm()])
        errors = ((replayed - eager).abs() / eager.abs().clamp_min(1e-30)).tolist()
        if errors[0] <= LOSS_TOLERANCE and errors[1] <= NORM_TOLERANCE:
            self._captured[key] = captured
            return captured.output
        self.capture = False
        warnings.warn(
            f"training runs without CUDA graphs: a captured pass came to another result, {errors}", stacklevel=2
        )
        self._zero()
        return self._run(batch.ids, batch.labels, None, None, grad_scale)

    def _norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])

    def _zero(self) -> None:
        torch._foreach_zero_([p.grad for p in self._parameters if p.grad is not None])
