"""Loads whole models through transformers, to measure them: converted or not, and never with code from their folder."""

from __future__ import annotations

import contextlib
import struct
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging

from mla_convert.core.errors import InputError, ResourceError, one_line
from mla_convert.core.report_file import look_up
from mla_convert.core.report_schema import JsonObject, Report
from mla_convert.core.settings import PACKAGE, find_recipe, recipe_files
from mla_convert.core.words import expanded
from mla_convert.source.checkpoint.files import refuse_adapter, weight_files
from mla_convert.source.checkpoint.gguf_model import open_gguf
from mla_convert.source.families import FAMILIES
from mla_convert.source.place import SourceLocation, locate
from mla_convert.source.source import load_config
from mla_convert.source.tokenizer import read_tokenizer

PREFIX = "mla_"  # of a converted model's model_type
EXPORTED = "mla_convert"  # key of an exported model's config.json


def find_model(name: str, revision: str | None = None) -> SourceLocation:
    """Where the model of that name lies: a folder, `.gguf` file, Hub id (which is fetched) or recipe (its source).

    Raises:
        InputError: nothing there by that name, or a folder that is no checkpoint.
        ResourceError: the Hub cannot be reached.
    """
    recipe = None if expanded(name).exists() else find_recipe(name)
    place = locate(recipe.source, recipe.revision) if recipe else locate(name, revision)
    refuse_adapter(place.folder, place.label)
    if place.gguf:
        return place
    if not (place.folder / "config.json").is_file():
        raise InputError(f"{place.label} has no config.json: give a folder that holds a transformers checkpoint")
    weight_files(place.folder)  # refuses pickles, which transformers would read where an index names them
    return place


def find_original(report: Report | JsonObject) -> SourceLocation | None:
    """The original that a report names, if it can be found from here: on the Hub, packaged, or in the working folder.

    Reports hold names, not paths, so a folder of that name counts only if it is a model of the same type.
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


def model_config(place: SourceLocation) -> PreTrainedConfig:
    """The model's configuration; that of a GGUF file is made of its metadata.

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
    gguf = {"gguf_file": place.gguf} if place.gguf else {}
    return read_tokenizer(place.folder, place.label, **gguf)


def load_model(place: SourceLocation, dtype: str | torch.dtype, device: torch.device) -> torch.nn.Module:
    """The causal language model on `device`, in `dtype` ("auto": as stored; GGUF: float32).

    Raises:
        InputError: its weights are missing, damaged, of other shapes than its configuration says, or pickled.
    """
    if place.gguf:
        with quietly():
            model = open_gguf(place.folder / place.gguf).load(torch.float32 if dtype == "auto" else dtype)
        return _ready(model, device)
    config = model_config(place)
    exported = getattr(config, EXPORTED, None)
    if isinstance(exported, dict) and exported.get("profile") != "portable":
        raise InputError(
            f"{place.label} is exported for engines (profile {exported.get('profile')}), and transformers' own classes would "
            f"misread it: give the converted model that it was made from"
        )
    weight_files(place.folder)  # as find_model does, for those who know the folder already
    with _readable(place.label), quietly():
        model, info = AutoModelForCausalLM.from_pretrained(
            place.folder, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=False,
            use_safetensors=True, trust_remote_code=False,
        )  # fmt: skip
    # transformers makes up what it does not find, and says so only in its log
    if info["missing_keys"]:
        raise InputError(
            f"tensor {min(info['missing_keys'])} is missing from {place.label}: fetch the checkpoint again"
        )
    return _ready(model, device)


def _ready(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The model to measure, frozen, with all of its attention."""
    family = FAMILIES.get(model.config.model_type)
    if family and (family.softcap or family.sinks):
        model.set_attn_implementation("eager")  # not every version says that SDPA leaves them out
    return model.eval().requires_grad_(False).to(device)


@contextlib.contextmanager
def quietly():
    """Without transformers' progress bars and advice: what to show is the caller's choice."""
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(max(level, logging.ERROR))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _readable(label: str):
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, RuntimeError, SafetensorError,
            struct.error) as error:  # fmt: skip
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise InputError(f"{label} cannot be loaded: {one_line(error)}") from error
