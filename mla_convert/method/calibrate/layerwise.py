"""The source model without its weights: the stock transformers modules on the meta device, filled one layer at a time."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mla_convert.core.errors import InputError, one_line
from mla_convert.modeling.distillation import distillation_loss, distillation_loss_fn
from mla_convert.modeling.head import Head
from mla_convert.modeling.loss_terms import IGNORED, LossWeights
from mla_convert.source.checkpoint.reader import check_finite
from mla_convert.source.source import Source

# Logits computed at once, tokens by vocabulary: bounds the memory of a large vocabulary.
LOGIT_TOKENS = 1024
LOGIT_ROWS = 16384


@dataclass(frozen=True)
class Rotation:
    """How RoPE turns the keys of one layer: `inv_freq` (d_h/2,) radians per position, of which the first `num_rotary_freqs` are
    those of its table and the others zero; `scale` is the factor on cos and sin that some RoPE scalings apply."""

    inv_freq: Tensor
    num_rotary_freqs: int
    scale: float


class _Recorder(nn.Module):
    """Stands for a decoder layer: keeps the arguments it is called with by name, passes hidden states through."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.names = list(inspect.signature(layer.forward).parameters)
        self.kwargs: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        self.kwargs = dict(zip(self.names[1:], args, strict=False)) | kwargs
        return hidden_states


class _Injector(nn.Module):
    """Stands for all decoder layers: returns given hidden states whatever comes in."""

    def __init__(self, hidden_states: Tensor):
        super().__init__()
        self.hidden_states = hidden_states

    def forward(self, *_, **__) -> Tensor:
        return self.hidden_states


