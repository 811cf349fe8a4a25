"""Per-layer refinement: gradient steps on one attention module against the original's residual stream.

Layer after layer, with the converted model's own hidden states as input and the original's residual stream after
attention as target, so that each layer also mends what the earlier ones lost. No other layer is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mla_convert.method.calibrate.attention_forward import Forward
from mla_convert.method.calibrate.hidden_states import Activations

# Steps of warm-up, or two thirds of all if that is fewer: the noise of a short run is not averaged out, and a warm-up of
# 3 steps in 30 lost more than one of 20 (SmolLM2-135M at 50% on a CPU: 1.417 against 1.375).
WARMUP = 20
# Steps run before a CUDA graph of one is captured; they train like all others.
EAGER_STEPS = 3
# Of the mean over channels: least weight of a channel, whose curvature is measured on few tokens.
CHANNEL_FLOOR = 1e-3
HELD_OUT_SHARE = 1 / 16
HELD_OUT_MAX = 32
# How often held-out windows are looked at during a refinement.
CHECKS = 4
# Own error at and above which steps are as large as was asked for.
OWN_ERROR = 0.01
# Below this root mean square a parameter (a zero bias, say) moves as if it had it.
MIN_SCALE = 1e-3

# residual streams (B, L, d), the one found and the one that should be -> what is minimised, a mean over tokens
Distance = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class RefineSettings:
    """`steps` of `batch` windows for each layer; `lr` is relative to the root mean square of each parameter, and is that of
    an own error of OWN_ERROR or more (`step_size`).

    Then `block` layers are refined together, in `block_steps` of `block_lr`; blocks of one are not refined again. The last
    blocks, as many as hold `output_layers`, take `output_steps` more together, towards the original's next-token distribution.
    """

    steps: int
    batch: int
    lr: float
    seed: int
    block: int = 1
    block_steps: int = 0
    block_lr: float = 0.009
    output_steps: int = 0
    output_layers: int = 1

    @property
    def steps_per_layer(self) -> int:
        """Steps that each layer takes part in."""
        return self.steps + self.block_steps


@dataclass(frozen=True)
class RefineResult:
    """Distance of the residual stream on held-out windows from what it should be, before and after."""

    error_before: float
    error_after: float
    steps: int


def relative_error(found: Tensor, expected: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean over tokens of log(1 + |found - expected|^2 / |expected|^2), for residual streams (B, L, d).

    Relative to each token, because the norms that read the stream divide by its length: in plain squares the few
    tokens with massive activations (the first one above all) would be everything. The logarithm (Cauchy's loss) is for
    tokens that are massive in one model and not in the other: a thousand times wrong, past mending, and else everything.

    :param weight: of each channel's square error (d,), as from `channel_weights`; equal if None.
    """
    error = (found - expected).square()
    if weight is not None:
        error = error * weight
    return (error.mean(-1) / expected.square().mean(-1).clamp_min(1e-12)).log1p().mean()


@torch.no_grad()
def channel_weights(curvature: Tensor, targets: Activations) -> Tensor:
    """Weights (d,) of channels for `relative_error`, from E[g^2] (d,), what an error in each costs the model's output.

    A few channels may hold almost all of a stream's squares and mean little, because norms scale them down: 4 of 640
    hold 98% in Gemma 3 270M. Scaled so that an error of the same share of every channel is as large as without weights.
    """
    squares = torch.zeros_like(curvature)
    for batch in targets.batches():
        stream = targets.get(batch).double()
        squares += (stream.square() / stream.square().mean(-1, keepdim=True).clamp_min(1e-12)).mean((0, 1)) * len(
            stream
        )
    weight = curvature + CHANNEL_FLOOR * curvature.mean()
    return (weight * squares.sum() / (weight * squares).sum().clamp_min(1e-30)).float()


@torch.no_grad()
def residual_targets(original: Forward, states: Activations) -> Activations:
    """The original's residual stream after attention, for all windows."""
    targets = states.empty_like()
    for batch in states.batches():
        hidden = states.get(batch)
        targets.put(batch, hidden + original(hidden))
    return targets


def _held_out(windows: int) -> range:
    """Windows that are kept from training to judge it: the last ones."""
    return range(windows - min(HELD_OUT_MAX, max(1, round(windows * HELD_OUT_SHARE))), windows)


def _at_held_out(states: Activations) -> Iterator[Tensor]:
    """The held-out windows (1, L, d), one by one."""
    return (states.get(slice(window, window + 1)) for window in _held_out(states.windows))


@torch.no_grad()
def output_error(student: Forward, original: Forward, states: Activations) -> float:
    """Mean square of the difference of two attention outputs on equal inputs, over the original's mean square."""
    wrong = total = 0.0
    for hidden in _at_held_out(states):
        expected = original(hidden)
        wrong += float((student(hidden) - expected).square().mean())
        total += float(expected.square().mean())
    return wrong / max(total, 1e-30)


