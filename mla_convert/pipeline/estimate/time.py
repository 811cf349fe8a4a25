"""Time of a conversion, from its number of operations and the rates of measured conversions. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Operations per second over whole layers of measured conversions (tests/pipeline/test_dry_run.py): SmolLM2-135M and the demo
# model on one thread of an x86-64 core, a random model with the shapes of Llama-3.2-1B on two.
CPU_RATE = 70e9
# On an H100 or H200: operations per second where a layer's work is large, and seconds beside it, of a layer (its reading,
# decompositions, checks and writing) and of the whole (libraries, texts, the final check). Between conversions of SmolLM2-135M,
# Qwen2.5-Coder-1.5B and random models with the shapes of Llama-3-8B and 70B, disk included.
H100_RATE, H100_LAYER, H100_WHOLE = 250e12, 3.5, 30.0
# Measured runs are within these factors of the estimate; other processors, and machines shared with other work, may not be.
CPU_SPREAD, H100_SPREAD = 2.0, 1.5
CPU_BASIS = (
    "operations counted; 70 GFLOP/s a core, as measured on 1 and 2 x86-64 cores with SmolLM2-135M, the demo model and the "
    "shapes of Llama-3.2-1B, within a factor of 2; download not included"
)
H100_BASIS = (
    "operations counted at 250 TFLOP/s, and 30 s and 3.5 s a layer beside them: conversions of SmolLM2-135M, Qwen2.5-Coder-1.5B "
    "and the shapes of Llama-3-8B and 70B on H100s and H200s were within a factor of 1.5; download not included"
)


@dataclass(frozen=True)
class LayerRun:
    """Settings of a conversion that its time depends on.

    Attributes:
        calib: Calibration windows, and tokens in one.
        evaluation: Evaluation windows, and tokens in one.
        steps: Gradient steps per layer.
        batch: Windows in a step.
        measured: Tokens at which the loss of smaller caches is measured, before sizes are allocated; 0 measures none.
        block_steps: Further steps per layer, through the whole layer.
        output_steps: Those of the further steps that also go through the head.
        originals: Quantised caches of the original, with each of which it reads the evaluation windows again.
    """

    calib: tuple[int, int]
    evaluation: tuple[int, int]
    steps: int
    batch: int
    measured: int = 0
    block_steps: float = 0
    output_steps: float = 0
    originals: int = 0


@dataclass(frozen=True)
class TimeEstimate:
    """A range of seconds, what it is based on, and the number of cores where that matters."""

    seconds: tuple[float, float]
    basis: str
    cores: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """As `plan --json` prints it."""
        cores = {} if self.cores is None else {"cores": self.cores}
        return {"seconds": list(self.seconds), "basis": self.basis, **cores}


@dataclass(frozen=True)
class LayerWork:
    """Sizes of one layer that its work depends on: elements of the layer and its attention before and after, head widths."""

    hidden: int
    layer_before: int
    layer_after: int
    attention_before: float  # a mean where only some layers have attention, as the widths below
    attention_after: float
    mixing_before: float  # query heads times the widths of a key and a value
    mixing_after: float
    head: int  # elements of the output matrix

    def readings(self, run: LayerRun) -> float:
        """Floating-point operations of the head: both models' evaluation, and the measured loss forward and back."""
        return 2.0 * self.head * (2 * run.evaluation[0] * run.evaluation[1] + 3 * run.measured)

    def operations(self, run: LayerRun, processes: int = 1) -> float:
        """Floating-point operations of one layer's conversion, in each of several processes."""

        def forward(weights: float, mixing: float, length: int) -> float:
            return 2.0 * weights + 2.0 * length * mixing

        shared = 0.0
        (samples, length), (windows, eval_length) = run.calib, run.evaluation
        for weights, mixing in (
            (self.layer_before, self.mixing_before),
            (self.layer_after, self.mixing_after),
        ):  # both models' states go through the layer
            shared += samples * length * forward(weights, mixing, length)
            shared += windows * eval_length * forward(weights, mixing, eval_length)
        shared += run.originals * windows * eval_length * forward(self.layer_before, self.mixing_before, eval_length)
        # second moments of the tokens in six weightings, the targets, and held-out errors
        shared += (
            samples * length * (12.0 * self.hidden**2 + 2 * forward(self.attention_before, self.mixing_before, length))
        )
        # Decompositions are not shared: each process computes them all.
        own = 30.0 * self.hidden**3  # decompositions, in float64
        if run.measured:  # the layer forward, forward again and back; its attention at some fourteen sizes
            own += run.measured * 4 * forward(self.layer_before, self.mixing_before, length)
            shared += run.measured * 14 * forward(self.attention_after, self.mixing_after, length)
            shared += 60.0 * self.hidden**3
        part = -(-run.batch // processes)  # of the windows in a step
        return shared / processes + own + part * length * self._training(run, length)

    def _training(self, run: LayerRun, length: int) -> float:
        """Operations of all steps on one token."""
        attention = 2.0 * self.attention_after + 2.0 * length * self.mixing_after
        whole = 2.0 * self.layer_after + 2.0 * length * self.mixing_after
        # frozen weights need no gradients of their own
        total = 3.0 * run.steps * attention + run.block_steps * (2.0 * whole + attention)
        return total + run.output_steps * 6.0 * self.head  # of both models, and once back


def cpu_seconds(work: LayerWork, layers: int, run: LayerRun, cores: int, processes: int = 1) -> float:
    """Seconds of a conversion on `cores` cores in each process."""
    return (layers * work.operations(run, processes) + work.readings(run)) / (CPU_RATE * cores)


def h100_seconds(work: LayerWork, layers: int, run: LayerRun, count: int = 1) -> float:
    """Seconds of a conversion on `count` H100s of one host, one process each."""
    return H100_WHOLE + work.readings(run) / H100_RATE + layers * (H100_LAYER + work.operations(run, count) / H100_RATE)


def h100_range(seconds: float) -> tuple[float, float]:
    """Seconds between which a conversion on H100s is expected."""
    return seconds / H100_SPREAD, seconds * H100_SPREAD


def estimate(work: LayerWork, layers: int, runs: dict[str, LayerRun], cores: int) -> dict[str, TimeEstimate]:
    """Seconds of a conversion on this machine's cores ("cpu") and on an H100 ("h100").

    Args:
        work: Sizes of one layer.
        layers: Number of layers.
        runs: The conversion's settings on each of the two.
        cores: Number of cores.
    """
    on_cpu = cpu_seconds(work, layers, runs["cpu"], cores)
    on_h100 = h100_seconds(work, layers, runs["h100"])
    return {
        "cpu": TimeEstimate((on_cpu / CPU_SPREAD, on_cpu * CPU_SPREAD), CPU_BASIS, cores),
        "h100": TimeEstimate(h100_range(on_h100), H100_BASIS),
    }
