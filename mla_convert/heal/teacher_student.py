"""A converted model and its original side by side, with one copy of every weight that is frozen and equal in both.

With only attention trained, that is everything but attention: the original is the converted model with its own attention
modules put back, so both together take little more memory than one.
"""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mla_convert.core.errors import InputError, UsageError
from mla_convert.heal.settings import HealSettings
from mla_convert.method.refine.optimise import relative_error
from mla_convert.modeling.attention_backends import CAUSAL, attention_backend
from mla_convert.modeling.distillation import distillation_loss, distillation_loss_fn, divergence
from mla_convert.modeling.head import Head
from mla_convert.modeling.loss_terms import LossWeights
from mla_convert.modeling.modeling_mla import MlaAttention

NOT_ADAPTED = ("q_b_proj",)  # the modeling code reads its weight and does not call it
OWN, ORIGINAL = "own", "original"
RECOMPILED = 32  # graphs of one function: with gradients and without, of several lengths and sizes


class SharedAttention(nn.Module):
    """Stands where a layer's attention was: the converted model's, or its original's when `as_original` is set."""

    def __init__(self, own: nn.Module, original: nn.Module):
        super().__init__()
        self.own, self.original, self.as_original = own, original, False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the attention in charge."""
        return (self.original if self.as_original else self.own)(*args, **kwargs)


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Parameters in another dtype; buffers, rotary frequencies among them, as they are."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def narrow_stream(model: nn.Module) -> None:
    """Embeddings and norms give bfloat16, as they do when a model is stored so, whatever their weights are in.

    Under autocast alone float32 weights would make the whole residual stream float32, and every projection cast it again.
    """
    for module in model.modules():
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Embedding) or (weight is not None and weight.ndim == 1):
            module.register_forward_hook(lambda _module, _inputs, output: output.to(torch.bfloat16))


def attentions(model: nn.Module) -> list[nn.Module]:
    """The attention of every layer of a converted model."""
    return [getattr(layer, model.config.mla_attention) for layer in model.get_submodule(model.config.mla_layers)]


class TeacherStudent(nn.Module):
    """The converted model (`student`, to be trained) and its original; calling it gives the loss of a batch.

    Both run in evaluation mode: no dropout, which would have the student learn from noise.
    """

    def __init__(self, student: nn.Module, original: nn.Module, settings: HealSettings, frozen_dtype: torch.dtype):
        """Takes both models over, on one device; `frozen_dtype` is that of what is not trained.

        Raises:
            InputError: the two are not a conversion and its original.
            UsageError: LoRA without peft.
        """
        super().__init__()
        config = student.config
        layers, originals = (model.get_submodule(config.mla_layers) for model in (student, original))
        if len(layers) != len(originals):
            raise InputError(f"the original has {len(originals)} layers and the converted model {len(layers)}")
        self._settings = settings
        self._mix = LossWeights(settings.kl_weight, settings.ce_weight, settings.temperature)
        self._compare = distillation_loss_fn(self._mix, torch.device("cpu"))
        self._layers = [*layers]
        # what accelerate's FSDP wraps one by one
        self._no_split_modules = list(student._no_split_modules or ())
        student.eval().requires_grad_(False)
        original.eval().requires_grad_(False)
        cast_parameters(original, frozen_dtype)
        original.config._attn_implementation = config._attn_implementation

        trained = [student] if settings.train == "all" else attentions(student)
        if settings.train != "all":
            cast_parameters(student, frozen_dtype)
        if settings.train == "lora":
            add_lora(student, settings.lora_rank)
            trained = [nn.ParameterList(p for n, p in student.named_parameters() if ".lora_" in n)]
        for module in trained:
            module.requires_grad_(True)
            cast_parameters(module, torch.float32)
        self.shares = settings.train != "all" and _equal_but_attention(student, original)
        self._switches: list[SharedAttention] = []
        if self.shares:
            for layer, theirs in zip(layers, originals, strict=True):
                own = getattr(layer, config.mla_attention)
                switch = SharedAttention(own, getattr(theirs, config.mla_attention))
                setattr(layer, config.mla_attention, switch)
                self._switches.append(switch)
        if frozen_dtype == torch.bfloat16:
            narrow_stream(student)
        self.student = student
        # in a list: no part of what is trained, wrapped and saved
        self._original = [student if self.shares else original]
        self._heads = Head(student), Head(student if self.shares else original)
        if self._heads[0].output.weight.shape[0] != self._heads[1].output.weight.shape[0]:
            raise InputError("the two models do not have the same vocabulary: not a conversion and its original")

    def place(self, device: torch.device) -> TeacherStudent:
        """Both models on a device."""
        self._original[0].to(device)
        self._compare = distillation_loss_fn(self._mix, device)
        return self.to(device)

    def checkpoint_gradients(self) -> None:
        """Keep only each layer's input for the backward pass, and run the layer again there."""
        for layer in self._layers:
            layer.forward = _Checkpointed(layer.forward)

    def compile(self) -> None:
        """torch.compile of the original's layers, of which one is as the other, and of the parts of the converted model's:
        of its attention, which differs in size from layer to layer, what lies between the matrix products.

        Compiling whole layers of different sizes takes minutes where this takes seconds.
        """
        torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is
        torch._dynamo.config.recompile_limit = max(RECOMPILED, torch._dynamo.config.recompile_limit)
        join = torch.compile(MlaAttention.join, dynamic=True)
        for layer in self._layers:
            for name, part in layer.named_children():
                if name != self.student.config.mla_attention:
                    part.compile()
                else:
                    (part.own if isinstance(part, SharedAttention) else part).join = join
        if not self.shares:
            for layer in self._original[0].get_submodule(self.student.config.mla_layers):
                layer.compile()
        if self._compare is divergence:
            self._compare = torch.compile(divergence)

    @contextlib.contextmanager
    def _as_original(self) -> Iterator[None]:
        for switch in self._switches:
            switch.as_original = True
        try:
            yield
        finally:
            for switch in self._switches:
                switch.as_original = False

    def _attending(self, length: int) -> contextlib.AbstractContextManager:
        """For windows of one document: without masks, unless layers see less of a window than all before."""
        models = self.student, self._original[0]
        window = getattr(models[0].config.get_text_config(), "sliding_window", None)
        return contextlib.nullcontext() if window and length > window else attention_backend(CAUSAL, *models)

    def forward(self, ids: Tensor, labels: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Loss of windows (B, L), and the sums of `divergence` by token."""
        inputs = {"input_ids": ids, "use_cache": False}
        if positions is not None:
            inputs["position_ids"] = positions
        if self._settings.hidden_weight:
            inputs["output_hidden_states"] = True
        with self._attending(ids.shape[1]) if positions is None else contextlib.nullcontext():
            with torch.no_grad(), self._as_original():
                theirs = self._original[0].base_model(**inputs)
            ours = self.student.base_model(**inputs)
        hidden, target = ours.last_hidden_state, theirs.last_hidden_state
        loss, sums = distillation_loss(hidden, target, labels, *self._heads, self._mix, self._compare)
        if self._settings.hidden_weight:
            loss = loss + self._settings.hidden_weight * hidden_distance(ours.hidden_states, theirs.hidden_states)
        return loss, sums


class _Checkpointed:
    """A layer's forward that is run again in the backward pass."""

    def __init__(self, forward: Any):
        self._forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        return checkpoint(self._forward, *args, use_reentrant=False, **kwargs)


def hidden_distance(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> Tensor:
    """Mean over layers of `refine.relative_error`, for hidden states (B, L, d) of every layer."""
    return torch.stack([relative_error(a.float(), b.float()) for a, b in zip(ours, theirs, strict=True)]).mean()


def peft() -> Any:
    """The library of adapters.

    Raises:
        UsageError: not installed.
    """
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise UsageError("LoRA needs peft: pip install 'mla_convert[heal]', or train all or attention") from error


def add_lora(student: nn.Module, rank: int) -> None:
    """Low-rank adapters (arXiv 2106.09685), with alpha = rank, on the projections of every attention.

    Raises:
        UsageError: peft is not installed.
    """
    library = peft()
    path, name = student.config.mla_layers, student.config.mla_attention
    targets = [
        f"{path}.{index}.{name}.{inner}"
        for index, attention in enumerate(attentions(student))
        for inner, module in attention.named_children()
        if isinstance(module, nn.Linear) and inner not in NOT_ADAPTED
    ]
    settings = library.LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=targets)
    library.inject_adapter_in_model(settings, student)


def _equal_but_attention(student: nn.Module, original: nn.Module) -> bool:
    """Whether every parameter outside attention is the same in both."""
    path, name = student.config.mla_layers, student.config.mla_attention
    inside = re.compile(rf"{re.escape(path)}\.\d+\.{re.escape(name)}\.")
    ours, theirs = (
        {key: p for key, p in model.named_parameters() if not inside.match(key)} for model in (student, original)
    )
    return ours.keys() == theirs.keys() and all(
        ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]) for key in ours
    )


def checkpoint_name(name: str) -> str:
    """A parameter's name in a Pair as the converted checkpoint has it (that of an adapter: its projection's)."""
    name = name.removeprefix("module.").removeprefix("student.").replace(".base_layer.", ".")
    return name.replace(f".{OWN}.", ".", 1)
