"""Memory and time of a healing run, from the sizes of its tensors and its number of operations. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mla_convert.pipeline.estimate.time import CPU_RATE

# Measured runs are within this factor of the estimate.
SPREAD = 2.0
# Operations per second of healing SmolLM2-135M in windows of 2048 tokens: 236e12 on an H200 with CUDA graphs, in runs of at least
# 4 million tokens; 100e12 on an H100 without torch.compile.
H100_RATE = 200e12
MICRO = {"cpu": 1 << 12, "h100": 1 << 14}  # default tokens in a forward pass
# A chunk of both models' logits in bfloat16, and the float32 intermediates of their comparison.
LOGITS = (1 << 26) * 26
# Time to generate a token over the time to train on one: SmolLM2-135M on an H200 (the demo model on a CPU: 0.5 to 1).
WRITING = 1.5
STATE = 16  # bytes of a trained parameter: itself, its gradient and two moments, in float32
MEMORY_BASIS = (
    "weights, gradients, optimizer and a chunk of logits counted; activations as measured with SmolLM2-135M on one H100 "
    "without torch.compile, within a factor of 1.5"
)
H100_BASIS = (
    "operations counted; 200 TFLOP/s, between the rates of SmolLM2-135M in a long run on an H200 and in a short one on an "
    "H100, both within a factor of 2"
)
CPU_BASIS = "operations counted; 70 GFLOP/s a core, as for the conversion, within a factor of 2"


@dataclass(frozen=True)
class HealWork:
    """Sizes that healing depends on: elements of all weights, of all attention and of tables that are only looked up."""

    weights: int
    attention: int
    looked_up: int
    layers: int
    hidden: int
    intermediate: int  # width of the feed-forward part, summed over the experts of a token
    mixing_before: int  # query heads times the widths of a key and a value
    mixing_after: int

    def memory(self, train: str, place: str) -> int:
        """Bytes held on one device; adapters are neglected."""
        # As heal/run.py holds frozen weights: bfloat16 on a GPU, float32 on a CPU.
        frozen = 2 if place == "h100" else 4
        trained = {"all": self.weights, "attention": self.attention, "lora": self.attention // 10}[train]
        # only trained parameters exist twice: both models share the rest
        original = self.weights if train == "all" else self.attention
        width = 8 * self.hidden + 4 * self.intermediate + 4 * self.mixing_after
        activations = MICRO[place] * self.layers * width * frozen
        return trained * STATE + (self.weights - trained + original) * frozen + activations + LOGITS

    def operations(self, train: str, length: int) -> float:
        """Floating-point operations per token: both models forward, the converted one backward."""
        used = self.weights - self.looked_up
        trained = {"all": used, "attention": self.attention, "lora": self.attention // 10}[train]
        mixing = float(length * self.layers)
        # Two operations an element of weights for each of: the original, the converted model, its gradients by inputs,
        # and those by trained weights. Causal mixing costs half of its length forward, and 2.5 times that back.
        return 2.0 * used + mixing * self.mixing_before + 4.0 * used + 2.0 * trained + 3.5 * mixing * self.mixing_after


@dataclass(frozen=True)
class DeviceEstimate:
    """A range of seconds and the bytes held on one device, and what the time is based on."""

    seconds: tuple[float, float]
    basis: str
    memory_bytes: int


@dataclass(frozen=True)
class HealEstimate:
    """Memory and time of a healing run on the cores of this machine ("cpu") and on an H100 ("h100")."""

    tokens: int
    written_tokens: int
    train: str
    length: int
    places: dict[str, DeviceEstimate]
    memory_basis: str = MEMORY_BASIS

    def as_dict(self) -> dict[str, Any]:
        """As `plan --json` prints it."""
        content = asdict(self)
        for place, device in content.pop("places").items():
            content[place] = {**device, "seconds": list(device["seconds"])}
        return content


def estimate(work: HealWork, tokens: int, train: str, length: int, cores: int, written: int = 0) -> HealEstimate:
    """Memory of one device, and seconds on this machine's cores and on an H100.

    Args:
        work: Sizes of the model.
        tokens: Tokens to train on.
        train: Parameters that are trained: all, attention or lora.
        length: Tokens in the longest window.
        cores: Number of cores.
        written: Tokens that the original generates before training.
    """
    places = {}
    for place, rate, basis in (("cpu", CPU_RATE * cores, CPU_BASIS), ("h100", H100_RATE, H100_BASIS)):
        seconds = (tokens + WRITING * written) * work.operations(train, length) / rate
        places[place] = DeviceEstimate((seconds / SPREAD, seconds * SPREAD), basis, work.memory(train, place))
    return HealEstimate(tokens, written, train, length, places)
