"""The source model without its weights: the stock transformers modules on the meta device, filled one layer at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mla_convert.checkpoint.reader import check_finite
from mla_convert.errors import InputError
from mla_convert.source import Source

# Tokens whose logits are computed at once: bounds the memory of a large vocabulary.
LOGIT_TOKENS = 512


class _Recorder(nn.Module):
    """Stands for a decoder layer: keeps the keyword arguments it is called with, passes hidden states through."""

    def __init__(self):
        super().__init__()
        self.kwargs: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        self.kwargs = kwargs
        return hidden_states


class _Injector(nn.Module):
    """Stands for all decoder layers: returns given hidden states whatever comes in."""

    def __init__(self, hidden_states: Tensor):
        super().__init__()
        self.hidden_states = hidden_states

    def forward(self, *_, **__) -> Tensor:
        return self.hidden_states


class Skeleton:
    """Runs a source model one layer at a time.

    Weights are loaded in float32, whatever the source stores; on CUDA the forward passes run under bfloat16 autocast.
    Only one layer, or the embeddings, or the head, is in memory at any moment.
    """

    def __init__(self, source: Source, device: torch.device):
        self.source = source
        self.device = device
        with init_empty_weights(include_buffers=False):
            self.model = AutoModelForCausalLM.from_config(
                source.config, attn_implementation="sdpa", dtype=torch.float32
            ).eval()
        self.model.requires_grad_(False)
        self.decoder = self.model.get_submodule(source.family.layers.rpartition(".")[0])
        self.layers = self.decoder.layers
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

    @property
    def inv_freq(self) -> Tensor:
        """Rotary frequencies (n_f,) after the configuration's RoPE scaling."""
        return self.decoder.rotary_emb.inv_freq

    @property
    def rope_scale(self) -> float:
        """Factor on cos and sin that some RoPE scalings apply."""
        return float(getattr(self.decoder.rotary_emb, "attention_scaling", 1.0))

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
    def _filled(self, module: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
        names = set(dict(module.named_parameters()))
        state = {
            name: tensor.to(self.device).to(torch.float32, copy=True)
            for name, tensor in tensors.items()
            if name in names
        }
        module.load_state_dict(state, strict=False, assign=True)
        try:
            yield
        finally:
            module.to("meta")

    @contextlib.contextmanager
    def _ends(self, *names: str) -> Iterator[None]:
        """Embeddings, final norm or head with their weights: modules of the model by path, one stored tensor each."""
        with contextlib.ExitStack() as stack:
            for name in names:
                key = f"{name}.weight"
                stored = key if key in self.source.reader.names() else f"{self.embedding}.weight"
                tensors = self.source.reader.read([stored])
                check_finite(tensors)
                stack.enter_context(self._filled(self.model.get_submodule(name), {"weight": tensors.pop(stored)}))
            yield

    @property
    def embedding(self) -> str:
        """Path of the token embedding."""
        target = self.model.get_input_embeddings()
        return next(name for name, module in self.model.named_modules() if module is target)

    @contextlib.contextmanager
    def _layers_replaced(self, layers: list[nn.Module]) -> Iterator[None]:
        # the stock forward loops over the first num_hidden_layers entries
        kept, self.decoder.layers = self.decoder.layers, nn.ModuleList(layers)
        try:
            yield
        finally:
            self.decoder.layers = kept

    @torch.no_grad()
    def embed(self, windows: Tensor) -> Tensor:
        """Input of the first layer, float32, for token windows (N, L): (N, L, hidden), on the CPU."""
        norm, self.decoder.norm = self.decoder.norm, nn.Identity()
        try:
            with self._ends(self.embedding), self._layers_replaced([_Recorder() for _ in self.layers]):
                parts = [
                    self.decoder(ids.to(self.device), use_cache=False).last_hidden_state.cpu()
                    for ids in windows.split(8)
                ]
        finally:
            self.decoder.norm = norm
        return torch.cat(parts)

    @torch.no_grad()
    def layer_kwargs(self, length: int, eager: bool = False) -> list[dict[str, Any]]:
        """Keyword arguments (positions, masks) that the stock model gives to each layer for unpadded windows."""
        recorders = [_Recorder() for _ in self.layers]
        norm, self.decoder.norm = self.decoder.norm, nn.Identity()
        hidden = torch.zeros(1, length, self.source.config.hidden_size, device=self.device)
        try:
            with self._layers_replaced(recorders), self.attention("eager" if eager else "sdpa"):
                self.decoder(inputs_embeds=hidden, use_cache=False)
        finally:
            self.decoder.norm = norm
        return [recorder.kwargs for recorder in recorders]

    @contextlib.contextmanager
    def attention(self, implementation: str) -> Iterator[None]:
        """Run with another attention implementation, for those who need the probabilities."""
        self.model.config._attn_implementation = implementation
        try:
            yield
        finally:
            self.model.config._attn_implementation = "sdpa"

    @torch.no_grad()
    def token_losses(self, hidden_states: list[Tensor], windows: Tensor) -> list[Tensor]:
        """Negative log-likelihood (N, L-1) of each window's tokens, from outputs (N, L, hidden) of the last layer.

        Several sets of hidden states share one loading of the head. Logits are float32, a slice of tokens at a time.
        """
        head = next(name for name, module in self.model.named_modules() if module is self.model.get_output_embeddings())
        norm = next(name for name, module in self.model.named_modules() if module is self.decoder.norm)
        with self._ends(norm, head):
            return [torch.stack([self._window_loss(h, ids) for h, ids in zip(hidden, windows, strict=True)])
                    for hidden in hidden_states]  # fmt: skip

    def _window_loss(self, hidden: Tensor, ids: Tensor) -> Tensor:
        losses = []
        for start in range(0, len(ids) - 1, LOGIT_TOKENS):
            stop = min(start + LOGIT_TOKENS, len(ids) - 1)
            part = hidden[None, start:stop].to(self.device, torch.float32)
            with self._layers_replaced([_Injector(part)] * len(self.layers)), self.autocast():
                logits = self.model(inputs_embeds=part, use_cache=False).logits
            target = ids[start + 1 : stop + 1].to(self.device)
            losses.append(F.cross_entropy(logits[0].float(), target, reduction="none").cpu())
        return torch.cat(losses)