def first_output(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Hidden states of a layer or an attention, which return them alone or with something else."""
    return output[0] if isinstance(output, tuple) else output


class LayerwiseModel:
    """Runs a source model one layer at a time.

    Weights are loaded in float32, whatever the source stores; on CUDA the forward passes run under bfloat16 autocast.
    Only the layers that are asked for, or the embeddings, or a slice of the head, are in memory at any moment; all of the head
    in `divergence` alone.
    """

    def __init__(self, source: Source, device: torch.device):
        self.source = source
        self.device = device
        try:
            with init_empty_weights(include_buffers=False):
                self.model = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32).eval()
        except Exception as error:  # whatever a setting that makes no sense runs into
            raise InputError(f"configuration of {source.name} does not make a model: {one_line(error)}") from error
        # SDPA knows neither soft caps nor sinks, and not every version of the stock classes says so
        written_out = source.family.softcap or source.family.sinks or not self.model._supports_sdpa
        self.implementation = "eager" if written_out else "sdpa"
        self.model.set_attn_implementation(self.implementation)
        self.model.requires_grad_(False)
        path, _, self._list = source.family.layers.rpartition(".")
        self.decoder = self.model.get_submodule(path)
        self.layers = getattr(self.decoder, self._list)
        for buffer_owner in (self.decoder, *self.decoder.children()):
            if buffer_owner is not self.layers:
                buffer_owner._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
        self._check_shapes()

    def _check_shapes(self) -> None:
        """Compare every tensor's stored shape with what the configuration asks for, before any work."""
        stored = set(self.source.reader.names())
        tied = set(self.model.all_tied_weights_keys)
        for name, parameter in self.model.named_parameters():
            if name not in stored and name in tied:
                continue
            if name not in stored:
                raise InputError(f"tensor {name} is missing from {self.source.name}: fetch the checkpoint again")
            shape = self.source.reader.shape(name)
            if shape != tuple(parameter.shape):
                raise InputError(
                    f"tensor {name} of {self.source.name} has shape {list(shape)}, its configuration says "
                    f"{list(parameter.shape)}: config.json and weights do not belong together"
                )

    def rotation(self, index: int, kwargs: dict[str, Any]) -> Rotation:
        """RoPE of a layer, read from the cos and sin tables among the arguments that the stock model gives to it."""
        shape, step = self.source.shape, self.source.family.freq_stride
        inv_freq = torch.zeros(shape.head_dim // 2, dtype=torch.float64, device=self.device)
        num_rotary_freqs = shape.full_rope_dim // shape.num_kv_heads // 2 if shape.has_rope(index) else 0
        if not num_rotary_freqs:
            return Rotation(inv_freq, 0, 1.0)
        # position 1: no frequency turns by half a circle in one step
        cos, sin = (table[0, 1, : num_rotary_freqs * step : step].double() for table in kwargs["position_embeddings"])
        inv_freq[:num_rotary_freqs] = torch.atan2(sin, cos)
        return Rotation(inv_freq, num_rotary_freqs, float(torch.hypot(cos, sin).mean()))

    def autocast(self) -> contextlib.AbstractContextManager:
        """bfloat16 autocast on CUDA, nothing elsewhere."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else contextlib.nullcontext()

    def layer_prefix(self, index: int) -> str:
        """Start of the tensor names of one layer."""
        return f"{self.source.family.layers}.{index}."

    def layer_tensors(self, index: int) -> dict[str, Tensor]:
        """All tensors of one layer as stored, checked to be finite, by their full names."""
        prefix = self.layer_prefix(index)
        tensors = self.source.reader.read(name for name in self.source.reader.names() if name.startswith(prefix))
        check_finite(tensors)
        return tensors

    @contextlib.contextmanager
    def layer(self, index: int, tensors: dict[str, Tensor]) -> Iterator[nn.Module]:
        """One decoder layer with its weights on the device; its memory is given back at the end."""
        layer = self.layers[index]
        own = {name.removeprefix(self.layer_prefix(index)): tensor for name, tensor in tensors.items()}
        with self._filled(layer, own):
            yield layer

    @contextlib.contextmanager
    def _filled(
        self, module: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> Iterator[None]:
        names = set(module.state_dict())  # parameters and persistent buffers
        state = {name: t.to(self.device).to(dtype, copy=True) for name, t in tensors.items() if name in names}
        module.load_state_dict(state, strict=False, assign=True)
        try:
            yield
        finally:
            # not the buffers: they are small, and some are in no checkpoint
            for part in module.modules():
                for name, parameter in part._parameters.items():
                    if parameter is not None:
                        part._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    @contextlib.contextmanager
    def _rows_replaced(self, module: nn.Module, rows: dict[str, Tensor]) -> Iterator[None]:
        """A linear layer with some rows only: "weight", and "bias" if it has one."""
        kept = {name: getattr(module, name) for name in rows}
        for name, part in rows.items():
            setattr(module, name, nn.Parameter(part.to(self.device).float(), requires_grad=False))
        try:
            yield
        finally:
            for name, parameter in kept.items():
                setattr(module, name, parameter)

    def _stored(self, path: str) -> str:
        """Name of the stored tensor that a module's weight comes from: its own, or the embedding that it is tied to."""
        own = f"{path}.weight"
        return own if own in self.source.reader.names() else f"{self.embedding}.weight"

    def _path_of(self, target: nn.Module) -> str:
        return next(path for path, module in self.model.named_modules() if module is target)

    @property
    def embedding(self) -> str:
        """Path of the token embedding."""
        return self._path_of(self.model.get_input_embeddings())

    @contextlib.contextmanager
    def _layers_replaced(self, layers: list[nn.Module]) -> Iterator[None]:
        # the stock forward loops over the first num_hidden_layers entries
        setattr(self.decoder, self._list, nn.ModuleList(layers))
        try:
            yield
        finally:
            setattr(self.decoder, self._list, self.layers)

    @contextlib.contextmanager
    def _norm_replaced(self) -> Iterator[None]:
        """Without the norm after the last layer."""
        name = self.source.family.final_norm
        kept = getattr(self.decoder, name)
        setattr(self.decoder, name, nn.Identity())
        try:
            yield
        finally:
            setattr(self.decoder, name, kept)

    @contextlib.contextmanager
    def _frame_filled(self) -> Iterator[None]:
        """What is small beside embedding, layers and final norm (learned positions), with its weights."""
        path = self.source.family.layers.rpartition(".")[0]
        apart = (self.layers, self.model.get_input_embeddings(), getattr(self.decoder, self.source.family.final_norm))
        with contextlib.ExitStack() as stack:
            for name, child in self.decoder.named_children():
                wanted = [key for key, _ in child.named_parameters()] if child not in apart else []
                if wanted:
                    tensors = self.source.reader.read(f"{path}.{name}.{key}" for key in wanted)
                    check_finite(tensors)
                    own = {key.removeprefix(f"{path}.{name}."): tensor for key, tensor in tensors.items()}
                    stack.enter_context(self._filled(child, own))
            yield

    @torch.no_grad()
    def embed(self, windows: Tensor) -> Tensor:
        """Input of the first layer, float32, for token windows (N, L): (N, L, hidden), on the CPU."""
        tensors = self.source.reader.read([f"{self.embedding}.weight"])
        check_finite(tensors)
        (table,) = tensors.values()
        # looked up in the stored dtype: the table is the largest tensor of a small model
        with (
            self._filled(self.model.get_submodule(self.embedding), {"weight": table}, table.dtype),
            self._frame_filled(),
            self._norm_replaced(),
            self._layers_replaced([_Recorder(layer) for layer in self.layers]),
        ):
            parts = [
                self.decoder(ids.to(self.device), use_cache=False).last_hidden_state.float().cpu()
                for ids in windows.split(8)
            ]
        return torch.cat(parts)

    @torch.no_grad()
    def layer_kwargs(self, length: int, eager: bool = False) -> list[dict[str, Any]]:
        """Keyword arguments (positions, masks) that the stock model gives to each layer for unpadded windows."""
        recorders = [_Recorder(layer) for layer in self.layers]
        hidden = torch.zeros(1, length, self.source.config.hidden_size, device=self.device)
        with (
            self._frame_filled(),
            self._norm_replaced(),
            self._layers_replaced(recorders),
            self.attention("eager" if eager else self.implementation),
        ):
            self.decoder(inputs_embeds=hidden, use_cache=False)
        return [recorder.kwargs for recorder in recorders]

    @contextlib.contextmanager
    def attention(self, implementation: str) -> Iterator[None]:
        """Run with another attention implementation, for those who need the probabilities."""
        self.model.config._attn_implementation = implementation
        try:
            yield
        finally:
            self.model.config._attn_implementation = self.implementation

    def _head_tensors(self) -> dict[str, str]:
        """Names of the stored tensors of the head, by the parameters that they fill."""
        head = self.model.get_output_embeddings()
        stored = {"weight": self._stored(self._path_of(head))}
        return stored if head.bias is None else stored | {"bias": f"{self._path_of(head)}.bias"}

    @contextlib.contextmanager
    def _final_norm(self) -> Iterator[nn.Module]:
        """The norm after the last layer, with its weights."""
        norm = getattr(self.decoder, self.source.family.final_norm)
        path = self._path_of(norm)
        tensors = self.source.reader.read(f"{path}.{name}" for name, _ in norm.named_parameters())
        check_finite(tensors)
        with self._filled(norm, {name.removeprefix(f"{path}."): tensor for name, tensor in tensors.items()}):
            yield norm

    @contextlib.contextmanager
    def divergence(self) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
        """Loads the final norm and the whole head; gives a function of two outputs (B, L, hidden) of the last layer, the
        converted model's and the original's: KL(original || converted) of the next token, nats, mean over tokens."""
        head, stored, compare = (
            self.model.get_output_embeddings(),
            self._head_tensors(),
            distillation_loss_fn(LossWeights(), self.device),
        )
        # the largest matrix of all; on CUDA it would be cast for every product
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        tensors = self.source.reader.read(stored.values())
        check_finite(tensors)
        with (
            self._final_norm() as norm,
            self._filled(head, {kind: tensors[name] for kind, name in stored.items()}, dtype),
        ):
            del tensors
            output = Head(self.model)

            def distance(found: Tensor, expected: Tensor) -> Tensor:
                labels = torch.full(found.shape[:2], IGNORED, device=found.device)
                with self.autocast():
                    return distillation_loss(
                        norm(found), norm(expected), labels, output, output, LossWeights(), compare
                    )[0]

            yield distance

    def head_slices(self) -> Iterator[int]:
        """Loads the final norm and, one after another, slices of the head; yields the first token of each."""
        head, stored = self.model.get_output_embeddings(), self._head_tensors()
        with self._final_norm(), self._frame_filled():
            rows = self.source.reader.shape(stored["weight"])[0]
            for start in range(0, rows, LOGIT_ROWS):
                stop = min(start + LOGIT_ROWS, rows)
                part = {kind: self.source.reader.rows(name, start, stop) for kind, name in stored.items()}
                check_finite({stored[kind]: tensor for kind, tensor in part.items()})
                with self._rows_replaced(head, part):
                    yield start

    def logits(self, states: Tensor) -> Tensor:
        """Logits (L, slice), float32, of outputs (1, L, hidden) of the last layer, by the slice of the head that is loaded."""
        with self._layers_replaced([_Injector(states)] * len(self.layers)), self.autocast():
            return self.model(inputs_embeds=states, use_cache=False).logits[0].float()

    def output_gradient(self, hidden: Tensor, generator: torch.Generator) -> Tensor:
        """Gradient (N, L, hidden) of the negative log-likelihood of tokens drawn from the model's own prediction.

        With respect to outputs (N, L, hidden) of the last layer, summed over tokens; float32, on the CPU. The head is read
        a slice of the vocabulary at a time, twice: once to draw (the largest of logit + Gumbel noise), once to differentiate.
        """
        shape = hidden.shape[:2]
        total = torch.full(shape, -torch.inf, device=self.device)
        best, drawn = total.clone(), torch.zeros(shape, dtype=torch.int64, device=self.device)
        gradient = torch.zeros(hidden.shape)
        for drawing in (True, False):
            for start in self.head_slices():
                for window, first in itertools.product(range(shape[0]), range(0, shape[1], LOGIT_TOKENS)):
                    part = (window, slice(first, first + LOGIT_TOKENS))
                    states = hidden[part][None].to(self.device, torch.float32).requires_grad_(not drawing)
                    with torch.set_grad_enabled(not drawing):
                        logits = self.logits(states)
                    if drawing:
                        total[part] = torch.logaddexp(total[part], logits.logsumexp(-1))
                        noise = torch.empty_like(logits).exponential_(generator=generator).log_().neg_()
                        value, index = (logits + noise).max(-1)
                        drawn[part] = torch.where(value > best[part], index + start, drawn[part])
                        best[part] = torch.maximum(best[part], value)
                    else:
                        slope = (logits.detach() - total[part][:, None]).exp()
                        local = drawn[part] - start
                        here = ((local >= 0) & (local < logits.shape[-1])).nonzero()[:, 0]
                        slope[here, local[here]] -= 1
                        logits.backward(slope)
                        gradient[part] += states.grad[0].cpu()
        return gradient
