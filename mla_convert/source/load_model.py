"""Loads complete models by transformers, to measure them; code from their folder is never run."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from mla_convert.core.errors import InputError, ResourceError, one_line
from mla_convert.core.recipes import find_recipe, recipe_files
from mla_convert.core.report_file import look_up
from mla_convert.core.report_schema import JsonObject, Report
from mla_convert.core.settings import PACKAGE
from mla_convert.core.words import expanded
from mla_convert.source.checkpoint.files import refuse_adapter, weight_files
from mla_convert.source.checkpoint.gguf_model import open_gguf
from mla_convert.source.families import FAMILIES, WHOLES
from mla_convert.source.place import SourceLocation, locate
from mla_convert.source.quiet import quietly
from mla_convert.source.source import load_config
from mla_convert.source.tokenizer import read_tokenizer

PREFIX = "mla_"  # a converted model's model_type begins with it
EXPORTED = "mla_convert"  # key in the config.json of an exported model


def find_model(name: str, revision: str | None = None) -> SourceLocation:
    """Find the model of that name: a folder, a `.gguf` file, a Hub id (which is downloaded) or a recipe (its source).

    Raises:
        InputError: there is no model of that name, or the folder is no checkpoint.
        ResourceError: the Hub cannot be reached.
    """
    # A folder or file of a recipe's name goes before the recipe.
    recipe = None if expanded(name).exists() else find_recipe(name)
    place = locate(recipe.source, recipe.revision) if recipe else locate(name, revision)
    refuse_adapter(place.folder, place.label)
    if place.gguf:
        return place
    if not (place.folder / "config.json").is_file():
        raise InputError(f"{place.label} has no config.json: give a folder that holds a transformers checkpoint")
    weight_files(place.folder)  # refuses pickles, which transformers reads if an index names them
    return place


def find_original(report: Report | JsonObject) -> SourceLocation | None:
    """The original that a report names, if it can be found: on the Hub, in a package, or in the working folder.

    Reports contain names, not paths, so a folder of that name is accepted only if its model type is the same.
    """
    name, revision = look_up(report, "source.name"), look_up(report, "source.revision")
    if not isinstance(name, str) or not name:
        return None
    for path in recipe_files():  # a recipe's packaged model is named after its package
        recipe = find_recipe(path)
        if recipe and recipe.source.startswith(f"{PACKAGE}{name}/"):
            return find_model(recipe.source)
    if not revision and not Path(name).exists():
        return None
    with contextlib.suppress(InputError, ResourceError):
        place = find_model(name, revision if isinstance(revision, str) else None)
        if place.gguf or model_config(place).model_type == look_up(report, "source.model_type"):
            return place
    return None


def check_same_sizes(original: PreTrainedConfig, converted: PreTrainedConfig, label: str) -> None:
    """Refuse a model that a converted one cannot come from.

    Args:
        original: of the model that is given as the original.
        converted: of the converted model.
        label: of the original, for messages.

    Raises:
        InputError: it has other layers, heads, width or vocabulary.
    """
    theirs, ours = original.get_text_config(), converted.get_text_config()
    words = {"num_hidden_layers": "layers", "hidden_size": "wide", "vocab_size": "tokens"}
    heads = {"num_attention_heads": "heads", "num_key_value_heads": "KV heads", "head_dim": "dims in a head"}
    pairs = {word: (getattr(theirs, name, None), getattr(ours, name, None)) for name, word in words.items()}
    # As stored: transformers refuses to read what may be another number in each layer. Not every family states its heads.
    stated = {word: (vars(theirs).get(name), vars(ours).get(name)) for name, word in heads.items()}
    pairs |= {word: pair for word, pair in stated.items() if None not in pair}
    for word, (found, wanted) in pairs.items():
        if found != wanted:
            raise InputError(f"{label} is not the original of this model: {found} {word}, not {wanted}")


def model_config(place: SourceLocation) -> PreTrainedConfig:
    """The model's configuration; of a GGUF file, made from its metadata.

    Raises:
        InputError: it cannot be read.
    """
    if not place.gguf:
        return load_config(place.folder, place.label)
    return open_gguf(place.folder / place.gguf).config


def is_converted(config: PreTrainedConfig) -> bool:
    """Whether a configuration is that of a converted model."""
    return config.model_type.startswith(PREFIX)


def load_tokenizer(place: SourceLocation) -> Any:
    """The model's tokenizer.

    Raises:
        InputError: it has none that transformers can read.
    """
    return read_tokenizer(place.folder, place.label, place.gguf, model_config(place).model_type if place.gguf else "")


def load_model(place: SourceLocation, dtype: str | torch.dtype, device: torch.device) -> PreTrainedModel:
    """The causal language model on `device`, in evaluation mode and without gradients.

    Args:
        place: of the model.
        dtype: of its weights; "auto": the stored one (GGUF: float32).
        device: of its weights.

    Raises:
        InputError: its weights are missing, damaged, pickled, or of other shapes than in its configuration.
    """
    if place.gguf:
        with quietly():
            model = open_gguf(place.folder / place.gguf).load(
                dtype if isinstance(dtype, torch.dtype) else torch.float32
            )
        return _ready(model, device)
    config = model_config(place)
    exported = getattr(config, EXPORTED, None)
    if isinstance(exported, dict) and exported.get("profile") != "portable":
        raise InputError(
            f"{place.label} is exported for engines (profile {exported.get('profile')}), and transformers' own classes would "
            f"misread it: give the converted model that it was made from"
        )
    weight_files(place.folder)  # find_model's check, for callers that did not use it
    with _readable(place.label), quietly():
        auto = AutoModelForImageTextToText if config.model_type in WHOLES else AutoModelForCausalLM
        loaded: Any = auto.from_pretrained(
            place.folder, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=False,
            use_safetensors=True, trust_remote_code=False,
        )  # fmt: skip
    model, info = loaded
    # transformers initialises missing tensors at random, and reports that only in its log
    if info["missing_keys"]:
        raise InputError(
            f"tensor {min(info['missing_keys'])} is missing from {place.label}: fetch the checkpoint again"
        )
    return _ready(model, device)


def _ready(model: Any, device: torch.device) -> PreTrainedModel:
    """The model to measure, frozen, with an attention implementation that supports soft caps and sinks if it has them."""
    family = FAMILIES.get(model.config.model_type)
    if family and (family.softcap or family.sinks):
        model.set_attn_implementation("eager")  # SDPA supports neither, and some versions ignore them silently
    return model.eval().requires_grad_(False).to(device)


@contextlib.contextmanager
def _readable(label: str) -> Iterator[None]:
    """Convert the errors of damaged files and configurations into one line."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, RuntimeError, SafetensorError,
            struct.error) as error:  # fmt: skip
        # torch's error for too little memory is a RuntimeError too, and no fault of the file.
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise InputError(f"{label} cannot be loaded: {one_line(error)}") from error
