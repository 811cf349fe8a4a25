"""The source model, one layer's weights at a time: stock transformers modules on the meta device that are filled on demand."""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mla_convert.core.errors import InputError, one_line
from mla_convert.modeling.stock_mla import rope_tables
from mla_convert.source.checkpoint.reader import check_finite
from mla_convert.source.source import Source

# keyword arguments of a stock decoder layer: positions, rotary tables, mask
LayerKwargs = dict[str, Any]


@dataclass(frozen=True)
class Rotation:
    """RoPE of one layer (RoFormer, arXiv 2104.09864)."""

    inv_freq: Tensor  # (d_h/2,) radians per position; dims without rotation are zeros at the end
    num_rotary_freqs: int  # the first ones of `inv_freq`, those of the stock model's table
    scale: float  # factor on cos and sin, not 1 with YaRN and LongRoPE
    # dims of a head, the first ones, of which f and f + half are a pair; None: 2 * num_rotary_freqs
    paired_dims: int | None = None


@functools.cache
def _entries(layer: type) -> int:
    code = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(layer.forward))))
    returned = [node.value for node in ast.walk(code) if isinstance(node, ast.Return)]
    return max(len(value.elts) if isinstance(value, ast.Tuple) else 0 for value in returned)


class StandIn(nn.Module):
    """Replaces a decoder layer in the stock model's loop over layers: has its type and the form of its output.

    The form, hidden states alone or a tuple that begins with them, is read from the layer's code, because it differs between
    versions of transformers (GPT-J, CodeGen).
    """

    def __init__(self, layer: nn.Module):
        """Stand in for `layer`."""
        super().__init__()
        self.block_type = getattr(layer, "block_type", None)
        self.entries = _entries(type(layer))

    def output(self, hidden_states: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        """Hidden states as the layer returns them."""
        return (hidden_states, *[None] * (self.entries - 1)) if self.entries else hidden_states


class _Recorder(StandIn):
    """Replaces a decoder layer: records its arguments and returns the hidden states unchanged."""

    def __init__(self, layer: nn.Module):
        super().__init__(layer)
        self.names = list(inspect.signature(layer.forward).parameters)
        self.kwargs: LayerKwargs = {}
        self.hidden_states: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor | tuple[Tensor | None, ...]:
        self.hidden_states, self.kwargs = hidden_states, dict(zip(self.names[1:], args, strict=False)) | kwargs
        return self.output(hidden_states)


def first_output(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Hidden states that a layer or an attention returned, alone or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def fold(hidden: Tensor, streams: int) -> Tensor:
    """Streams of hidden states (streams, B, T, d) as rows (B, T, streams * d); of one stream, nothing changes."""
    return hidden if streams == 1 else hidden.movedim(0, -2).flatten(-2)


def unfold(rows: Tensor, streams: int) -> Tensor:
    """Inverse of `fold`."""
    return rows if streams == 1 else rows.unflatten(-1, (streams, -1)).movedim(-2, 0)


class LayerwiseModel:
    """Runs a source model one layer at a time.

    Weights are loaded in float32, whatever dtype the source stores; on CUDA the forward passes run under bfloat16
    autocast. Only the layers inside a `layer` context, or the embeddings, have their weights in memory; the LM head is in
    `streamed_head`.
    """

    def __init__(self, source: Source, device: torch.device):
        """Build the model on the meta device and compare its shapes with the checkpoint's.

        Args:
            source: the checkpoint and its configuration.
            device: of the forward passes.

        Raises:
            InputError: the configuration makes no model, or its tensors are not those of the checkpoint.
        """
        self.source = source
        self.device = device
        try:
            with init_empty_weights(include_buffers=False):
                self.model = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32).eval()
        except Exception as error:  # transformers raises whatever an invalid setting leads to
            raise InputError(f"configuration of {source.name} does not make a model: {one_line(error)}") from error
        # SDPA supports neither soft caps nor sinks, and not every version of the stock classes declares it
        eager_only = source.family.softcap or source.family.sinks or not self.model._supports_sdpa
        self.implementation = "eager" if eager_only else "sdpa"
        self.model.set_attn_implementation(self.implementation)
        self.model.requires_grad_(False)
        path, _, self._list = source.family.layers.rpartition(".")
        self.decoder = self.model.get_submodule(path)
        self.layers = getattr(self.decoder, self._list)
        # parameters are on the meta device; buffers, such as rotary frequencies, are not, unless the checkpoint has them
        self.decoder._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
        self._check_shapes()

    def _check_shapes(self) -> None:
        """Compare the stored shape of every tensor with that of the configuration, before any work."""
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

    def rotation(self, index: int, kwargs: LayerKwargs) -> Rotation:
        """RoPE of a layer, from the cos and sin tables that the stock model passes to it.

        Args:
            index: of the layer.
            kwargs: the layer's keyword arguments, as from `layer_kwargs`.
        """
        shape, stride = self.source.shape.of(index), self.source.family.freq_stride
        paired_dims = shape.head_dim if self.source.family.heads_by_layer else None
        inv_freq = torch.zeros(shape.head_dim // 2, dtype=torch.float64, device=self.device)
        num_rotary_freqs = shape.full_rope_dim // shape.num_kv_heads // 2 if shape.has_rope(index) else 0
        if not num_rotary_freqs:
            return Rotation(inv_freq, 0, 1.0, paired_dims)
        # at position 1 the angle is the frequency itself, as none is as large as pi
        tables = rope_tables(
            kwargs.get("position_embeddings"),
            kwargs.get("position_ids"),
            self.source.family.rope_tables,
            2 * num_rotary_freqs,
        )
        cos, sin = (table[0, 1, : num_rotary_freqs * stride : stride].double() for table in tables)
        inv_freq[:num_rotary_freqs] = torch.atan2(sin, cos)
        scale = float(torch.hypot(cos, sin).mean())
        if self.source.family.norm_after_rope and abs(scale - 1) > 1e-6:
            raise InputError(
                f"RoPE of {self.source.name} multiplies queries and keys by {scale:.3g} before their norm, which is not supported"
            )
        return Rotation(inv_freq, num_rotary_freqs, scale, paired_dims)

    def autocast(self) -> contextlib.AbstractContextManager:
        """bfloat16 autocast on CUDA; a context without effect on the CPU."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else contextlib.nullcontext()

    def layer_prefix(self, index: int) -> str:
        """Prefix of the tensor names of one layer."""
        return f"{self.source.family.layers}.{index}."

    def layer_tensors(self, index: int) -> dict[str, Tensor]:
        """All tensors of one layer as stored, by their full names.

        Raises:
            InputError: one is not finite.
        """
        prefix = self.layer_prefix(index)
        tensors = self.source.reader.read(name for name in self.source.reader.names() if name.startswith(prefix))
        check_finite(tensors)
        return tensors

    @contextlib.contextmanager
    def layer(self, index: int, tensors: dict[str, Tensor]) -> Iterator[nn.Module]:
        """One decoder layer with its weights on the device until the context ends.

        Args:
            index: of the layer.
            tensors: its tensors by their full names, as from `layer_tensors`.
        """
        layer = self.layers[index]
        weights = {name.removeprefix(self.layer_prefix(index)): tensor for name, tensor in tensors.items()}
        with self.filled(layer, weights):
            yield layer

    @contextlib.contextmanager
    def filled(
        self, module: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> Iterator[None]:
        """A module of the model with its parameters on the device until the context ends.

        Args:
            module: part of the model, its parameters on the meta device.
            tensors: by the names of the module's parameters and persistent buffers; others are ignored.
            dtype: that the parameters get.
        """
        names = set(module.state_dict())  # parameters and persistent buffers
        state = {name: t.to(self.device).to(dtype, copy=True) for name, t in tensors.items() if name in names}
        module.load_state_dict(state, strict=False, assign=True)
        try:
            yield
        finally:
            # buffers keep their values: they are small, and some are in no checkpoint
            for part in module.modules():
                for name, parameter in part._parameters.items():
                    if parameter is not None:
                        part._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def path_of(self, target: nn.Module) -> str:
        """Path of a module in the model, such as `model.norm`."""
        return next(path for path, module in self.model.named_modules() if module is target)

    @property
    def embedding(self) -> str:
        """Path of the token embedding."""
        return self.path_of(self.model.get_input_embeddings())

    @property
    def final_norm(self) -> nn.Module:
        """The norm behind the last layer."""
        return getattr(self.decoder, self.source.family.final_norm)

    @contextlib.contextmanager
    def layers_replaced(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """The decoder with other modules in place of its layers, as many."""
        # the stock forward loops over the first num_hidden_layers entries
        setattr(self.decoder, self._list, nn.ModuleList(layers))
        try:
            yield
        finally:
            setattr(self.decoder, self._list, self.layers)

    @contextlib.contextmanager
    def _norm_replaced(self) -> Iterator[None]:
        """The decoder without the weights of the norm behind the last layer.

        A norm without weights stays: nanochat norms its embeddings by the same one.
        """
        norm = self.final_norm
        if list(norm.parameters()):
            setattr(self.decoder, self.source.family.final_norm, nn.Identity())
        try:
            yield
        finally:
            setattr(self.decoder, self.source.family.final_norm, norm)

    @property
    def input_width(self) -> int:
        """Width of the layers' own inputs for each token; 0: they have none."""
        name = self.source.family.layer_inputs
        return (getattr(self.source.config, name) if name else 0) or 0

    @property
    def streams(self) -> int:
        """Number of streams of hidden states between layers."""
        name = self.source.family.streams
        return getattr(self.source.config, name) if name else 1

    @contextlib.contextmanager
    def inputs_left_out(self) -> Iterator[None]:
        """The decoder as if its layers had no inputs of their own, whose table may be larger than all layers."""
        if not self.input_width:
            yield
            return
        empty = torch.empty(1, 1, len(self.layers), 0, device=self.device)
        # Gemma 4 has the first two; Gemma 3n always makes the inputs.
        names = {
            "hidden_size_per_layer_input": 0,
            "first_kv_shared_layer_idx": -1,
            "get_per_layer_inputs": lambda *_: None,
            "project_per_layer_inputs": lambda *_: empty,
        }
        before = {name: vars(self.decoder)[name] for name in names if name in vars(self.decoder)}
        vars(self.decoder).update(names)
        try:
            yield
        finally:
            for name in names:
                del vars(self.decoder)[name]
            vars(self.decoder).update(before)

    @contextlib.contextmanager
    def small_modules_filled(self) -> Iterator[None]:
        """The decoder with the weights of its remaining small modules, such as learned position embeddings."""
        path = self.source.family.layers.rpartition(".")[0]
        others = (self.layers, self.model.get_input_embeddings(), self.final_norm)
        with contextlib.ExitStack() as stack:
            for name, child in self.decoder.named_children():
                parameters = [key for key, _ in child.named_parameters()] if child not in others else []
                if parameters and "per_layer" not in name:
                    tensors = self.source.reader.read(f"{path}.{name}.{key}" for key in parameters)
                    check_finite(tensors)
                    weights = {key.removeprefix(f"{path}.{name}."): tensor for key, tensor in tensors.items()}
                    stack.enter_context(self.filled(child, weights))
            yield

    def embed(self, windows: Tensor) -> Tensor:
        """`embed_each` of one group of windows."""
        (states,) = self.embed_each([windows])
        return states

    @torch.no_grad()
    def embed_each(self, groups: Sequence[Tensor]) -> Iterator[Tensor]:
        """Hidden states at the input of the first layer, group by group; the embedding is read once for all.

        Args:
            groups: token ids (N, L) of each.

        Yields:
            (N, L, hidden), float32, on the CPU.

        Raises:
            InputError: the embedding is not finite.
        """
        # of few windows, some of several processes have none
        empty = [torch.empty(*windows.shape, self.source.config.hidden_size * self.streams) for windows in groups]
        if not any(map(len, groups)):
            yield from empty
            return
        tensors = self.source.reader.read([f"{self.embedding}.weight"])
        check_finite(tensors)
        (table,) = tensors.values()
        recorders: list[Any] = [_Recorder(layer) for layer in self.layers]
        # in the stored dtype: the table is the largest tensor of a small model
        with (
            self.filled(self.model.get_submodule(self.embedding), {"weight": table}, table.dtype),
            self.small_modules_filled(),
            self._norm_replaced(),
            self.layers_replaced(recorders),
            self.inputs_left_out(),
        ):
            for windows, nothing in zip(groups, empty, strict=True):
                parts = []
                for ids in windows.split(8) if len(windows) else ():
                    self.decoder(ids.to(self.device), use_cache=False)
                    parts.append(fold(recorders[0].hidden_states, self.streams).float().cpu())
                parts[:] = [torch.cat(parts) if parts else nothing]
                yield parts.pop()  # nothing here refers to it while it is used

    @torch.no_grad()
    def layer_kwargs(self, length: int, eager: bool = False) -> list[LayerKwargs]:
        """Keyword arguments (positions, masks) that the stock model passes to each layer for unpadded windows.

        Args:
            length: tokens of a window.
            eager: as under eager attention, whose masks differ from SDPA's.
        """
        recorders: list[Any] = [_Recorder(layer) for layer in self.layers]
        hidden = torch.zeros(1, length, self.source.config.hidden_size, device=self.device)
        with (
            self.small_modules_filled(),
            self._norm_replaced(),
            self.layers_replaced(recorders),
            self.inputs_left_out(),
            self.attention("eager" if eager else self.implementation),
        ):
            self.decoder(inputs_embeds=hidden, use_cache=False)
        for recorder in recorders:
            recorder.kwargs.pop("per_layer_input", None)  # left out
            if "shared_kv_states" in recorder.kwargs:  # else layers that run one by one would share them
                recorder.kwargs["shared_kv_states"] = {}
        return [recorder.kwargs for recorder in recorders]

    @contextlib.contextmanager
    def attention(self, implementation: str) -> Iterator[None]:
        """Run with another attention implementation, as eager attention alone returns its probabilities."""
        self.model.config._attn_implementation = implementation
        try:
            yield
        finally:
            self.model.config._attn_implementation = self.implementation
