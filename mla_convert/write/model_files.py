"""What stands beside the weights in a converted folder: configuration, modeling code, tokenizer, card and report."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from mla_convert.core.files import on_disk, write_file
from mla_convert.core.runtime import newest_tried
from mla_convert.modeling import configuration_mla
from mla_convert.modeling.shipped_code import write_code
from mla_convert.report.html.page import PAGE, write_page
from mla_convert.report.model_card import write_card
from mla_convert.report.report import Report
from mla_convert.source.carried import carry
from mla_convert.source.source import Source
from mla_convert.write.selfcheck import self_check
from mla_convert.write.writer import Writer

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


def finish(
    source: Source,
    tokenizer: Any,
    config: Any,
    stock_class: str,
    writer: Writer,
    report: Report,
    device: torch.device,
) -> None:
    """Write everything but the weights, try what was written, then give the folder its name.

    Raises:
        SelfCheckFailed: the model does not generate what it should.
    """
    with on_disk("the output", writer.out.parent):
        write_tokenizer(source, tokenizer, writer.folder)
        write_config(config, stock_class, writer.folder)
        writer.write_index()
        report.self_check = self_check(writer.folder, device)
        write_card(report, writer.folder)
        report.write(writer.folder)
        write_page(report.as_dict(), writer.folder / PAGE)
        writer.publish()
