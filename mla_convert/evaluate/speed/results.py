"""The request to `bench` and its results. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from mla_convert.core.report_schema import JsonObject

STEPS = 64


@dataclass(frozen=True)
class BenchRequest:
    """The measurements to make.

    Args:
        contexts: tokens in the cache.
        batches: sequences; None: the largest batch that fits.
        prompts: lengths of prompts in tokens.
        memory: device memory to use in bytes.
        price: of the device per hour.
        steps: decode steps to time at every point.
    """

    contexts: tuple[int, ...]
    batches: tuple[int | None, ...]
    prompts: tuple[int, ...] = ()
    memory: int | None = None
    price: float | None = None
    steps: int = STEPS


@dataclass
class DecodeTiming:
    """Decoding at one context and batch.

    Attributes:
        context: tokens in the cache, with the new one.
        batch: sequences.
        largest: whether this is the largest batch that fits.
        cache_bytes: bytes of the cache that grows with the context.
        tokens_per_second: of all sequences together.
        p50_ms: median time of a step in milliseconds.
        p99_ms: 99th percentile of the time of a step in milliseconds.
        bytes_per_second: bytes of weights and cache read per second.
        share_of_copy: `bytes_per_second` over the rate of a large copy.
        cost_per_million: price of a million tokens, in the unit of the price per hour.
    """

    context: int
    batch: int
    largest: bool
    cache_bytes: int
    tokens_per_second: float
    p50_ms: float
    p99_ms: float
    bytes_per_second: float
    share_of_copy: float
    cost_per_million: float | None = None


@dataclass
class PrefillTiming:
    """Prefill of prompts of `tokens` tokens; the median time is in milliseconds."""

    tokens: int
    batch: int
    p50_ms: float
    tokens_per_second: float


@dataclass
class ModelTiming:
    """Measurements of one model.

    Attributes:
        name: of the model.
        converted: whether it is a converted model.
        weight_bytes: bytes of all weights.
        cache_bytes_per_token: bytes that a token takes in the cache.
        fixed_bytes_per_sequence: bytes of a sequence's states that do not grow with the context.
        attention: the attention backend of the decode steps.
        points: decoding.
        prompts: prefill.
        left_out: what did not fit into memory, in words.
    """

    name: str
    converted: bool
    weight_bytes: int
    cache_bytes_per_token: int
    fixed_bytes_per_sequence: int
    attention: str
    points: list[DecodeTiming] = field(default_factory=list)
    prompts: list[PrefillTiming] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


@dataclass
class BenchResult:
    """Measurements of all models on one device.

    Attributes:
        device: name of the device.
        copy_bytes_per_second: bytes read and written per second by a large copy.
        memory_bytes: limit on the device memory.
        price_per_hour: of the device.
        versions: of the packages.
        models: one entry a model.
    """

    device: str
    copy_bytes_per_second: float
    memory_bytes: int | None
    price_per_hour: float | None
    versions: dict[str, str]
    models: list[ModelTiming]

    def as_dict(self) -> JsonObject:
        """For `bench --json`."""
        return asdict(self)
