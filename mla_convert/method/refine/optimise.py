"""Refinement: gradient steps on converted attention modules towards the source's residual stream.

Layer after layer, the input is the converted model's own hidden states and the target is the source's residual stream
behind the attention, so that each layer also compensates what the earlier ones lost. Only the layers that are refined
are in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mla_convert.core.cuda_graph import CapturedCall, CaptureError
from mla_convert.core.processes import Processes, alone
from mla_convert.method.calibrate.attention_forward import Forward
from mla_convert.method.calibrate.hidden_states import Activations
from mla_convert.method.refine.relative_adam import BestState, RelativeAdam, set_rates, warmup_cosine

# Steps of warm-up, or two thirds of all if that is fewer: the noise of a short run is not averaged out, and a warm-up of
# 3 steps in 30 lost more than one of 20 (SmolLM2-135M at 50% on a CPU: 1.417 against 1.375).
WARMUP = 20
BETAS = (0.9, 0.98)
GRADIENT_NORM = 1.0
# Eager steps before one is captured as a CUDA graph; they train like all others.
EAGER_STEPS = 3
# Least weight of a channel, as a fraction of the mean over channels: the curvature is measured on few tokens.
CHANNEL_FLOOR = 1e-3
# Held-out fraction of the windows, and their largest number.
HELD_OUT_FRACTION = 1 / 16
HELD_OUT_MAX = 32
# Held-out evaluations during a refinement.
EVALUATIONS = 4
# The learning rate is scaled by sqrt(own error / OWN_ERROR), at most 1.
OWN_ERROR = 0.01

# residual streams (B, L, d) of the converted model and of the source -> the loss, a mean over tokens
Distance = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class RefineSettings:
    """Steps and learning rates of a conversion's refinement.

    Each layer is refined alone; then blocks of layers together, if they have more than one layer; then the last blocks
    together, towards the source's next-token distribution. Learning rates are relative to the root mean square of each
    parameter, and hold for an own error of OWN_ERROR or more (`step_size`).
    """

    steps: int  # of each layer alone
    batch: int  # windows of a step
    lr: float
    seed: int
    block: int = 1  # layers of a block
    block_steps: int = 0
    block_lr: float = 0.009
    output_steps: int = 0  # towards the next-token distribution
    output_layers: int = 1  # the blocks that hold at least as many of the last layers take these steps

    @property
    def steps_per_layer(self) -> int:
        """Steps alone and in a block that each layer takes part in."""
        return self.steps + self.block_steps


@dataclass(frozen=True)
class RefineResult:
    """Held-out distance of the residual stream from its target before and after, and the steps taken."""

    error_before: float
    error_after: float
    steps: int


def relative_error(states: Tensor, expected: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean over tokens of log(1 + |states - expected|^2 / |expected|^2).

    Relative to each token, because the norms that read the stream divide by its length: plain squares would be dominated
    by the few tokens with massive activations (arXiv 2402.17762), above all the first one. The logarithm (Cauchy's loss)
    bounds the tokens that are massive in one model only: they are wrong a thousand times over and cannot be corrected.

    Args:
        states: residual stream (B, L, d).
        expected: its target (B, L, d).
        weight: of each channel's squared error (d,), as from `channel_weights`; equal if None.
    """
    error = (states - expected).square()
    if weight is not None:
        error = error * weight
    return (error.mean(-1) / expected.square().mean(-1).clamp_min(1e-12)).log1p().mean()


@torch.no_grad()
def channel_weights(curvature: Tensor, targets: Activations) -> Tensor:
    """Weights of the channels for `relative_error`.

    A few channels may hold almost all of a stream's energy and mean little, because norms scale them down: 4 of 640 hold
    98% in Gemma 3 270M. The weights are scaled such that an error that is the same fraction of every channel is as large
    as without weights.

    Args:
        curvature: E[g^2] (d,) of the loss's gradient g in the stream: the diagonal of its Fisher information.
        targets: residual streams that the weights are scaled for.

    Returns:
        (d,), float32.
    """
    curvature, targets = (
        curvature[: targets.hidden_size],
        targets.plain(),
    )  # of the first stream, where there are several
    squares = torch.zeros_like(curvature)
    for batch in targets.batches():
        stream = targets.get(batch).double()
        squares += (stream.square() / stream.square().mean(-1, keepdim=True).clamp_min(1e-12)).mean((0, 1)) * len(
            stream
        )
    squares = targets.processes.sum(squares)
    weight = curvature + CHANNEL_FLOOR * curvature.mean()
    return (weight * squares.sum() / (weight * squares).sum().clamp_min(1e-30)).float()


