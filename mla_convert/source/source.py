"""Opens a source (local folder, Hub id, GGUF file or packaged demo): its configuration, tokenizer and weights reader."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from mla_convert.core.errors import InputError, MlaConvertError, one_line
from mla_convert.source.carried import GENERATION, carried_files, check_inside, licence_files
from mla_convert.source.checkpoint.dequantise import DequantisedReader, take_quantization
from mla_convert.source.checkpoint.files import INDEX, SINGLE, refuse_adapter
from mla_convert.source.checkpoint.gguf_config import sampling
from mla_convert.source.checkpoint.gguf_file import gguf_parts, read_gguf
from mla_convert.source.checkpoint.gguf_model import open_gguf
from mla_convert.source.checkpoint.layout import ModelReader
from mla_convert.source.checkpoint.reader import MemoryReader, Reader, SafetensorsReader
from mla_convert.source.checks import (
    MOST_LAYERS,
    check_classes,
    check_derived,
    check_layers,
    check_scaling,
    check_tensors,
    check_width,
    first_token_notes,
    makes_sense,
    refuse_audio,
    rotary_dims,
    settle_ties,
)
from mla_convert.source.config_file import read_config
from mla_convert.source.families import FAMILIES, Family, find_family
from mla_convert.source.licence import read_licence
from mla_convert.source.place import HUB_FILES, locate
from mla_convert.source.shape import AttentionShape, head_width, kv_heads
from mla_convert.source.tokenizer import read_tokenizer


@dataclass(frozen=True)
class Source:
    """An opened source. `name` identifies it in reports and never holds a local path."""

    name: str
    revision: str | None
    folder: Path
    gguf: str | None
    config: PreTrainedConfig
    family: Family
    reader: Reader
    notes: tuple[str, ...] = ()
    rotary: int = 0
    """Dims of a head that RoPE turns."""

    @property
    def shape(self) -> AttentionShape:
        """Shape of the attention, from the configuration and the tensors present."""
        config, family = self.config, self.family
        heads = config.num_attention_heads
        head_dim = head_width(config)
        layers = range(config.num_hidden_layers)
        return AttentionShape(
            layers=len(layers),
            hidden_size=config.hidden_size,
            num_heads=heads,
            num_kv_heads=kv_heads(config),
            head_dim=head_dim,
            has_kv_bias=self.has_bias("k") or self.has_bias("v"),
            rotary_dim=self.rotary if family.rotary else 0,
            rope_layers=family.layers_with_rope(config),
            normed=self._has(f"{family.k_norm}."),
        )

    def _has(self, start: str) -> bool:
        """Whether the first layer's attention has a tensor whose name starts so."""
        return any(name.startswith(f"{self.family.layers}.0.{self.family.attention}.{start}") for name in self.names)

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
        return self.reader.dtype(f"{self.family.layers}.0.{self.family.attention}.{projection}.weight")

    @property
    def sliding_windows(self) -> list[int | None]:
        """Each layer's attention window, None where it sees everything."""
        layers, window = self.config.num_hidden_layers, getattr(self.config, "sliding_window", None)
        types = (
            getattr(self.config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * layers
        )
        return [window if kind == "sliding_attention" else None for kind in types]

    def tokenizer(self) -> Any:
        """The source's tokenizer.

        Raises:
            InputError: it has none that transformers can read.
        """
        return read_tokenizer(self.folder, self.name, **({"gguf_file": self.gguf} if self.gguf else {}))

    def license(self) -> dict[str, Any]:
        """What the source's model card says of its licence: `license`, and `license_name` and `license_link` if it does.

        Nothing is made up: without a card, or a licence in it that can be carried over, `license` is None.
        """
        return read_licence(self.folder)

    def fingerprint(self) -> list[Any]:
        """What changes when the weights or the configuration do: names, sizes and times of the files they come from."""
        files = gguf_parts(self.folder / self.gguf) if self.gguf else sorted(self.folder.glob("*.safetensors"))
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return [self.name, self.revision, stats, self.config.to_json_string()]

    def copied_files(self) -> list[Path]:
        """Tokenizer, generation and licence files that are carried over.

        Raises:
            InputError: one of them is a link to something outside the folder.
        """
        if self.gguf:
            return []
        found = carried_files(self.folder)
        if (self.folder.parent / "__init__.py").exists():  # a packaged checkpoint: its licence stands beside it
            found += licence_files(self.folder.parent)
        return sorted(found)

    def generation_config(self) -> GenerationConfig:
        """Generation defaults: its own file's, or from its configuration, as transformers has them.

        Configurations take up no sampling settings, so those in config.json, or a GGUF file's metadata, are read from there.
        """
        if self.gguf:
            found = GenerationConfig.from_model_config(self.config)
            found.update(**sampling(read_gguf(self.folder / self.gguf)))
            return found
        own = (self.folder / GENERATION).exists()
        try:
            if own:
                check_inside(self.folder / GENERATION)
                return GenerationConfig.from_pretrained(self.folder)
            return GenerationConfig.from_pretrained(
                self.folder, config_file_name="config.json", _from_model_config=True
            )
        except (MlaConvertError, MemoryError):
            raise
        except Exception as error:  # settings of others: no list of what they may run into is complete
            file = GENERATION if own else "config.json"
            raise InputError(f"sampling settings in {file} of {self.name} cannot be read: {one_line(error)}") from error


def open_source(name: str, revision: str | None = None, weights: bool = True) -> Source:
    """Open a source lazily: configuration and tensor headers are read, no weights (GGUF files excepted).

    Without `weights` only its configuration is read (from the Hub: config.json alone; of a GGUF file: its metadata), and
    compared with the headers of weights that lie beside it. Its tensors are then those that the configuration asks for, on
    the meta device.

    Raises:
        InputError: not found, not a checkpoint, architecture not supported, files missing or damaged.
        ResourceError: the Hub cannot be reached.
    """
    place = locate(name, revision, HUB_FILES if weights else ["config.json"])
    if place.gguf:
        return _open_gguf(place.folder / place.gguf, weights)
    return _open_folder(place.folder, place.label, place.revision, weights)


def _open_folder(folder: Path, label: str, revision: str | None, weights: bool) -> Source:
    refuse_adapter(folder, label)
    content = read_config(folder, label)
    model_type, text = content.get("model_type", "none given"), content.get("text_config")
    part = isinstance(text, dict) and isinstance(text.get("model_type"), str) and text["model_type"] in FAMILIES
    # of a multimodal checkpoint the language model is read, if it is of a family
    family = FAMILIES[text["model_type"]] if part else find_family(str(model_type), content.keys())
    refuse_audio(content, label)
    notes = [f"{label} is multimodal ({model_type}): only its language model is converted"] if part else []
    with makes_sense(label):
        config = _read_config(folder, label, part)
        quantization = take_quantization(config, label)
        family.check(config, label)
        here = weights or (revision is None and any((folder / name).is_file() for name in (SINGLE, INDEX)))
        stored = SafetensorsReader(folder) if here else None
        if stored:
            check_layers(config.num_hidden_layers, stored.names(), family, label)
        expected = _expected(config, label)  # refuses a configuration that makes no model, before any weight is read
        notes += check_classes(content, expected.model, label, part)
        source = Source(label, revision, folder, None, config, family, expected, tuple(notes), expected.rotary)
        check_derived(source)
    if stored:
        found = _with_weights(source, stored, expected, quantization, part, weights)
        return found if weights else replace(source, notes=found.notes)
    return source


def _with_weights(
    source: Source,
    stored: SafetensorsReader,
    expected: _Expected,
    quantization: dict[str, Any] | None,
    part: bool,
    compare: bool,
) -> Source:
    """The source with the reader of its tensors, which are checked to be all that its configuration asks for.

    Headers are read; and with `compare` the values of tied tensors that are stored twice.
    """
    notes = [*source.notes, *stored.notes]
    numbers: Reader = DequantisedReader(stored, quantization) if quantization else stored
    reader = ModelReader(numbers, {*expected.names(), *expected.tied}, source.family)
    tied, more = settle_ties(reader, expected.tied, source.name, compare)
    notes += more
    if not tied:
        source.config.tie_word_embeddings = False
        expected = _expected(source.config, source.name)
    notes += check_tensors(reader, expected.names(), source.name, part)
    return replace(source, reader=reader, notes=tuple(notes))


class _Expected(MemoryReader):
    """The tensors that a configuration asks for, on the meta device; a tied head is not among them.

    `model` is the class that it makes, `rotary` counts the dims of a head that it turns, `tied` has the parameters that are
    others' as well: name -> the other's name.
    """

    def __init__(self, model: torch.nn.Module, rotary: int):
        super().__init__(parameters(model) | persistent_buffers(model))
        self.model = type(model).__name__
        self.rotary = rotary
        self.tied = dict(model.all_tied_weights_keys) if model.config.tie_word_embeddings else {}


def _expected(config: PreTrainedConfig, label: str) -> _Expected:
    """The tensors that a configuration asks for, in its dtype."""
    with makes_sense(label), init_empty_weights(include_buffers=True):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
        check_scaling(model, label)
        check_width(model, label)
        return _Expected(model, rotary_dims(model, label))


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A causal language model's parameters by name, without a head that is tied to the embeddings."""
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if model.config.tie_word_embeddings:
        for name in model.all_tied_weights_keys:
            named.pop(name, None)
    return named


def persistent_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A model's buffers that checkpoints hold, by name: of stock models, Apertus's activation has some."""
    buffers = dict(model.named_buffers())
    return {name: tensor for name, tensor in model.state_dict().items() if name in buffers}


def _open_gguf(path: Path, weights: bool) -> Source:
    def check(config: PreTrainedConfig) -> None:
        find_family(config.model_type).check(config, path.name)

    found = open_gguf(path, check)
    config, notes = found.config, (*found.notes, *first_token_notes(path, found.file.metadata))
    with makes_sense(path.name):
        _check_sizes(config, path.name)
        expected = _expected(config, path.name)
        family = find_family(config.model_type)
        source = Source(path.name, None, path.parent, path.name, config, family, expected, notes, expected.rotary)
        check_derived(source)
    sampling(found.file)  # refuses before the work what would be refused after it
    # transformers dequantises a GGUF file as a whole: these sources are held in memory
    if not weights:
        return source
    model = found.load()
    return replace(source, reader=MemoryReader(parameters(model) | persistent_buffers(model)))


def load_config(folder: Path, label: str) -> PreTrainedConfig:
    """The configuration of a transformers folder, by a class that is installed: never by code from the folder.

    Nor by code that it names: an implementation of attention may be one from the Hub.

    Raises:
        InputError: missing, damaged or not valid.
    """
    read_config(folder, label)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        for own in (config, *(getattr(config, name, None) for name in config.sub_configs)):
            if own is not None and own._attn_implementation not in (None, "eager", "sdpa"):
                own._attn_implementation = None
            if own is not None:
                own._experts_implementation = None
        return config
    except MemoryError:
        raise
    except Exception as error:  # settings of any kind, and the strict classes' own errors, which share no public base
        raise InputError(f"configuration of {label} cannot be read: {one_line(error)}") from error


def _read_config(folder: Path, label: str, part: bool) -> PreTrainedConfig:
    """The configuration in a folder, or the `part` of it that describes the language model."""
    whole = load_config(folder, label)
    config = whole.text_config if part else whole
    if part:
        # what is said of the whole holds for its part
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