@torch.no_grad()
def streams(forward: Forward, inputs: Activations) -> list[Tensor]:
    """The residual stream (1, L, d) that `forward` leaves behind, for each held-out window."""
    return [hidden + forward(hidden) for hidden in _at_held_out(inputs)]


@torch.no_grad()
def residual_error(
    student: Forward, inputs: Activations, expected: Iterable[Tensor], distance: Distance = relative_error
) -> float:
    """Distance of the residual stream on the held-out windows from what it should be there, `expected`.

    Towards the original's own states that is all that is lost so far; towards its `streams` on the same inputs it is what
    these layers lose themselves.
    """
    pairs = zip(_at_held_out(inputs), expected, strict=True)
    errors = [float(distance(hidden + student(hidden), wanted)) for hidden, wanted in pairs]
    return sum(errors) / len(errors)


def step_size(lr: float, own: float) -> float:
    """`lr`, or less where there is less to mend.

    Weights that err by a share e have about sqrt(e) of their size to go, and Adam's steps, which are as long for a small
    gradient as for a large one, keep them as far from where they should be as they are long. Best step sizes found: 0.005,
    0.007 and 0.014 at own errors of 4.5e-4, 1.3e-3 and 3e-3 (docs/quality.md).
    """
    return lr * math.sqrt(min(1.0, own / OWN_ERROR)) if math.isfinite(own) else lr


class _Step:
    """One training step on fixed buffers; on CUDA captured as a graph, since small layers are bound by launches."""

    def __init__(
        self,
        parameters: list[nn.Parameter],
        student: Forward,
        settings: RefineSettings,
        example: Tensor,
        distance: Distance,
    ):
        self.parameters, self.student, self.settings, self.distance = parameters, student, settings, distance
        self.hidden, self.target = torch.empty_like(example), torch.empty_like(example)
        self.graph, self.count = None, 0
        # relative to each parameter's size, so that one setting is safe on models of any scale
        self.rates = [settings.lr * float(p.detach().square().mean().sqrt().clamp_min(MIN_SCALE)) for p in parameters]
        # a graph reads the rate from device memory
        groups = [{"params": [p], "lr": torch.zeros((), device=p.device) if p.is_cuda else 0.0} for p in parameters]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98), fused=True, capturable=example.is_cuda)

    def _schedule(self) -> None:
        """Linear warm-up, cosine decay to zero."""
        warm = min(1.0, (self.count + 1) / min(WARMUP, max(1, self.settings.steps * 2 // 3)))
        factor = warm * 0.5 * (1 + math.cos(math.pi * self.count / self.settings.steps))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * factor)
            else:
                group["lr"] = rate * factor

    def _compute(self) -> None:
        self.distance(self.hidden + self.student(self.hidden), self.target).backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # a graph needs the gradients to stay where they are

    def __call__(self, hidden: Tensor, target: Tensor) -> None:
        self.hidden.copy_(hidden)
        self.target.copy_(target)
        self._schedule()
        if self.hidden.is_cuda and self.count == EAGER_STEPS:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # a graph allocates anew: do not hold what the first steps used beside it
            self.graph = torch.cuda.CUDAGraph()
            # capturing records the step without running it
            with torch.cuda.graph(self.graph):
                self._compute()
        if self.graph:
            self.graph.replay()
        else:
            self._compute()
        self.count += 1


def _batches(windows: int, batch: int, steps: int, seed: int):
    """Indices of `batch` windows for each step: every window once before any comes again."""
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
) -> RefineResult:
    """Train `module`, which `student` runs, in place; keeps the state with the least held-out `distance`, the start included.

    A step size that diverges, or a NaN, therefore costs time and never quality.
    """
    before = best = residual_error(student, inputs, _at_held_out(targets), distance)
    if not settings.steps:
        return RefineResult(before, before, 0)
    parameters = [parameter.requires_grad_(True) for parameter in module.parameters()]
    kept = [parameter.detach().clone() for parameter in parameters]
    train = max(1, _held_out(inputs.windows).start)
    batch = min(settings.batch, train)
    step = _Step(parameters, student, settings, inputs.get(slice(0, batch)), distance)
    every = -(-settings.steps // CHECKS)
    for number, index in enumerate(_batches(train, batch, settings.steps, settings.seed), start=1):
        step(inputs.get(index), targets.get(index))
        on_step()
        if number % every == 0 or number == settings.steps:
            error = residual_error(student, inputs, _at_held_out(targets), distance)
            if error < best:
                best, kept = error, [parameter.detach().clone() for parameter in parameters]
            elif not math.isfinite(error):
                break
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.requires_grad_(False).copy_(value)
            parameter.grad = None
    return RefineResult(before, best, number)