@torch.no_grad()
def residual_targets(original: Forward, states: Activations) -> Activations:
    """The source's residual stream behind its attention, for all windows."""
    targets = None
    for batch in states.batches():
        stream = behind(original, states.get(batch))
        targets = states.empty_like(stream.shape[-1]) if targets is None else targets
        targets.put(batch, stream)
    return states.empty_like() if targets is None else targets


def behind(branch: Forward, hidden: Tensor) -> Tensor:
    """The residual stream (B, L, d) behind a branch, from that before it; columns beside the stream are left out."""
    added = branch(hidden)
    return hidden[..., : added.shape[-1]] + added


def _held_out(windows: int) -> range:
    """Windows that no step trains on: the last ones."""
    return range(windows - min(HELD_OUT_MAX, max(1, round(windows * HELD_OUT_FRACTION))), windows)


def held_out_states(states: Activations) -> Iterator[Tensor]:
    """This process's held-out windows (1, L, d), one by one."""
    return (states.get(slice(window, window + 1)) for window in states.own(_held_out(states.total)))


@torch.no_grad()
def output_error(student: Forward, original: Forward, states: Activations) -> float:
    """Mean squared difference of two attention outputs on equal inputs, over the source's mean square."""
    error = total = 0.0
    for hidden in held_out_states(states):
        expected = original(hidden)
        error += float((student(hidden) - expected).square().mean())
        total += float(expected.square().mean())
    error, total = states.processes.totals(error, total)
    return error / max(total, 1e-30)


@torch.no_grad()
def held_out_streams(forward: Forward, inputs: Activations) -> list[Tensor]:
    """The residual stream (1, L, d) behind `forward`, for each held-out window."""
    return [behind(forward, hidden) for hidden in held_out_states(inputs)]


@torch.no_grad()
def residual_error(
    student: Forward, inputs: Activations, expected: Iterable[Tensor], distance: Distance = relative_error
) -> float:
    """Distance of the residual stream from its target on the held-out windows.

    Against the source's own states it is the error of all layers so far; against the source's `held_out_streams` on the
    same inputs it is the own error of the layers at hand.

    Args:
        student: the layers at hand.
        inputs: residual streams before them.
        expected: residual streams (1, L, d) behind them, one for each held-out window.
        distance: between the two.
    """
    pairs = zip(held_out_states(inputs), expected, strict=True)
    errors = [float(distance(behind(student, hidden), target)) for hidden, target in pairs]
    return inputs.processes.mean(errors)


def step_size(lr: float, own_error: float) -> float:
    """`lr`, reduced where the error to correct is small.

    Weights with a relative error e are about sqrt(e) of their size away from the optimum, and Adam's steps, which do not
    shrink with the gradient, keep them about one step length away from it. Best step sizes measured: 0.005, 0.007 and
    0.014 at own errors of 4.5e-4, 1.3e-3 and 3e-3 (docs/research/refinement.md).
    """
    return lr * math.sqrt(min(1.0, own_error / OWN_ERROR)) if math.isfinite(own_error) else lr


