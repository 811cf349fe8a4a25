"""Reading of tokenizers, by installed classes alone; every failure is reported in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from mla_convert.core.errors import InputError, one_line
from mla_convert.source.carried import tokenizer_code

# If transformers cannot read a tokenizer.model, it asks for tiktoken, whatever the reason. The usual one is that sentencepiece
# or protobuf is missing.
SENTENCEPIECE = "tokenizer.model"


def read_tokenizer(folder: Path, label: str, **options: Any) -> Any:
    """The tokenizer of the model in `folder`; `options` go to transformers.

    Raises:
        InputError: it has none that transformers can read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
        tokenizer("1")  # some invalid settings fail only here
        return tokenizer
    except Exception as error:  # a damaged file can raise anything, also a bare Exception
        raise InputError(
            f"{label} has no readable tokenizer ({_reason(folder, error, 'gguf_file' in options)})"
        ) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of a Rust library; BaseException is its only public base
            raise
        raise InputError(f"{label} has no readable tokenizer ({one_line(error)})") from error


def _reason(folder: Path, error: Exception, gguf: bool) -> str:
    """The reason of a failure, with the missing package if there is one."""
    text = one_line(error)
    if not gguf and (code := tokenizer_code(folder)):
        return f"it is code of its own, {code}, which is never run, and no class of transformers' reads it"
    if (folder / SENTENCEPIECE).is_file() and ("tiktoken" in text or "protobuf" in text.lower()):
        try:
            import google.protobuf  # noqa: F401
            import sentencepiece  # noqa: F401
        except ImportError as missing:
            package = "sentencepiece" if "sentencepiece" in str(missing) else "protobuf"
            return f"{SENTENCEPIECE} is read with {package}, which is not installed: pip install {package}"
        return f"{SENTENCEPIECE} is damaged, or not of a kind that is read here: fetch it again"
    return text
