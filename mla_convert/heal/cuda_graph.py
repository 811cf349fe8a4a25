"""Forward and backward passes of training; on one GPU, where a shape comes often, as one CUDA graph.

A small model's pass is many hundreds of launches, which take longer than what they launch.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mla_convert.heal.data import Batch

# Passes of a shape before it is captured: what is compiled has to be by then.
EAGER_PASSES = 4
# A captured pass is kept if its loss and its gradients' norm are those of an eager one, but for rounding.
LOSS_TOLERANCE, NORM_TOLERANCE = 0.01, 0.03

# ids (B, L), labels (B, L), positions (B, L) or None, share of the step's loss -> loss; gradients are added up
Run = Callable[[Tensor, Tensor, Tensor | None, float], Tensor]


class GraphedStep:
    """Calls `run`, or replays what it did. Gradients must stay where they are: nothing may set them to None in between."""

    def __init__(self, run: Run, parameters: list[nn.Parameter], capture: bool):
        self._run, self._parameters, self.capture = run, parameters, capture
        self._seen: Counter = Counter()
        self._captured: dict[tuple, _Captured] = {}

    def __call__(self, batch: Batch, share: float, first: bool) -> Tensor:
        """Loss of a batch, times `share`, valid until the next call. `first`: of a step, so that all gradients are zero."""
        key = (tuple(batch.ids.shape), share)
        if not self.capture or batch.positions is not None:
            return self._run(batch.ids, batch.labels, batch.positions, share)
        if key in self._captured:
            return self._captured[key](batch)
        self._seen[key] += 1
        loss = self._run(batch.ids, batch.labels, None, share)
        if first and self._seen[key] > EAGER_PASSES:
            return self._checked(key, batch, share, loss)
        return loss

    def _checked(self, key: tuple, batch: Batch, share: float, loss: Tensor) -> Tensor:
        """Capture the pass that has just run, and run it again as a graph, which has to come to the same."""
        wanted = torch.stack([loss, self._norm()])
        try:
            captured = _Captured(self._run, batch, share)
        except RuntimeError as error:  # a model that looks at its numbers on the way, as experts do
            torch.cuda.synchronize()
            self.capture = False
            warnings.warn(f"training runs without CUDA graphs, as a pass cannot be captured: {error}", stacklevel=2)
            return loss
        self._zero()
        found = torch.stack([captured(batch), self._norm()])
        wrong = ((found - wanted).abs() / wanted.abs().clamp_min(1e-30)).tolist()
        if wrong[0] <= LOSS_TOLERANCE and wrong[1] <= NORM_TOLERANCE:
            self._captured[key] = captured
            return captured.loss
        self.capture = False
        warnings.warn(
            f"training runs without CUDA graphs: a captured pass came to another result, {wrong}", stacklevel=2
        )
        self._zero()
        return self._run(batch.ids, batch.labels, None, share)

    def _norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])

    def _zero(self) -> None:
        torch._foreach_zero_([p.grad for p in self._parameters if p.grad is not None])


class _Captured:
    """One pass on fixed buffers, recorded without being run."""

    def __init__(self, run: Run, batch: Batch, share: float):
        self.ids, self.labels = batch.ids.clone(), batch.labels.clone()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # a graph allocates anew: do not hold what eager passes used beside it
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = run(self.ids, self.labels, None, share)

    def __call__(self, batch: Batch) -> Tensor:
        self.ids.copy_(batch.ids)
        self.labels.copy_(batch.labels)
        self.graph.replay()
        return self.loss
