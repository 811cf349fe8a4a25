"""Checks of a source before any work: it is a language model, and its tensors are exactly those of that model.

transformers loads many of the checkpoints that are refused here, with a message in its log alone: it leaves out a head or an
adapter, and initialises missing tensors at random.
"""

from __future__ import annotations

import contextlib
import math
import operator
import re
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mla_convert.core.errors import InputError, MlaConvertError, one_line
from mla_convert.source.checkpoint.layout import ModelReader
from mla_convert.source.families import Family
from mla_convert.source.shape import converted_layers
from mla_convert.source.tokenizer import read_tokenizer
from mla_convert.source.tokens import first_tokens

# Rows of a matrix that are compared at a time.
ROWS = 4096
# More decoder layers than any language model has; building a million of them takes minutes.
MOST_LAYERS = 1000
# Classes of models with a head of another kind: ...ForSequenceClassification, ...ForTokenClassification, ...
OTHER_HEAD = re.compile(r"\w+For(?!CausalLM|ConditionalGeneration)[A-Z]\w+")
OTHER_HEAD_TENSOR = re.compile(r"(^|\.)(score|classifier|classification_head|qa_outputs|reward_head|regression_head)\.")
ADAPTER_TENSOR = re.compile(r"\.(lora_\w+|base_layer|modules_to_save|original_module)\.")
# Buffers that older versions stored, and scales of activations.
BUFFERS = re.compile(
    r"(rotary_emb\.inv_freq|\.(attn|attention)\.(bias|masked_bias)|position_ids|_extra_state"
    r"|(input|output|k|v|q|kv|prob)_scale)$"
)
# Models of text that also take sound in: their language models are the text models of the same names.
HEARING = ("gemma3n", "gemma4", "gemma4_unified")
AUDIO = re.compile(r"audio|speech|codec|acoustic|vocoder|asr|voxtral")


@contextlib.contextmanager
def makes_sense(label: str) -> Iterator[None]:
    """Convert the errors that invalid settings cause into bad input.

    Raises:
        InputError: for any error that is not one of this package.
    """
    try:
        yield
    except (MlaConvertError, MemoryError):
        raise
    except Exception as error:  # no list of the errors that foreign settings cause is complete
        raise InputError(f"configuration of {label} does not make a model: {one_line(error)}") from error


def check_derived(source: Any) -> None:
    """Refuse a source whose sizes, windows or generation defaults cannot be derived from its settings.

    Raises:
        InputError: names the window or the type of layer; `makes_sense` converts the errors of other settings.
    """
    config, known = source.config, type(source.config)()
    kinds = getattr(config, "layer_types", None) or ()
    known_kinds = (*source.family.attention_layers, *source.family.other_layers)
    for kind in kinds:
        if kind not in known_kinds:
            raise InputError(
                f"{source.name} has layers of {kind!r}, which are not supported: {' and '.join(known_kinds)} are"
            )
    if not converted_layers(config):
        raise InputError(f"{source.name} has no layer with attention: there is nothing to convert")
    shape = source.shape
    if not shape.heads and shape.rotary_dim not in (0, shape.head_dim) and not source.family.partial_rotary:
        raise InputError(
            f"configuration of {source.name} does not make a model: RoPE would turn {shape.rotary_dim} of {shape.head_dim} dims "
            f"of a head, and {config.model_type} turns all: take partial_rotary_factor out of it (new family: set partial_rotary)"
        )
    windowed = any(window is not None for window in source.sliding_windows)
    has_windows = hasattr(known, "sliding_window") or hasattr(known, "attention_chunk_size")
    if (windowed and not has_windows) or (kinds and not hasattr(known, "layer_types")):
        # transformers' caches and masks use these settings, but this family's attention ignores them
        raise InputError(
            f"configuration of {source.name} has a sliding_window or layer_types, and {config.model_type} has no windows: take "
            f"them out of it"
        )
    for window in source.sliding_windows:
        if window is not None and (not isinstance(window, int) or window < 1):
            raise InputError(f"configuration of {source.name} is not valid: sliding_window {window!r}")
    if not source.gguf:
        # Read for its errors alone, before the conversion; a GGUF file's settings are read where it is opened.
        source.generation_config()


def refuse_audio(content: dict[str, Any], label: str) -> None:
    """Refuse an audio model: its language model continues encoded sound, not text. `HEARING` are none.

    Raises:
        InputError: it is one.
    """
    model_type = str(content.get("model_type"))
    parts = [key for key, value in content.items() if isinstance(value, dict) and AUDIO.search(key)]
    if model_type in HEARING:
        return
    if parts or AUDIO.search(model_type):
        raise InputError(
            f"{label} is an audio model ({', '.join([model_type, *parts])}): only language models of text are converted"
        )


