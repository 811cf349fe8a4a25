"""Opens a source (local folder, Hub id, GGUF file or packaged demo): its configuration, tokenizer and weights reader."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from accelerate import init_empty_weights
from gguf import GGUFReader
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from mla_convert.checkpoint.dequantise import DequantisedReader, can_dequantise
from mla_convert.checkpoint.layout import ModelReader
from mla_convert.checkpoint.reader import MemoryReader, Reader, SafetensorsReader
from mla_convert.config import PACKAGE, packaged, unknown_source
from mla_convert.config_file import read_config
from mla_convert.errors import InputError, ResourceError, one_line
from mla_convert.families import FAMILIES, Family, find_family
from mla_convert.plan import AttentionShape
from mla_convert.tokenizer import read_tokenizer
from mla_convert.words import check_name, expanded, plain

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*", "NOTICE*"]
# What is carried over as it is; weights, indices and anything executable are not.
COPIED = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
          "generation_config.json", "*.model", "LICENSE*", "NOTICE*", "ATTRIBUTION*")  # fmt: skip


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

    @property
    def shape(self) -> AttentionShape:
        """Shape of the attention, from the configuration and the tensors present."""
        config, family = self.config, self.family
        heads = config.num_attention_heads
        head_dim = head_width(config)
        rope = getattr(config, "rope_parameters", None) or {}
        layers = range(config.num_hidden_layers)
        has_rope = tuple(bool(on) for on in getattr(config, family.rope_layers)) if family.rope_layers else ()
        if family.rope_layer_type:
            has_rope = tuple(kind == family.rope_layer_type for kind in config.layer_types)
        return AttentionShape(
            layers=len(layers),
            hidden_size=config.hidden_size,
            num_heads=heads,
            num_kv_heads=kv_heads(config),
            head_dim=head_dim,
            has_kv_bias=self.has_bias("k") or self.has_bias("v"),
            rotary_dim=int(head_dim * rope.get("partial_rotary_factor", 1.0)) if family.rotary else 0,
            rope_layers=has_rope if not all(has_rope) else None,
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

        Nothing is made up: without a card, or a licence in it, `license` is None.
        """
        try:
            data = ModelCard.load(self.folder / "README.md").data.to_dict()
        except (OSError, ValueError, yaml.YAMLError):
            data = {}
        found = {key: data[key] for key in ("license_name", "license_link") if isinstance(data.get(key), str)}
        named = data.get("license")
        return {"license": named if isinstance(named, str | list) else None, **found}

    def fingerprint(self) -> list[Any]:
        """What changes when the weights or the configuration do: names, sizes and times of the files they come from."""
        files = [self.folder / self.gguf] if self.gguf else sorted(self.folder.glob("*.safetensors"))
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return [self.name, self.revision, stats, self.config.to_json_string()]

    def copied_files(self) -> list[Path]:
        """Tokenizer, generation and licence files that are carried over as they are."""
        if self.gguf:
            return []
        found = {path for pattern in COPIED for path in self.folder.glob(pattern) if path.is_file()}
        if (self.folder.parent / "__init__.py").exists():  # a packaged checkpoint: its licence stands beside it
            found |= {path for pattern in ("LICENSE*", "ATTRIBUTION*") for path in self.folder.parent.glob(pattern)}
        return sorted(found)

    def generation_config(self) -> GenerationConfig:
        """Generation defaults where the source has no file of its own."""
        return GenerationConfig.from_model_config(self.config)


def open_source(name: str, revision: str | None = None, weights: bool = True) -> Source:
    """Open a source lazily: configuration and tensor headers are read, no weights (GGUF files excepted).

    Without `weights` only its configuration is read (from the Hub: config.json alone; of a GGUF file: its metadata).
    Its tensors are then those that the configuration asks for, on the meta device.

    Raises:
        InputError: not found, not a checkpoint, architecture not supported, files missing or damaged.
        ResourceError: the Hub cannot be reached.
    """
    place = locate(name, revision, HUB_FILES if weights else ["config.json"])
    if place.gguf:
        return _open_gguf(place.folder / place.gguf, weights)
    return _open_folder(place.folder, place.label, place.revision, weights)


