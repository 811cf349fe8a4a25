"""What stands beside the weights in a converted folder: configuration, modeling code, tokenizer, card and report."""

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

# Keys under which older tokenizers kept where they were loaded from, on the machine of whoever saved them.
PATHS = ("name_or_path", "special_tokens_map_file", "tokenizer_file")


def write_config(config: Any, stock_class: str, folder: Path) -> None:
    """config.json of the converted counterpart of `stock_class`, and the code that it needs."""
    name = configuration_mla.PREFIX + stock_class
    config.architectures = [name]
    config.mla_transformers = newest_tried()
    config.auto_map = {
        "AutoConfig": f"configuration_mla.{type(config).__name__}",
        "AutoModelForCausalLM": f"modeling_mla.{name}",
    }
    config.save_pretrained(folder)
    write_code(folder)


def write_tokenizer(source: Source, tokenizer: Any, folder: Path) -> None:
    """The source's tokenizer, generation and licence files, without code of its own, or new ones where it has none (GGUF)."""
    for file in source.copied_files():
        carry(file, folder)
    own = folder / "tokenizer_config.json"
    if not own.exists():
        tokenizer.save_pretrained(folder)
    # transformers may have picked the class by the source's model type, which the converted model does not have
    content = json.loads(own.read_text(encoding="utf-8"))
    paths = {key for key in PATHS if isinstance(content.get(key), str) and os.path.isabs(content[key])}
    if content.get("tokenizer_class") != type(tokenizer).__name__ or paths:
        content = {key: value for key, value in content.items() if key not in paths}
        content["tokenizer_class"] = type(tokenizer).__name__
        write_file(own, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    if not (folder / "generation_config.json").exists():
        # as it is, even where settings contradict each other: save_pretrained refuses what transformers loads
        source.generation_config().to_json_file(folder / "generation_config.json")