def check_classes(content: dict[str, Any], stock: str, label: str, part: bool) -> list[str]:
    """Notes about classes in config.json other than the one that is converted.

    Args:
        content: of config.json.
        stock: name of the transformers class that is converted.
        label: of the source, for messages.
        part: whether the language model is a part of the model that config.json describes.

    Raises:
        InputError: a classifier or another kind of model, or a class that only the checkpoint's own code defines.
    """
    named = content.get("architectures")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    code = content.get("auto_map")
    code = sorted(map(str, code.values())) if isinstance(code, dict) else []
    for name in names:
        if OTHER_HEAD.fullmatch(name) and not part:
            raise InputError(f"{label} is a {name}, no language model: its head would be lost; give a language model")
    # Early Llama checkpoints name LLaMAForCausalLM.
    others = [name for name in names if name.lower() != stock.lower()]
    foreign = others if others == names and not part else []
    if foreign and code:
        raise InputError(
            f"{label} is a {foreign[0]}, made by code of its own (auto_map in config.json: {code[0]}), which is never run: "
            f"if transformers' {stock} computes the same, set architectures to it and take auto_map out"
        )
    notes = []
    if code:
        notes.append(
            f"config.json of {label} names code of its own (auto_map: {code[0]}), which is never run: transformers' {stock} is "
            f"converted in its place"
        )
    if foreign:
        notes.append(f"config.json of {label} names the class {foreign[0]}: read as {stock}, as transformers does")
    return notes


def check_tensors(reader: ModelReader, wanted: Iterable[str], label: str, part: bool) -> list[str]:
    """Compare the stored tensors with those of the model. Returns notes about tensors that the model does not have.

    Args:
        reader: of the checkpoint.
        wanted: names of the model's tensors.
        label: of the source, for messages.
        part: whether the model is part of a multimodal one, which has other tensors.

    Raises:
        InputError: a tensor is missing, has an unsupported dtype, or belongs to another kind of model.
    """
    # First, because an adapter renames the tensors under it, which would be reported as missing.
    for name in reader.unused:
        if ADAPTER_TENSOR.search(name):
            raise InputError(
                f"{label} holds an adapter's tensor ({name}): merge it into the weights (merge_and_unload)"
            )
    held = set(reader.names())
    for name in wanted:
        if name not in held:
            raise InputError(_missing(name, reader.unused, label))
    for name in held:
        reader.dtype(name)  # refuses unknown packed and quantised dtypes
    if part:
        return []
    unused = [name for name in reader.unused if not BUFFERS.search(name)]
    for name in unused:
        if OTHER_HEAD_TENSOR.search(name):
            raise InputError(f"{label} has another head ({name}) than a language model's: give a language model")
    if not unused:
        return []
    others = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
    return [
        f"tensor {unused[0]}{others} of {label} has no place in the model that config.json describes: left out, as "
        f"transformers does"
    ]


def _missing(name: str, unused: list[str], label: str) -> str:
    """The message about a missing tensor; it says if the tensor is stored under a wrapper's name."""
    for stored in unused:
        prefix = stored.removesuffix(name)
        if prefix != stored and prefix.endswith("."):
            return f"names of tensors in {label} begin with {prefix!r}, that of a wrapper ({stored}): save the model that it wraps"
    if unused:
        return (
            f"tensor {name} is missing from {label}, which has others ({unused[0]}): fetch the checkpoint again, if config.json "
            f"and weights belong together"
        )
    return f"tensor {name} is missing from {label}: fetch the checkpoint again"


def settle_ties(reader: ModelReader, tied: dict[str, str], label: str, compare: bool) -> tuple[bool, list[str]]:
    """Whether the weights are tied as config.json says, by transformers' rules, and notes.

    Tensors that are stored once, under either name, are tied; tensors that are stored twice with different values are not.

    Args:
        reader: of the checkpoint; it loses the second name of tied tensors.
        tied: parameter -> the parameter that it is tied to.
        label: of the source, for messages.
        compare: whether the values of tensors that are stored twice are compared; if not, they count as equal.

    Raises:
        InputError: stored twice in two shapes.
    """
    held = set(reader.names())
    for target, origin in tied.items():
        if target not in held:
            continue
        if origin not in held:
            reader.leave_out(target, instead=origin)
        elif not compare or _equal(reader, target, origin, label):
            reader.leave_out(target)
        else:
            return False, [
                f"config.json of {label} ties {target} to {origin}, but they are stored with unlike values: not tied, as "
                f"transformers does"
            ]
    return True, []


def _equal(reader: ModelReader, one: str, other: str, label: str) -> bool:
    shapes = reader.shape(one), reader.shape(other)
    if shapes[0] != shapes[1]:
        raise InputError(
            f"tensors {one} and {other} of {label} are tied, and have shapes {list(shapes[0])} and {list(shapes[1])}: "
            f"config.json and weights do not belong together"
        )
    for start in range(0, shapes[0][0], ROWS):
        parts = (reader.rows(name, start, start + ROWS).float() for name in (one, other))
        if not torch.equal(*parts):
            return False
    return True