@dataclass(frozen=True)
class Place:
    """Where a model's files lie on this machine. `label` names it in reports; `gguf` is the file, if it is one."""

    folder: Path
    label: str
    revision: str | None = None
    gguf: str | None = None


def locate(name: str, revision: str | None = None, files: list[str] = HUB_FILES) -> Place:
    """The folder of a packaged checkpoint, a local folder, a `.gguf` file, or a Hub id, of which `files` are fetched.

    Raises:
        InputError: nothing there by that name.
        ResourceError: the Hub cannot be reached.
    """
    if name.startswith(PACKAGE):
        return Place(packaged(name, "checkpoint"), name.removeprefix(PACKAGE).partition("/")[0])
    path = expanded(name)
    if path.suffix == ".gguf" and not path.is_dir():
        if not path.is_file():
            raise InputError(f"{path} not found: give an existing .gguf file")
        return Place(path.parent, plain(path.name), gguf=path.name)
    if path.is_dir():
        check_name(path)
        return Place(path, plain(path.resolve().name))
    if path.exists():
        raise InputError(f"{path} is neither a folder nor a .gguf file: give the folder that holds the checkpoint")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise unknown_source(name)
    folder = _download(name, revision, files)
    return Place(folder, name, folder.name)


def _download(name: str, revision: str | None, files: list[str]) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except GatedRepoError as error:
        raise InputError(
            f"{name} is gated on the Hub: accept its terms there and log in with `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        where = f" at revision {revision}" if revision else ""
        raise InputError(f"{name}{where} is neither a local folder nor on the Hub (or it is private)") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ResourceError(
            f"the Hub cannot be reached for {name}, which is no local folder: {one_line(error)}"
        ) from error


def _open_folder(folder: Path, label: str, revision: str | None, weights: bool) -> Source:
    content = read_config(folder, label)
    model_type = content.get("model_type", "none given")
    text = content.get("text_config")
    part = text.get("model_type") if isinstance(text, dict) else None
    # of a multimodal checkpoint the language model is read, if it is of a family
    family = FAMILIES[part] if part in FAMILIES else find_family(str(model_type), content.keys())
    config = _read_config(folder, label, part in FAMILIES)
    quantization = _quantization(config, label)
    stored = SafetensorsReader(folder) if weights else None
    if stored and quantization:
        stored = DequantisedReader(stored, quantization)
    family.check(config, label)
    if stored:
        _check_layers(config, stored.names(), family, label)
    expected = _expected(config, label)  # refuses a configuration that makes no model, before any weight is read
    reader = ModelReader(stored, expected.names(), family) if stored else expected
    notes = (f"{label} is multimodal ({model_type}): only its language model is converted",) if part in FAMILIES else ()
    return Source(label, revision, folder, None, config, family, reader, notes)


def _check_layers(config: PreTrainedConfig, names: list[str], family: Family, label: str) -> None:
    """Refuse a configuration with more layers than there are weights for, before a model of so many is built.

    Raises:
        InputError: names the first layer that is missing.
    """
    place = re.compile(rf"(?:^|\.){re.escape(family.layers.rpartition('.')[2])}\.(\d{{1,9}})\.")
    held = {int(found[1]) for name in names if (found := place.search(name))}
    if held and config.num_hidden_layers > max(held) + 1:
        raise InputError(
            f"tensor {family.layers}.{max(held) + 1}.* is missing from {label}: its configuration says "
            f"{config.num_hidden_layers} layers and its weights have {max(held) + 1}: they do not belong together"
        )


def _quantization(config: PreTrainedConfig, label: str) -> dict[str, Any] | None:
    """How a checkpoint is quantised, taken out of its configuration: what is read, and written, is not.

    Raises:
        InputError: in a way that is not read here.
    """
    how = getattr(config, "quantization_config", None)
    if not how:
        return None
    how = dict(how if isinstance(how, dict) else how.to_dict())
    method = how.get("quant_method")
    how["quant_method"] = getattr(method, "value", method)
    if not can_dequantise(how):
        raise InputError(
            f"{label} is quantised ({how['quant_method'] or 'its configuration says how'}): of quantised checkpoints FP8, MXFP4 "
            f"and GGUF are read; give one of these, or the checkpoint that it was made from"
        )
    del config.quantization_config
    return how


def _expected(config: PreTrainedConfig, label: str) -> Reader:
    """The tensors that a configuration asks for, on the meta device, in its dtype; a tied head is not among them."""
    try:
        with init_empty_weights(include_buffers=True):
            model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
        for module in model.modules():
            scale = getattr(module, "scaling", None)
            if isinstance(scale, complex) or (isinstance(scale, float) and not math.isfinite(scale)):
                raise ValueError(f"attention would be scaled by {scale}")
    except Exception as error:  # whatever a setting that makes no sense runs into
        raise InputError(f"configuration of {label} does not make a model: {one_line(error)}") from error
    return MemoryReader(parameters(model))


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A causal language model's parameters by name, without a head that is tied to the embeddings."""
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if model.config.tie_word_embeddings:
        for name in model.all_tied_weights_keys:
            named.pop(name, None)
    return named


def _open_gguf(path: Path, weights: bool) -> Source:
    try:
        if not weights:
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
            _forget_packing(config)
            family = find_family(config.model_type)
            family.check(config, path.name)
            return Source(path.name, None, path.parent, path.name, config, family, _expected(config, path.name))
        # transformers dequantises a GGUF file as a whole: these sources are held in memory
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    except InputError:
        raise
    except Exception as error:  # whatever the numbers of a damaged header run into
        raise InputError(f"{path.name} cannot be read as GGUF: {one_line(error)}") from error
    _forget_packing(model.config)
    family, tensors = find_family(model.config.model_type), parameters(model)
    family.check(model.config, path.name)
    notes = _first_token_notes(path)
    return Source(path.name, None, path.parent, path.name, model.config, family, MemoryReader(tensors), notes)


def _first_token_notes(path: Path) -> tuple[str, ...]:
    """A warning where texts should begin with a token that the tokenizer, as transformers reads it, does not put there.

    transformers 5.17 takes Gemma's vocabulary out of a GGUF file without that token and with half of its merges, silently.
    """
    fields = GGUFReader(path).fields
    wanted, token = (fields.get(f"tokenizer.ggml.{name}") for name in ("add_bos_token", "bos_token_id"))
    if wanted is None or token is None or not wanted.contents():
        return ()
    try:
        first = read_tokenizer(path.parent, path.name, gguf_file=path.name)("")["input_ids"][:1]
    except InputError:
        return ()  # `Source.tokenizer` says so where one is needed
    if first == [token.contents()]:
        return ()
    return (
        f"{path.name} says that a text begins with token {token.contents()}, and its tokenizer as transformers "
        f"{transformers.__version__} reads it does not put it there: if perplexity before conversion is high, try a newer "
        f"transformers or the checkpoint that the file was made from",
    )


def _forget_packing(config: PreTrainedConfig) -> None:
    """Take out of a configuration that its weights came packed in a GGUF file: what is read, and written, is not."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config


def load_config(folder: Path, label: str) -> PreTrainedConfig:
    """The configuration of a transformers folder, by a class that is installed: never by code from the folder.

    Raises:
        InputError: missing, damaged or not valid.
    """
    read_config(folder, label)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a setting that makes no sense runs into, errors of no public base among it
        raise InputError(f"configuration of {label} is not valid: {one_line(error)}") from error


def head_width(config: PreTrainedConfig) -> int:
    """Dims of a head: the stream's share of one where a family knows no other number."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_heads(config: PreTrainedConfig) -> int:
    """Heads of keys and values: as many as query heads where a family knows no other number."""
    groups = getattr(config, "num_key_value_heads", None)
    return config.num_attention_heads if groups is None else groups


def _read_config(folder: Path, label: str, part: bool) -> PreTrainedConfig:
    """The configuration in a folder, or the `part` of it that describes the language model."""
    whole = load_config(folder, label)
    config = whole.text_config if part else whole
    if part:
        # what is said of the whole holds for its part
        for key in ("quantization_config", "tie_word_embeddings", "dtype"):
            if getattr(whole, key, None) is not None:
                setattr(config, key, getattr(whole, key))
    groups = kv_heads(config)
    if config.num_hidden_layers < 1 or groups < 1 or config.num_attention_heads % groups:
        raise InputError(
            f"configuration of {label} is not valid: {config.num_hidden_layers} layers, {config.num_attention_heads} "
            f"query heads, {groups} key/value heads"
        )
    return config
