"""The final norm and LM head of a `LayerwiseModel`, read a slice of the vocabulary at a time."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from mla_convert.method.calibrate.layerwise import LayerwiseModel, StandIn, unfold
from mla_convert.modeling.distillation import distillation_loss, distillation_loss_fn
from mla_convert.modeling.head import Head
from mla_convert.modeling.loss_terms import IGNORED, LossWeights
from mla_convert.source.checkpoint.reader import check_finite

# Logits computed at once, tokens by rows of the head: bounds the memory that a large vocabulary takes.
LOGIT_TOKENS = 1024
LOGIT_ROWS = 16384


class _ConstantLayer(StandIn):
    """Replaces a decoder layer: returns given hidden states whatever its input."""

    def __init__(self, layer: nn.Module, hidden_states: Tensor):
        super().__init__(layer)
        self.hidden_states = hidden_states

    def forward(self, *_, **__) -> Tensor | tuple[Tensor | None, ...]:
        return self.output(self.hidden_states)


class StreamedHead:
    """Everything between the output of the last layer and the logits.

    No method but `divergence`, which loads the whole head, holds more than one slice of the head and the logits of
    LOGIT_TOKENS tokens on it.
    """

    def __init__(self, layerwise: LayerwiseModel):
        """Holds no weights until a method loads them.

        Args:
            layerwise: the model whose head this is.
        """
        self.layerwise = layerwise
        self.device = layerwise.device

    @contextlib.contextmanager
    def divergence(self) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
        """Load the final norm and the whole head, and give the loss of refinement towards the next-token distribution.

        Yields:
            A function of two outputs (B, L, hidden) of the last layer, the converted model's and the source's: the mean
            over tokens of KL(source || converted) of the next token, in nats (knowledge distillation, Hinton et al.,
            arXiv 1503.02531, at temperature 1).
        """
        layerwise, reader = self.layerwise, self.layerwise.source.reader
        head, names = layerwise.model.get_output_embeddings(), self._stored_names()
        compare = distillation_loss_fn(LossWeights(), self.device)
        # the largest matrix of the model: autocast would cast it to bfloat16 for every product
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        tensors = reader.read(names.values())
        check_finite(tensors)
        with (
            contextlib.ExitStack() as stack,
            self._final_norm() as norm,
            layerwise.filled(head, {parameter: tensors[name] for parameter, name in names.items()}, dtype),
        ):
            del tensors
            output = Head(layerwise.model)
            stack.enter_context(layerwise.small_modules_filled())

            def normed(states: Tensor) -> Tensor:
                return norm(states) if layerwise.streams == 1 else self._decoded(states)

            def distance(converted: Tensor, expected: Tensor) -> Tensor:
                labels = torch.full(converted.shape[:2], IGNORED, device=converted.device)
                with layerwise.autocast():
                    loss, _ = distillation_loss(
                        normed(converted), normed(expected), labels, output, output, LossWeights(), compare
                    )
                return loss

            yield distance

    def slices(self) -> Iterator[int]:
        """Load the final norm and, one after another, slices of LOGIT_ROWS rows of the head.

        Yields:
            The first token id of the slice that `logits` uses until the next one is loaded.
        """
        reader = self.layerwise.source.reader
        head, names = self.layerwise.model.get_output_embeddings(), self._stored_names()
        with self._final_norm(), self.layerwise.small_modules_filled():
            rows = reader.shape(names["weight"])[0]
            for start in range(0, rows, LOGIT_ROWS):
                stop = min(start + LOGIT_ROWS, rows)
                part = {parameter: reader.rows(name, start, stop) for parameter, name in names.items()}
                check_finite({names[parameter]: tensor for parameter, tensor in part.items()})
                with self._rows_replaced(head, part):
                    yield start

    def logits(self, states: Tensor) -> Tensor:
        """Logits on the slice of the head that is loaded.

        Args:
            states: outputs (1, L, hidden) of the last layer.

        Returns:
            (L, rows of the slice), float32.
        """
        with self._constant(states) as embedded, self.layerwise.autocast():
            return self.layerwise.model(inputs_embeds=embedded, use_cache=False).logits[0].float()

    def _decoded(self, states: Tensor) -> Tensor:
        """Output of the decoder (B, L, d), for outputs of its last layer."""
        with self._constant(states) as embedded:
            return self.layerwise.decoder(inputs_embeds=embedded, use_cache=False).last_hidden_state

    @contextlib.contextmanager
    def _constant(self, states: Tensor) -> Iterator[Tensor]:
        """The model with layers that return `states`; embeddings (B, L, d) of the same shape to call it with."""
        layerwise, streams = self.layerwise, unfold(states, self.layerwise.streams)
        layers = [_ConstantLayer(layer, streams) for layer in layerwise.layers]
        with layerwise.layers_replaced(layers), layerwise.inputs_left_out():
            yield states[..., : layerwise.source.config.hidden_size]

    def output_gradient(self, hidden: Tensor, generator: torch.Generator) -> Tensor:
        """Gradient of the NLL of tokens sampled from the model's own prediction, summed over tokens.

        Its second moment is the Fisher information of the output (Martens, arXiv 1412.1193): the labels are
        samples of the model, not of a text. The head is read twice: once to sample by the Gumbel-max trick (argmax of
        logit + Gumbel noise, slice after slice), once to differentiate.

        Args:
            hidden: outputs (N, L, hidden) of the last layer.
            generator: of the samples, on the model's device.

        Returns:
            The gradient with respect to `hidden`, (N, L, hidden), float32, on the CPU.
        """
        shape = hidden.shape[:2]
        total = torch.full(shape, -torch.inf, device=self.device)  # log-sum-exp of the logits
        best, sampled = total.clone(), torch.zeros(shape, dtype=torch.int64, device=self.device)
        gradient = torch.zeros(hidden.shape)
        for start in self.slices():
            for part in _parts(shape):
                with torch.no_grad():
                    logits = self.logits(self._states(hidden, part))
                total[part] = torch.logaddexp(total[part], logits.logsumexp(-1))
                noise = torch.empty_like(logits).exponential_(generator=generator).log_().neg_()
                value, index = (logits + noise).max(-1)
                sampled[part] = torch.where(value > best[part], index + start, sampled[part])
                best[part] = torch.maximum(best[part], value)
        for start in self.slices():
            for part in _parts(shape):
                states = self._states(hidden, part).requires_grad_(True)
                with torch.enable_grad():
                    logits = self.logits(states)
                slope = (logits.detach() - total[part][:, None]).exp()
                local = sampled[part] - start
                inside = ((local >= 0) & (local < logits.shape[-1])).nonzero()[:, 0]
                slope[inside, local[inside]] -= 1
                logits.backward(slope)
                gradient[part] += states.grad[0].cpu()
        return gradient

    def _states(self, hidden: Tensor, part: tuple[int, slice]) -> Tensor:
        """States (1, T, hidden) of some tokens, float32, on the device."""
        return hidden[part][None].to(self.device, torch.float32)

    def _stored_names(self) -> dict[str, str]:
        """Names of the stored tensors of the head, by the parameters that they fill."""
        head = self.layerwise.model.get_output_embeddings()
        path = self.layerwise.path_of(head)
        weight = f"{path}.weight"
        if weight not in self.layerwise.source.reader.names():  # tied: stored as the embedding alone
            weight = f"{self.layerwise.embedding}.weight"
        return {"weight": weight} if head.bias is None else {"weight": weight, "bias": f"{path}.bias"}

    @contextlib.contextmanager
    def _final_norm(self) -> Iterator[nn.Module]:
        """The norm behind the last layer, with its weights."""
        layerwise = self.layerwise
        norm = layerwise.final_norm
        path = layerwise.path_of(norm)
        tensors = layerwise.source.reader.read(f"{path}.{name}" for name, _ in norm.named_parameters())
        check_finite(tensors)
        with layerwise.filled(norm, {name.removeprefix(f"{path}."): tensor for name, tensor in tensors.items()}):
            yield norm

    @contextlib.contextmanager
    def _rows_replaced(self, head: nn.Module, rows: dict[str, Tensor]) -> Iterator[None]:
        """The head with some of its rows only: "weight", and "bias" if it has one."""
        kept = {name: getattr(head, name) for name in rows}
        for name, part in rows.items():
            setattr(head, name, nn.Parameter(part.to(self.device).float(), requires_grad=False))
        try:
            yield
        finally:
            for name, parameter in kept.items():
                setattr(head, name, parameter)


def _parts(shape: torch.Size) -> list[tuple[int, slice]]:
    """Indices of all tokens of windows (N, L), LOGIT_TOKENS of one window at a time."""
    firsts = itertools.product(range(shape[0]), range(0, shape[1], LOGIT_TOKENS))
    return [(window, slice(first, first + LOGIT_TOKENS)) for window, first in firsts]
