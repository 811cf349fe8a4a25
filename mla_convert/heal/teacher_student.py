"""A converted model and its original side by side, with one copy of the weights that are frozen and equal in both.

With only attention trained these are all other weights: the original is the converted model with its own attention
modules put back, so both together take little more memory than one.
"""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mla_convert.core.errors import InputError, UsageError
from mla_convert.heal.settings import HealSettings
from mla_convert.method.refine.optimise import relative_error
from mla_convert.modeling.attention_backends import CAUSAL, attention_backend
from mla_convert.modeling.attention_mla import MlaAttention
from mla_convert.modeling.distillation import distillation_loss, distillation_loss_fn, divergence
from mla_convert.modeling.head import Head, decoder_name
from mla_convert.modeling.loss_terms import LossWeights

NOT_ADAPTED = ("q_b_proj",)  # the modeling code reads its weight and does not call it
OWN, ORIGINAL = "own", "original"
# Graphs that torch.compile may make of one function: with gradients and without, for several lengths and sizes.
RECOMPILE_LIMIT = 32


class SharedAttention(nn.Module):
    """Replaces a layer's attention: runs the converted model's, or its original's while `as_original` is set."""

    def __init__(self, own: nn.Module, original: nn.Module):
        """Hold both attentions of a layer, the converted model's (`own`) and its original's."""
        super().__init__()
        self.own, self.original, self.as_original = own, original, False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the attention that is active."""
        return (self.original if self.as_original else self.own)(*args, **kwargs)


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters; buffers, such as rotary frequencies, keep their dtype."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def narrow_stream(model: nn.Module) -> None:
    """Make embeddings and norms return bfloat16, as in a model that is stored so, whatever the dtype of their weights.

    Under autocast alone float32 weights would make the whole residual stream float32, and every projection cast it again.
    """
    for module in model.modules():
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Embedding) or (weight is not None and weight.ndim == 1):
            module.register_forward_hook(lambda _module, _inputs, output: output.to(torch.bfloat16))


def attentions(model: nn.Module) -> list[nn.Module]:
    """The latent attentions of a converted model."""
    layers = model.get_submodule(model.config.mla_layers)
    return [getattr(layers[index], model.config.mla_attention) for index in model.config.converted_layers()]


class TeacherStudent(nn.Module):
    """The converted model (`student`, to be trained) and its original; calling it gives the loss of a batch.

    Both run in evaluation mode: with dropout the student would learn from noise. `build` makes one by the settings.
    """

    @classmethod
    def build(
        cls, student: nn.Module, original: nn.Module, settings: HealSettings, frozen_dtype: torch.dtype
    ) -> TeacherStudent:
        """The pair in which the parameters that `settings.train` names are trained.

        Args:
            student: the converted model.
            original: its source, on the same device; both are taken over.
            settings: of the healing run.
            frozen_dtype: of the parameters that are not trained; the others are float32.

        Raises:
            InputError: the two are not a conversion and its original.
            UsageError: LoRA without peft.
        """
        constructors = {"all": cls.two_models, "attention": cls.sharing_frozen, "lora": cls.with_lora}
        return constructors[settings.train](student, original, settings, frozen_dtype)

    @classmethod
    def two_models(
        cls, student: nn.Module, original: nn.Module, settings: HealSettings, frozen_dtype: torch.dtype
    ) -> TeacherStudent:
        """Train all parameters of the student; see `build`."""
        _freeze(student, original, frozen_dtype)
        _train(student.parameters())
        return cls(student, original, settings, frozen_dtype)

    @classmethod
    def sharing_frozen(
        cls, student: nn.Module, original: nn.Module, settings: HealSettings, frozen_dtype: torch.dtype
    ) -> TeacherStudent:
        """Train the student's attention, and share the other weights with the original if they are equal; see `build`."""
        _freeze(student, original, frozen_dtype)
        cast_parameters(student, frozen_dtype)
        for attention in attentions(student):
            _train(attention.parameters())
        return cls._sharing(student, original, settings, frozen_dtype)

    @classmethod
    def with_lora(
        cls, student: nn.Module, original: nn.Module, settings: HealSettings, frozen_dtype: torch.dtype
    ) -> TeacherStudent:
        """Train adapters on the student's attention, and share the other weights if they are equal; see `build`."""
        _freeze(student, original, frozen_dtype)
        cast_parameters(student, frozen_dtype)
        add_lora(student, settings.lora_rank)
        _train(parameter for name, parameter in student.named_parameters() if ".lora_" in name)
        return cls._sharing(student, original, settings, frozen_dtype)

    @classmethod
    def _sharing(
        cls, student: nn.Module, original: nn.Module, settings: HealSettings, frozen_dtype: torch.dtype
    ) -> TeacherStudent:
        """Put the original's attentions beside the student's if all other weights are equal."""
        if not _equal_but_attention(student, original):
            return cls(student, original, settings, frozen_dtype)
        path, name = student.config.mla_layers, student.config.mla_attention
        layers, originals = student.get_submodule(path), original.get_submodule(path)
        switches = []
        for index in student.config.converted_layers():
            switches.append(SharedAttention(getattr(layers[index], name), getattr(originals[index], name)))
            setattr(layers[index], name, switches[-1])
        return cls(student, student, settings, frozen_dtype, switches)

    def __init__(
        self,
        student: nn.Module,
        original: nn.Module,
        settings: HealSettings,
        frozen_dtype: torch.dtype,
        switches: Iterable[SharedAttention] = (),
    ):
        """Join two models whose parameters are set up for training; `build` does that first.

        Args:
            student: the converted model.
            original: its source; the student itself where they share weights.
            settings: of the healing run.
            frozen_dtype: of the parameters that are not trained.
            switches: the attentions that make the student the original, where they share weights.

        Raises:
            InputError: the two have different vocabularies.
        """
        super().__init__()
        self._settings = settings
        self._mix = LossWeights(settings.kl_weight, settings.ce_weight, settings.temperature)
        self._compare = distillation_loss_fn(self._mix, torch.device("cpu"))
        self._layers = [*student.get_submodule(student.config.mla_layers)]
        # what accelerate's FSDP wraps one by one
        self._no_split_modules = list(student._no_split_modules or ())
        self._switches = [*switches]
        if frozen_dtype == torch.bfloat16:
            narrow_stream(student)
        self.student = student
        # in a list, so that it is no submodule: it is not to be trained, wrapped or saved
        self._original = [original]
        self._heads = Head(student), Head(original)
        if self._heads[0].output.weight.shape[0] != self._heads[1].output.weight.shape[0]:
            raise InputError("the two models do not have the same vocabulary: not a conversion and its original")

    @property
    def original(self) -> nn.Module:
        """The model that runs as the original; the student itself where they share weights."""
        return self._original[0]

    @property
    def shares(self) -> bool:
        """Whether the two share their frozen weights."""
        return bool(self._switches)

    def place(self, device: torch.device) -> TeacherStudent:
        """Move both models to a device; returns self."""
        # It is no submodule, so `self.to` does not move it.
        self.original.to(device)
        self._compare = distillation_loss_fn(self._mix, device)
        return self.to(device)

    def checkpoint_gradients(self) -> None:
        """Keep only each layer's input for the backward pass, and run the layer again there (arXiv 1604.06174)."""
        for layer in self._layers:
            layer.forward = _Checkpointed(layer.forward)

    def compile(self) -> None:
        """Apply torch.compile to the original's layers, which are alike, and to parts of the converted model's layers.

        The converted attention differs in size from layer to layer: only the operations between its matrix products are
        compiled. Compiling whole layers of different sizes takes minutes where this takes seconds.
        """
        torch._dynamo.config.suppress_errors = True  # code that cannot be compiled runs eagerly
        torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
        # Dynamic: one compiled function serves the sizes of all layers.
        join = torch.compile(MlaAttention.join, dynamic=True)
        for layer in self._layers:
            for part in layer.children():
                attention = part.own if isinstance(part, SharedAttention) else part
                if isinstance(attention, MlaAttention):
                    attention.join = join
                else:
                    part.compile()
        if not self.shares:
            for layer in self.original.get_submodule(self.student.config.mla_layers):
                layer.compile()
        # Otherwise it is the Triton kernel, which is compiled already.
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
        """Attention for windows of one document: without masks, unless a sliding window is shorter than they are."""
        models = self.student, self.original
        config = models[0].config.get_text_config()
        window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
        return contextlib.nullcontext() if window and length > window else attention_backend(CAUSAL, *models)

    def forward(
        self, ids: Tensor, labels: Tensor, positions: Tensor | None = None, counted: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Loss of a batch.

        Args:
            ids: token ids (B, L).
            labels: the token that follows each (B, L), or IGNORED.
            positions: (B, L) where a window holds more than one document, else None.
            counted: (B, L) boolean, positions that the loss counts; None: all. Means are over all positions.

        Returns:
            The loss, and the means over tokens of loss, KL, cross-entropy and the original's cross-entropy (4,), as from
            `distillation_loss`.
        """
        inputs = {"input_ids": ids, "use_cache": False}
        if positions is not None:
            inputs["position_ids"] = positions
        if self._settings.hidden_weight:
            inputs["output_hidden_states"] = True
        with self._attending(ids.shape[1]) if positions is None else contextlib.nullcontext():
            # The original runs first, while no activations of the student are held.
            with torch.no_grad(), self._as_original():
                target = getattr(self.original, decoder_name(self.original))(**inputs)
            output = getattr(self.student, decoder_name(self.student))(**inputs)
        hidden, original = output.last_hidden_state, target.last_hidden_state
        if counted is not None:
            # Where none counts, the first position without a weight: every parameter has a gradient in every process.
            chosen = counted if counted.any() else torch.arange(ids.numel(), device=ids.device).view_as(ids) == 0
            hidden, original, labels = (each[chosen][None] for each in (hidden, original, labels))
        loss, sums = distillation_loss(hidden, original, labels, *self._heads, self._mix, self._compare)
        if counted is not None:
            share = counted.sum() / counted.numel()
            loss, sums = loss * share, sums * share
        if self._settings.hidden_weight:
            loss = loss + self._settings.hidden_weight * hidden_distance(output.hidden_states, target.hidden_states)
        return loss, sums


def _freeze(student: nn.Module, original: nn.Module, frozen_dtype: torch.dtype) -> None:
    """Prepare both models for distillation, with no parameter trained.

    Raises:
        InputError: they have different numbers of layers.
    """
    path = student.config.mla_layers
    layers, originals = (len(model.get_submodule(path)) for model in (student, original))
    if layers != originals:
        raise InputError(f"the original has {originals} layers and the converted model {layers}")
    student.eval().requires_grad_(False)
    original.eval().requires_grad_(False)
    cast_parameters(original, frozen_dtype)
    original.config._attn_implementation = student.config._attn_implementation


def _train(parameters: Iterable[nn.Parameter]) -> None:
    """Train parameters, in float32."""
    for parameter in parameters:
        parameter.requires_grad_(True)
        parameter.data = parameter.data.to(torch.float32)


class _Checkpointed:
    """A layer's forward that is run again in the backward pass."""

    def __init__(self, forward: Any):
        self._forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Without a backward pass nothing is kept, and nothing has to run again.
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        # The reentrant form needs an input with a gradient, and with frozen embeddings the first layer has none.
        return checkpoint(self._forward, *args, use_reentrant=False, **kwargs)


def hidden_distance(states: tuple[Tensor, ...], targets: tuple[Tensor, ...]) -> Tensor:
    """Mean over layers of `relative_error`, for hidden states (B, L, d) of every layer."""
    return torch.stack([relative_error(a.float(), b.float()) for a, b in zip(states, targets, strict=True)]).mean()


def peft() -> Any:
    """The library peft.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise UsageError("LoRA needs peft: pip install 'mla_convert[heal]', or train all or attention") from error


def add_lora(student: nn.Module, rank: int) -> None:
    """Put low-rank adapters (LoRA, arXiv 2106.09685), with alpha = rank, on the projections of every attention.

    Args:
        student: the converted model, changed in place.
        rank: of the adapters.

    Raises:
        UsageError: peft is not installed.
    """
    library = peft()
    path, name = student.config.mla_layers, student.config.mla_attention
    targets = [
        f"{path}.{index}.{name}.{inner}"
        for index, attention in zip(student.config.converted_layers(), attentions(student), strict=True)
        for inner, module in attention.named_children()
        if isinstance(module, nn.Linear) and inner not in NOT_ADAPTED
    ]
    settings = library.LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=targets)
    library.inject_adapter_in_model(settings, student)


def _equal_but_attention(student: nn.Module, original: nn.Module) -> bool:
    """Whether every parameter outside attention is equal in both models."""
    path, name = student.config.mla_layers, student.config.mla_attention
    layers = "|".join(map(str, student.config.converted_layers()))
    inside = re.compile(rf"{re.escape(path)}\.(?:{layers})\.{re.escape(name)}\.")
    converted, expected = (
        {key: p for key, p in model.named_parameters() if not inside.match(key)} for model in (student, original)
    )
    return converted.keys() == expected.keys() and all(
        converted[key].dtype == expected[key].dtype and torch.equal(converted[key], expected[key]) for key in converted
    )


def checkpoint_name(name: str) -> str:
    """Name in the converted checkpoint of a parameter of a TeacherStudent; for an adapter, under its projection's name."""
    # `module.` comes from DDP, `.base_layer.` from peft, and OWN from SharedAttention.
    name = name.removeprefix("module.").removeprefix("student.").replace(".base_layer.", ".")
    return name.replace(f".{OWN}.", ".", 1)
