"""The files beside the weights in a converted folder: configuration, modeling code and tokenizer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mla_convert.core.files import write_file
from mla_convert.core.runtime import newest_tried
from mla_convert.modeling import configuration_mla
from mla_convert.modeling.shipped_code import write_code
from mla_convert.source.carried import carry
from mla_convert.source.source import Source

# Keys in which older tokenizers store the path that they were loaded from.
PATHS = ("name_or_path", "special_tokens_map_file", "tokenizer_file")


def write_config(config: Any, stock_class: str, folder: Path) -> None:
    """Write config.json and the code that it names.

    Args:
        config: of the converted model; its class names are set here.
        stock_class: name of the transformers class that was converted.
        folder: to write into.
    """
    name = configuration_mla.PREFIX + stock_class
    config.architectures = [name]
    config.get_text_config().mla_transformers = newest_tried()
    whole = config.get_text_config() is not config
    config.auto_map = {
        "AutoConfig": f"configuration_mla.{type(config).__name__}",
        "AutoModelForCausalLM": f"modeling_mla.{name}",
        **({"AutoModelForImageTextToText": f"modeling_mla.{name}"} if whole else {}),
    }
    config.save_pretrained(folder)
    write_code(folder)


def write_tokenizer(source: Source, tokenizer: Any, folder: Path) -> None:
    """Copy the source's tokenizer, generation and licence files, without its code; write new ones for a GGUF file.

    Args:
        source: the original.
        tokenizer: of the source.
        folder: to write into.
    """
    for file in source.copied_files():
        carry(file, folder)
    settings = folder / "tokenizer_config.json"
    if not settings.exists():
        tokenizer.save_pretrained(folder)
    # transformers may choose the class by the source's model type, which the converted model does not have
    content = json.loads(settings.read_text(encoding="utf-8"))
    paths = {key for key in PATHS if isinstance(content.get(key), str) and os.path.isabs(content[key])}
    if content.get("tokenizer_class") != type(tokenizer).__name__ or paths:
        content = {key: value for key, value in content.items() if key not in paths}
        content["tokenizer_class"] = type(tokenizer).__name__
        write_file(settings, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    if not (folder / "generation_config.json").exists():
        # not by save_pretrained, which refuses contradictory settings although transformers loads them
        source.generation_config().to_json_file(folder / "generation_config.json")
