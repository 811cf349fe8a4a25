"""Opens a source (local folder, Hub id, GGUF file or packaged demo): its configuration, tokenizer and weights reader."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from mla_convert.core.errors import InputError, MlaConvertError, UsageError, one_line
from mla_convert.source.carried import GENERATION, carried_files, check_inside, licence_files
from mla_convert.source.checkpoint.dequantise import DequantisedReader, take_quantization
from mla_convert.source.checkpoint.files import INDEX, SINGLE, refuse_adapter
from mla_convert.source.checkpoint.gguf_config import sampling
from mla_convert.source.checkpoint.gguf_file import gguf_parts, read_gguf
from mla_convert.source.checkpoint.gguf_model import open_gguf
from mla_convert.source.checkpoint.layout import ModelReader
from mla_convert.source.checkpoint.reader import MemoryReader, Reader, SafetensorsReader
from mla_convert.source.checkpoint.transposed import in_models_shape
from mla_convert.source.checks import (
    MOST_LAYERS,
    check_classes,
    check_derived,
    check_layers,
    check_names,
    check_scaling,
    check_tensors,
    check_width,
    first_token_notes,
    has_key_norm,
    makes_sense,
    refuse_audio,
    rotary_dims,
    settle_ties,
)
from mla_convert.source.config_file import read_config
from mla_convert.source.families import FAMILIES, WHOLES, Family, family_of_part, find_family, is_installed
from mla_convert.source.licence import read_licence
from mla_convert.source.place import HUB_FILES, locate
from mla_convert.source.shape import (
    AttentionShape,
    attention_layers,
    converted_layers,
    head_width,
    kv_heads,
    layer_heads,
)
from mla_convert.source.tokenizer import read_tokenizer
from mla_convert.source.whole import Whole, open_whole, part_config, part_type


@dataclass(frozen=True)
class Source:
    """An opened source. `name` identifies it in reports and never contains a local path."""

    name: str
    revision: str | None
    folder: Path
    gguf: str | None
    config: PreTrainedConfig
    family: Family
    reader: Reader
    notes: tuple[str, ...] = ()
    rotary: int = 0
    """Dims of a head that RoPE rotates."""
    normed: bool = False
    """Whether there is a norm between the key projection and attention."""
    whole: Whole | None = None
    """The multimodal model that is converted in place, if the source is its language model."""

    @property
    def shape(self) -> AttentionShape:
        """Shape of the attention, from the configuration and the tensors present."""
        config, family = self.config, self.family
        heads = config.num_attention_heads
        head_dim = head_width(config)
        return AttentionShape(
            layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            num_heads=heads,
            num_kv_heads=kv_heads(config),
            head_dim=head_dim,
            has_kv_bias=self.has_bias("k") or self.has_bias("v"),
            rotary_dim=self.rotary if family.rotary else 0,
            rope_layers=family.layers_with_rope(config),
            normed=self.normed,
            converted=family.converted_layers(config),
            heads=layer_heads(config, family),
            latent_of=family.latent_of(config),
        )

    @property
    def weights_after_rope(self) -> bool:
        """Whether norms of queries and keys with weights follow RoPE."""
        return self.family.norm_after_rope and self._has(f"{self.family.k_norm}.weight")

    @property
    def model_type(self) -> str:
        """Model type of what is converted: of the whole, where the language model is converted in place."""
        return (self.whole or self).config.model_type

    @property
    def first_layer(self) -> str:
        """Prefix of the names of the first converted layer's tensors."""
        return f"{self.family.layers}.{converted_layers(self.config)[0]}."

    def _has(self, start: str) -> bool:
        """Whether the first converted layer's attention has a tensor whose name begins with `start`."""
        start = f"{self.first_layer}{self.family.attention}.{start}"
        return any(name.startswith(start) for name in self.names)

    def is_replaced(self, name: str) -> bool:
        """Whether a tensor belongs to an attention that the conversion replaces."""
        return bool(self._replaced.match(name))

    @cached_property
    def _replaced(self) -> re.Pattern[str]:
        layers = "|".join(map(str, attention_layers(self.config)))
        return re.compile(rf"{re.escape(self.family.layers)}\.(?:{layers})\.{re.escape(self.family.attention)}\.")

    def has_bias(self, letter: str) -> bool:
        """Whether the projection for "q", "k", "v" or "o" has a bias."""
        return self._has(f"{self.family.projections[letter]}.bias")

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self.reader.names())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the source's attention weights are stored in; bfloat16 for GGUF's quantised blocks."""
        if self.gguf:
            return torch.bfloat16
        projection = self.family.projections["q"]
        return self.reader.dtype(f"{self.first_layer}{self.family.attention}.{projection}.weight")

    @property
    def sliding_windows(self) -> list[int | None]:
        """The attention window of each layer that has a cache in tokens; None for full attention."""
        layers, window = self.config.num_hidden_layers, getattr(self.config, "sliding_window", None)
        types = (
            getattr(self.config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * layers
        )
        # a token in a chunk sees no token before it, so that the chunk's length bounds the cache as a window does
        windows = {"sliding_attention": window, "chunked_attention": getattr(self.config, "attention_chunk_size", None)}
        return [windows.get(types[index]) for index in converted_layers(self.config)]

    def tokenizer(self) -> Any:
        """The source's tokenizer.

        Raises:
            InputError: it has none that transformers can read.
        """
        return read_tokenizer(self.folder, self.name, self.gguf, self.config.model_type)

    def license(self) -> dict[str, Any]:
        """Licence fields of the source's model card: `license`, and `license_name` and `license_link` if present.

        `license` is None without a card, or if the card has no licence that can be copied.
        """
        return read_licence(self.folder)

    def fingerprint(self) -> list[Any]:
        """Identity of weights and configuration: names, sizes and modification times of their files."""
        files = sorted(self.folder.glob("*.safetensors"))
        if self.gguf:  # a file may have a part's name and be whole
            files = [part for part in gguf_parts(self.folder / self.gguf) if part.is_file()]
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return [self.name, self.revision, stats, self.config.to_json_string()]

    def copied_files(self) -> list[Path]:
        """Tokenizer, generation and licence files to copy into the converted folder.

        Raises:
            InputError: one of them is a link to a place outside the folder.
        """
        if self.gguf:
            return []
        files = carried_files(self.folder)
        if (self.folder.parent / "__init__.py").exists():  # a packaged checkpoint: its licence is beside it
            files += licence_files(self.folder.parent)
        return sorted(files)

    def generation_config(self) -> GenerationConfig:
        """Generation defaults, as transformers reads them: from generation_config.json, else from the configuration.

        Configuration classes drop sampling settings; those in config.json or in a GGUF file's metadata are read from the file.

        Raises:
            InputError: the settings cannot be read.
        """
        if self.gguf:
            settings = GenerationConfig.from_model_config(self.config)
            settings.update(**sampling(read_gguf(self.folder / self.gguf)))
            return settings
        has_file = (self.folder / GENERATION).exists()
        try:
            if has_file:
                check_inside(self.folder / GENERATION)
                return GenerationConfig.from_pretrained(self.folder)
            return GenerationConfig.from_pretrained(
                self.folder, config_file_name="config.json", _from_model_config=True
            )
        except (MlaConvertError, MemoryError):
            raise
        except Exception as error:  # no list of the errors that foreign settings cause is complete
            file = GENERATION if has_file else "config.json"
            raise InputError(f"sampling settings in {file} of {self.name} cannot be read: {one_line(error)}") from error


def open_source(name: str, revision: str | None = None, weights: bool = True) -> Source:
    """Open a source lazily: read the configuration and the headers of the weights, no weights.

    Args:
        name: a folder, a Hub id, a GGUF file or "demo".
        revision: branch, tag or commit on the Hub.
        weights: if False, read only the configuration (from the Hub: config.json; of a GGUF file: its metadata) and compare
            it with the headers of local weights, if there are any. The reader then gives the tensors that the configuration
            requires, on the meta device.

    Raises:
        InputError: not found, not a checkpoint, architecture not supported, files missing or damaged.
        ResourceError: the Hub cannot be reached.
    """
    if revision and Path(name).exists():
        raise UsageError(f"--revision is for a model on the Hub, and {name} is on the disk: leave it out")
    place = locate(name, revision, HUB_FILES if weights else ["config.json"])
    if place.gguf:
        return _open_gguf(place.folder / place.gguf, weights)
    return _open_folder(place.folder, place.label, place.revision, weights)


def _open_folder(folder: Path, label: str, revision: str | None, weights: bool) -> Source:
    refuse_adapter(folder, label)
    content = read_config(folder, label)
    model_type = str(content.get("model_type", "none given"))
    # of a multimodal checkpoint, the language model is read if its family is supported
    inner = part_type(content)
    read_as = family_of_part(model_type, inner)
    part = read_as in FAMILIES and is_installed(read_as)
    family = FAMILIES[read_as] if part else find_family(model_type, content.keys(), inner)
    refuse_audio(content, label)
    in_place = part and model_type in WHOLES and not (family.softcap or family.sinks)
    notes = (
        [f"{label} is multimodal ({model_type}): only its language model is converted"] if part and not in_place else []
    )
    if in_place:
        notes.append(
            f"{label} is multimodal ({model_type}): its language model is converted, its other parts stay as they are"
        )
    with makes_sense(label):
        config = _read_config(folder, label, part)
        quantization = take_quantization(config, label)
        family.check(config, label)
        # Of a Hub id only config.json was fetched, unless its weights are wanted.
        here = weights or (revision is None and any((folder / name).is_file() for name in (SINGLE, INDEX)))
        stored = SafetensorsReader(folder) if here else None
        if stored:
            check_layers(config.num_hidden_layers, stored.names(), family, label)
        expected = _expected(
            config, label
        )  # refuses a configuration that describes no model, before any weight is read
        notes += check_classes(content, expected.model, label, part)
        # `check_derived` takes a source. Until stored tensors are compared, its reader gives the required ones.
        source = Source(
            label, revision, folder, None, config, family, expected, tuple(notes), expected.rotary, expected.normed
        )
        check_derived(source)
    if stored:
        complete = _with_weights(source, stored, expected, quantization, part, weights)
        if in_place:
            complete = replace(complete, reader=in_models_shape(complete.reader, expected, inner))
            with makes_sense(label):
                whole = load_config(folder, label)
                take_quantization(whole, label)
                # The weights may have shown that the head is not tied.
                whole.tie_word_embeddings = source.config.tie_word_embeddings
                numbers: Reader = DequantisedReader(stored, quantization) if quantization else stored
                complete = replace(complete, whole=open_whole(whole, numbers, family, label))
        return complete if weights else replace(source, notes=complete.notes, whole=complete.whole)
    return source


def _with_weights(
    source: Source,
    stored: SafetensorsReader,
    expected: _Expected,
    quantization: dict[str, Any] | None,
    part: bool,
    compare: bool,
) -> Source:
    """The source with the reader of its tensors, after a check that they are those that its configuration requires.

    Only headers are read, and with `compare` the values of tied tensors that are stored twice.
    """
    notes = [*source.notes, *stored.notes]
    numbers: Reader = DequantisedReader(stored, quantization) if quantization else stored
    # Tied names as well: the checkpoint may store either of the two.
    reader = ModelReader(numbers, {*expected.names(), *expected.tied}, source.family)
    tied, more = settle_ties(reader, expected.tied, source.name, compare)
    notes += more
    if not tied:
        source.config.tie_word_embeddings = False
        # An untied head is a tensor of its own, which the first model did not require.
        expected = _expected(source.config, source.name)
    notes += check_tensors(reader, expected.names(), source.name, part)
    return replace(source, reader=reader, notes=tuple(notes))


class _Expected(MemoryReader):
    """The tensors that a configuration requires, on the meta device, without a tied head.

    `model`: name of its transformers class; `rotary`: dims of a head that RoPE rotates; `normed`: there is a norm between the
    key projection and attention; `tied`: parameter -> the parameter that it is tied to.
    """

    def __init__(self, model: PreTrainedModel, rotary: int):
        """Take the tensors of `model`, which is on the meta device."""
        super().__init__(parameters(model))
        self.model = type(model).__name__
        self.rotary = rotary
        self.normed = has_key_norm(model, FAMILIES[model.config.model_type])
        self.tied: dict[str, str] = dict(model.all_tied_weights_keys) if model.config.tie_word_embeddings else {}


def _expected(config: PreTrainedConfig, label: str) -> _Expected:
    """The tensors that a configuration requires, in its dtype."""
    # On the meta device a model of any size is built without memory for its weights.
    with makes_sense(label), init_empty_weights(include_buffers=True):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
        check_scaling(model, label)
        check_names(model, FAMILIES[config.model_type])
        check_width(model, label)
        return _Expected(model, rotary_dims(model, FAMILIES[config.model_type], label))


def parameters(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A causal language model's parameters and floating-point persistent buffers, by name, without a tied head.

    Of the stock models, Apertus has such buffers, in its activation.
    """
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    buffers = {name for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    named |= {name: tensor for name, tensor in model.state_dict().items() if name in buffers}
    if model.config.tie_word_embeddings:
        for name in model.all_tied_weights_keys:
            named.pop(name, None)
    return named


def _open_gguf(path: Path, weights: bool) -> Source:
    def check(config: PreTrainedConfig) -> None:
        find_family(config.model_type).check(config, path.name)

    opened = open_gguf(path, check)
    config, notes = opened.config, tuple(opened.notes)
    if weights:  # transformers takes seconds to read a large vocabulary, which nothing but a conversion needs
        notes += first_token_notes(path, opened.file.metadata, config.model_type)
    with makes_sense(path.name):
        _check_sizes(config, path.name)
        expected = _expected(config, path.name)
        family = find_family(config.model_type)
        source = Source(
            path.name, None, path.parent, path.name, config, family, expected, notes, expected.rotary, expected.normed
        )
        check_derived(source)
    sampling(opened.file)  # refuse unusable settings before the conversion, not after it
    return replace(source, reader=opened.reader) if weights else source


def load_config(folder: Path, label: str) -> PreTrainedConfig:
    """The configuration of a transformers folder, by an installed class: no code from the folder is run.

    Nor is code run that it names, such as an attention implementation from the Hub.

    Raises:
        InputError: missing, damaged or not valid.
    """
    read_config(folder, label)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
            if part is not None and part._attn_implementation not in (None, "eager", "sdpa"):
                part._attn_implementation = None
            if part is not None:
                part._experts_implementation = None
        return config
    except MemoryError:
        raise
    except Exception as error:  # also the errors of the strict configuration classes, which share no public base
        raise InputError(f"configuration of {label} cannot be read: {one_line(error)}") from error


def _read_config(folder: Path, label: str, part: bool) -> PreTrainedConfig:
    """The configuration in a folder, or the `part` of it that describes the language model."""
    whole = load_config(folder, label)
    config = part_config(whole) if part else whole
    if part:
        # settings of the whole model apply to its part
        for key in ("quantization_config", "tie_word_embeddings", "dtype"):
            if getattr(whole, key, None) is not None:
                setattr(config, key, getattr(whole, key))
    _check_sizes(config, label)
    return config


def _check_sizes(config: PreTrainedConfig, label: str) -> None:
    """Refuse numbers of layers and heads that no model has."""
    layers, heads, groups = config.num_hidden_layers, config.num_attention_heads, kv_heads(config)
    if not 1 <= layers <= MOST_LAYERS or groups < 1 or heads < 1 or heads % groups:
        raise InputError(
            f"configuration of {label} is not valid: {layers} layers, {heads} query heads, {groups} key/value heads"
        )