class TrainingStep:
    """One optimizer step; on CUDA captured as a graph, as the launches of a small layer take longer than its kernels."""

    def __init__(
        self,
        parameters: list[nn.Parameter],
        student: Forward,
        settings: RefineSettings,
        distance: Distance,
        processes: Processes | None = None,
    ):
        """Make the optimizer.

        Args:
            parameters: to be trained.
            student: runs the modules that hold them.
            settings: `steps` and `lr`.
            distance: minimised between the residual stream behind `student` and its target.
            processes: that share the windows of a step; None: this one has all.
        """
        self.parameters, self.student, self.settings, self.distance = parameters, student, settings, distance
        self.optimizer = RelativeAdam(parameters, settings.lr, BETAS, capturable=parameters[0].is_cuda)
        self.count, self.processes = 0, processes or alone(parameters[0].device)
        self._gradients = None if self.processes.alone else _one_buffer(parameters)
        self._captured: Callable[..., None] | None = None
        self._captured_update: Callable[..., None] | None = None

    def _compute(self, hidden: Tensor, target: Tensor) -> None:
        self.distance(behind(self.student, hidden), target).backward()
        self._update()

    def _compute_part(self, hidden: Tensor, target: Tensor) -> None:
        """Gradients of this process's part of a step, times its fraction of the windows."""
        loss = self.distance(behind(self.student, hidden), target)
        (loss * (len(hidden) / self.settings.batch)).backward()

    def _update(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters, GRADIENT_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # a graph needs the gradients to stay where they are

    def __call__(self, hidden: Tensor, target: Tensor) -> None:
        """Train on residual streams (B, L, d) and their targets, or on this process's part; the same shape at every call."""
        steps = self.settings.steps
        warmup = min(WARMUP, max(1, steps * 2 // 3))
        set_rates(self.optimizer, warmup_cosine(self.count, steps, warmup, overlap=True))
        capture = hidden.is_cuda and self.count == EAGER_STEPS
        if self._gradients is None:
            if capture:
                self._captured = CapturedCall(self._compute, hidden, target)
            (self._captured or self._compute)(hidden, target)
        else:  # the exchange is between two graphs
            if capture and len(hidden):
                self._captured = _recorded(self._compute_part, hidden, target)
            if capture:
                self._captured_update = _recorded(self._update)
            if len(hidden):
                (self._captured or self._compute_part)(hidden, target)
            self.processes.sum(self._gradients)
            (self._captured_update or self._update)()
        self.count += 1


def _recorded(run: Callable[..., None], *examples: Tensor) -> Callable[..., None]:
    """A CUDA graph of `run`; or `run` itself, where threads of the exchange between processes break the recording."""
    try:
        return CapturedCall(run, *examples)
    except CaptureError:
        return run


def _one_buffer(parameters: list[nn.Parameter]) -> Tensor:
    """A zeroed buffer of which the parameters' gradients are views, so that one exchange sums them all."""
    buffer = torch.zeros(sum(map(torch.Tensor.numel, parameters)), device=parameters[0].device)
    start = 0
    for parameter in parameters:
        parameter.grad = buffer[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    return buffer


def batches(windows: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Indices (batch,) of the windows of each step: every window once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(windows, generator=generator)])
        yield order[:batch]
        order = order[batch:]


def refine(
    module: nn.Module,
    student: Forward,
    inputs: Activations,
    targets: Activations,
    settings: RefineSettings,
    on_step: Callable[[], None] = lambda: None,
    distance: Distance = relative_error,
    evaluations: int = EVALUATIONS,
) -> RefineResult:
    """Train a module in place and keep its best state on held-out windows, the start included.

    A learning rate that diverges, or a NaN, therefore costs time and never quality.

    Args:
        module: all of whose parameters are trained.
        student: runs it: residual stream before -> what is added to it.
        inputs: residual streams before the module.
        targets: residual streams behind it.
        settings: `steps`, `batch`, `lr` and `seed`.
        on_step: called after every step.
        distance: minimised between the residual stream and its target.
        evaluations: on held-out windows during the run.
    """
    targets = targets.plain()
    before = residual_error(student, inputs, held_out_states(targets), distance)
    if not settings.steps:
        return RefineResult(before, before, 0)
    parameters = [parameter.requires_grad_(True) for parameter in module.parameters()]

    def snapshot() -> list[Tensor]:
        return [parameter.detach().clone() for parameter in parameters]

    best = BestState(before, snapshot())
    train = max(1, _held_out(inputs.total).start)
    settings = replace(settings, batch=min(settings.batch, train))
    step = TrainingStep(parameters, student, settings, distance, inputs.processes)
    every = -(-settings.steps // evaluations)
    for number, index in enumerate(batches(train, settings.batch, settings.steps, settings.seed), start=1):
        step(inputs.part(index), targets.part(index))
        on_step()
        if number % every == 0 or number == settings.steps:
            error = residual_error(student, inputs, held_out_states(targets), distance)
            if not best.update(error, snapshot) and not math.isfinite(error):
                break
    with torch.no_grad():
        for parameter, value in zip(parameters, best.state, strict=True):
            parameter.requires_grad_(False).copy_(value)
            parameter.grad = None
    return RefineResult(before, best.error, number)
