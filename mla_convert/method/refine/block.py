"""Joint refinement of the attentions of several consecutive layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from mla_convert.method.calibrate.beside import Key
from mla_convert.method.calibrate.exchange import SHARED, Exchange
from mla_convert.method.calibrate.hidden_states import Activations
from mla_convert.method.calibrate.layerwise import LayerKwargs
from mla_convert.method.refine.optimise import (
    EVALUATIONS,
    Distance,
    RefineResult,
    RefineSettings,
    held_out_streams,
    refine,
    residual_error,
    step_size,
)
from mla_convert.modeling.attention_mla import MlaAttention


@dataclass
class LayerPair:
    """A source layer in memory, and the attention that replaces its own; None where the layer stays as it is."""

    index: int
    tensors: dict[str, Tensor]  # of the source layer as stored, by their full names
    layer: nn.Module
    attention_name: str  # attribute of the layer
    student: MlaAttention | None
    kwargs: dict[int, LayerKwargs]  # keyword arguments of the layer, by window length
    eager_kwargs: LayerKwargs  # the same under eager attention, for calibration windows
    exchange: Exchange = field(default_factory=Exchange)  # with the other layers
    norm: Callable[[Tensor], Tensor] = lambda hidden: hidden  # before its attention
    stock: nn.Module | None = field(init=False)  # its own attention, which `converted` replaces for a while

    def __post_init__(self):
        """Remember the layer's own attention."""
        self.stock = getattr(self.layer, self.attention_name, None)

    @property
    def attention(self) -> nn.Module:
        """The attention that the layer runs."""
        return getattr(self.layer, self.attention_name)

    @contextlib.contextmanager
    def converted(self) -> Iterator[None]:
        """The layer with the student, if it has one, in the place of its attention."""
        if self.student is None:
            yield
            return
        original = self.attention
        setattr(self.layer, self.attention_name, self.student)
        try:
            yield
        finally:
            setattr(self.layer, self.attention_name, original)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, L, d) behind the layer, from those before it and what is beside them."""
        return self.run(*self.exchange.layout.take(hidden))

    def run(self, hidden: Tensor, beside: dict[Key, tuple[Tensor, ...]]) -> Tensor:
        """`forward` of hidden states alone; what the layer hands over to later ones is added to what is `beside` them."""
        return self.exchange.run(self.layer, self.kwargs[hidden.shape[1]], hidden, beside)

    def run_and_keep(self, rows: Tensor) -> tuple[Tensor, dict[Key, Tensor]]:
        """`forward`, and the columns of what the layer hands over.

        A converted layer hands over its own keys and values too, for the stock attentions that later ones are compared with.
        """
        hidden, beside = self.exchange.layout.take(rows)
        output = self.run(hidden, beside)
        if self.exchange.hands_over and self.attention is not self.stock:
            given = self.kwargs[hidden.shape[1]] | {SHARED: {}}
            self.stock(hidden_states=self.norm(hidden), **given)
            self.exchange.take_over(given, beside)
        return output, self.exchange.made(beside)


@dataclass(frozen=True)
class Stage:
    """One joint refinement: its steps, the learning rate for a large own error, and the loss."""

    name: str
    steps: int
    lr: float
    distance: Distance  # between the hidden states behind the last layer, the converted model's and the source's
    evaluations: int = EVALUATIONS  # on held-out windows; the best state is kept


@dataclass(frozen=True)
class StageResult:
    """`own_error` is the relative error that the layers add themselves, before the stage."""

    own_error: float
    refined: RefineResult


def refine_jointly(
    stage: Stage,
    layers: Sequence[LayerPair],
    inputs: Activations,
    targets: Activations,
    relative: Distance,
    settings: RefineSettings,
    autocast: Callable[[], AbstractContextManager],
    on_step: Callable[[], None],
) -> StageResult:
    """Train the students of consecutive layers together, by the hidden states behind the last of them.

    Args:
        stage: steps, learning rate and loss.
        layers: in order.
        inputs: the converted model's hidden states before the first layer.
        targets: the source's hidden states behind the last one.
        relative: relative error of the hidden states behind the last layer; the own error in it scales the learning rate.
        settings: batch and seed.
        autocast: context of the forward passes.
        on_step: called after every step.
    """

    def forward(rows: Tensor) -> Tensor:
        before, beside = layers[0].exchange.layout.take(rows)
        states = before
        with autocast():
            for layer in layers:
                states = layer.run(states, beside)
        return states.float() - before

    expected = held_out_streams(forward, inputs)
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.converted())
        own_error = residual_error(forward, inputs, expected, relative)
        del expected
        settings = replace(settings, steps=stage.steps, lr=step_size(stage.lr, own_error))
        students = nn.ModuleList(layer.student for layer in layers if layer.student is not None)
        refined = refine(students, forward, inputs, targets, settings, on_step, stage.distance, stage.evaluations)
    return StageResult(own_error, refined)