def first_token_notes(path: Path, metadata: dict[str, Any], model_type: str) -> tuple[str, ...]:
    """A warning if a GGUF file requires a first token that its tokenizer, as transformers reads it, does not add.

    transformers 5.17 silently reads Gemma's vocabulary from a GGUF file without that token and with half of its merges.
    """
    wanted, token = (metadata.get(f"tokenizer.ggml.{name}") for name in ("add_bos_token", "bos_token_id"))
    if not wanted or token is None:
        return ()
    try:
        first = first_tokens(read_tokenizer(path.parent, path.name, path.name, model_type))
    except Exception:  # `Source.tokenizer` reports it if a tokenizer is needed
        return ()
    if first == [token]:
        return ()
    return (
        f"{path.name} says that a text begins with token {token}, and its tokenizer as transformers "
        f"{version('transformers')} reads it does not put it there: if perplexity before conversion is high, try a newer "
        f"transformers or the checkpoint that the file was made from",
    )


def check_layers(layers: int, names: Iterable[str], family: Family, label: str) -> None:
    """Refuse a configuration with more layers than the weights have, before such a model is built.

    Raises:
        InputError: names the first layer that is missing.
    """
    place = re.compile(rf"(?:^|\.){re.escape(family.layers.rpartition('.')[2])}\.(\d{{1,9}})\.")
    held = {int(found[1]) for name in names if (found := place.search(name))}
    if held and layers > max(held) + 1:
        raise InputError(
            f"tensor {family.layers}.{max(held) + 1}.* is missing from {label}: its configuration says {layers} layers and its "
            f"weights have {max(held) + 1}: they do not belong together"
        )


def check_width(model: PreTrainedModel, label: str) -> None:
    """Refuse a model with a projection between embeddings and layers of different widths.

    Raises:
        InputError: states both widths.
    """
    embedding: Any = model.get_input_embeddings()
    width, hidden = embedding.weight.shape[1], model.config.hidden_size
    if width != hidden:
        raise InputError(f"{label} has embeddings of {width} numbers and layers of {hidden}, which is not supported")


def rotary_dims(model: PreTrainedModel, family: Family, label: str) -> int:
    """Dims of a head that RoPE rotates, by the model's own tables: some classes ignore `partial_rotary_factor`.

    Where layers have heads of their own, `shape.layer_heads` has that number for each.

    Raises:
        InputError: layers differ in that number.
    """
    if family.heads_by_layer:
        return 0
    dims = {2 * len(buffer) for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    if len(dims) > 1:
        raise InputError(f"{label} has layers with different numbers of rotary dims {sorted(dims)}: not supported")
    # in older versions, GPT-J and CodeGen look sines up in a table
    return dims.pop() if dims else getattr(model.config, "rotary_dim", None) or 0


def check_names(model: PreTrainedModel, family: Family) -> None:
    """Refuse a family whose names are not those of the stock model: a mistake in its file.

    Raises:
        InputError: gives the field, and the names that there are.
    """
    path, _, stack = family.layers.rpartition(".")

    def look(module: torch.nn.Module, name: str | None, field: str, inside: str) -> Any:
        found = operator.attrgetter(name)(module) if name and _has(module, name) else None
        if name and found is None:
            there = ", ".join(dict(module.named_children()))
            raise InputError(
                f"the family {family.model_type} has {field} = {name!r}, and in transformers {inside} has {there or 'no parts'}: "
                f"see docs/guides/add-a-family.md"
            )
        return found

    look(model, family.layers, "layers", type(model).__name__)
    decoder = model.get_submodule(path)
    look(decoder, family.final_norm, "final_norm", path)
    indices = converted_layers(model.config)
    if not indices:  # `check_derived` refuses it
        return
    layer = getattr(decoder, stack)[indices[0]]
    attention = look(layer, family.attention, "attention", "its layer")
    norms = [family.input_norm] if isinstance(family.input_norm, str) else family.input_norm or []
    if norms and not any(hasattr(layer, name) for name in norms):
        look(layer, norms[0], "input_norm", "its layer")
    look(layer, family.output_norm, "output_norm", "its layer")
    look(layer, family.residual_multiplier, "residual_multiplier", "its layer")
    # the first layer may be one without a value projection
    separate = ("query", "key", "output") if family.one_projection else ("query", "key", "value", "output")
    for field in ("fused", "output") if family.fused else separate:
        look(attention, getattr(family, field), field, "its attention")
    look(attention, family.sinks, "sinks", "its attention")


def _has(module: torch.nn.Module, path: str) -> bool:
    try:
        operator.attrgetter(path)(module)
    except AttributeError:
        return False
    return True


def has_key_norm(model: PreTrainedModel, family: Family) -> bool:
    """Whether a layer has a norm between the key projection and attention; it may have no weights."""
    layers: Any = model.get_submodule(family.layers)
    norm = family.k_norm
    attentions = (getattr(layers[index], family.attention) for index in converted_layers(model.config))
    return norm is not None and any(hasattr(attention, norm) for attention in attentions)


def check_scaling(model: torch.nn.Module, label: str) -> None:
    """Refuse a configuration whose softmax scale is not a finite real number.

    Raises:
        InputError: states the scale.
    """
    for module in model.modules():
        scale = getattr(module, "scaling", None)
        if isinstance(scale, complex) or (isinstance(scale, float) and not math.isfinite(scale)):
            raise InputError(f"configuration of {label} does not make a model: attention would be scaled by {scale}")
