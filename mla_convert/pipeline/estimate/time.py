"""How long a conversion takes, from counted operations and the rates at which measured conversions did theirs. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Operations a second, over whole layers of measured conversions (README, "Measured", and its tests): SmolLM2-135M and the
# demo model on one thread of an x86-64 core, a random model of Llama-3.2-1B's shapes on two; on an H100 SmolLM2-135M's
# refinement, whose small layers leave much of the card idle, and a random model of Llama-3-8B's shapes, disk included.
CPU_RATE = 70e9
H100_RATE = 75e12
# Measured runs lie within this factor of the estimate; other processors, and cores shared with other work, may not.
SPREAD = 2.0
CPU_BASIS = (
    "operations counted; 70 GFLOP/s a core, as measured on 1 and 2 x86-64 cores with SmolLM2-135M, the demo model and the "
    "shapes of Llama-3.2-1B, within a factor of 2; download not included"
)
H100_BASIS = (
    "operations counted; 75 TFLOP/s, between what refining SmolLM2-135M and converting the shapes of Llama-3-8B did on one "
    "H100, both within a factor of 2; download not included"
)


@dataclass(frozen=True)
class LayerWork:
    """What one layer's work depends on: numbers in the layer and in its attention, before and after; widths of heads."""

    hidden: int
    layer_before: int
    layer_after: int
    attention_before: int
    attention_after: int
    mixing_before: int  # query heads times the widths of a key and a value
    mixing_after: int
    head: int  # numbers in the output matrix

    def operations(
        self,
        calib: tuple[int, int],
        evaluation: tuple[int, int],
        steps: int,
        batch: int,
        measured: int = 0,
        block_steps: float = 0,
        output_steps: float = 0,
    ) -> float:
        """Floating point operations, for windows of (how many, tokens each) and `steps` of `batch` windows.

        `measured`: tokens at which the loss of a smaller cache is measured, before sizes are shared out; `block_steps`:
        more steps, through the whole layer; `output_steps`: those of them that go through the head as well.
        """

        def forward(weights: int, mixing: int, length: int) -> float:
            return 2.0 * weights + 2.0 * length * mixing

        total = 0.0
        (samples, length), (windows, eval_length) = calib, evaluation
        for weights, mixing in (
            (self.layer_before, self.mixing_before),
            (self.layer_after, self.mixing_after),
        ):  # both models' states go through the layer
            total += samples * length * forward(weights, mixing, length)
            total += windows * eval_length * forward(weights, mixing, eval_length)
        # second moments of the tokens in six weightings, the targets, and held-out errors
        total += (
            samples * length * (12.0 * self.hidden**2 + 2 * forward(self.attention_before, self.mixing_before, length))
        )
        total += 3.0 * steps * batch * length * forward(self.attention_after, self.mixing_after, length)
        # frozen weights need no gradients of their own
        whole = 2.0 * forward(self.layer_after, self.mixing_after, length)
        total += block_steps * batch * length * (whole + forward(self.attention_after, self.mixing_after, length))
        total += output_steps * batch * length * 6.0 * self.head  # of both models, and once back
        if measured:  # the layer forward, forward again and back; its attention at some fourteen sizes
            total += measured * 4 * forward(self.layer_before, self.mixing_before, length)
            total += measured * 14 * forward(self.attention_after, self.mixing_after, length)
        return total + (90.0 if measured else 30.0) * self.hidden**3  # decompositions, in float64


def estimate(work: LayerWork, layers: int, windows: dict[str, Any], cores: int) -> dict[str, dict[str, Any]]:
    """Seconds, as a range, on `cores` cores and on an H100; `windows` holds the arguments of `operations` for each."""
    found = {}
    for place, rate, basis in (("cpu", CPU_RATE * cores, CPU_BASIS), ("h100", H100_RATE, H100_BASIS)):
        seconds = layers * work.operations(**windows[place]) / rate
        found[place] = {"seconds": [seconds / SPREAD, seconds * SPREAD], "basis": basis}
    found["cpu"]["cores"] = cores
    return found
