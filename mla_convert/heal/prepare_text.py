"""The corpus of a healing run: the given text, and text that the original generates itself."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from mla_convert.core.files import on_disk
from mla_convert.core.progress import Progress
from mla_convert.heal import data, windows
from mla_convert.heal.settings import HealSettings
from mla_convert.heal.state import StateFolder
from mla_convert.method.calibrate import self_generated
from mla_convert.source import texts
from mla_convert.source.load_model import load_model, load_tokenizer, model_config
from mla_convert.source.place import SourceLocation

LABELS = "text.json"


def prepare_corpus(
    state: StateFolder,
    accelerator: Accelerator,
    settings: HealSettings,
    place: SourceLocation,
    origin: SourceLocation,
    progress: Progress,
) -> list[str]:
    """Tokenise the texts into the state folder, once, by the main process.

    Args:
        state: folder of the run.
        accelerator: of this process.
        settings: of the run.
        place: of the converted model.
        origin: of its original, which generates `self_share` of the text.
        progress: of the generation.

    Returns:
        The labels of the given texts.

    Raises:
        InputError: the text cannot be read, or is too short.
        ResourceError: the disk does not suffice.
    """

    def make() -> dict[str, list[str]]:
        with on_disk("the text's tokens", state.folder.parent):
            tokenizer = load_tokenizer(place)
            window = max(length for length, _ in settings.mix(None))
            labels = data.make_corpus(
                settings.data, tokenizer, data.needed_tokens(settings.tokens), state.folder, settings.joined,
                texts.reach(model_config(place), learned=False), window, settings.for_task,
            )  # fmt: skip
            # Before the original generates text for minutes.
            windows.check_enough(data.open_corpus(state.folder), settings.mix(None))
            if settings.self_share:
                data.add_generated(state.folder, generate_text(accelerator, settings, origin, tokenizer, progress))
            return {"labels": labels}

    return state.remember(LABELS, make)["labels"]


def generate_text(
    accelerator: Accelerator, settings: HealSettings, origin: SourceLocation, tokenizer: Any, progress: Progress
) -> np.ndarray:
    """Sample texts from the original (as LLM-QAT does, arXiv 2305.17888).

    Returns:
        Token ids (N,) of the texts, one after another, each behind the token that it continues.
    """
    dtype = torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32
    original = load_model(origin, dtype, accelerator.device)
    limit = getattr(original.config, "max_position_embeddings", None) or self_generated.TEXT_TOKENS
    length = min(self_generated.TEXT_TOKENS, limit)
    count = math.ceil(settings.written_tokens(limit) / length)
    first = self_generated.first_token(tokenizer, original.config.vocab_size)
    progress.note(f"the original generates {count:,} texts of {length} tokens")
    # The first token of a text is given, not generated.
    progress.begin("generate", count * (length - 1))
    try:
        rows = self_generated.varied_texts(original, tokenizer, count, length - 1, settings.seed, progress.advance)
    finally:
        progress.stop()
    return F.pad(rows, (1, 0), value=first).flatten().numpy()
