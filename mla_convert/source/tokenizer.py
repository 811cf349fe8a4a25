"""Reading of tokenizers, by installed classes alone; every failure is reported in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from mla_convert.core.errors import InputError, one_line
from mla_convert.source.carried import tokenizer_code

# If transformers cannot read a tokenizer.model, it asks for tiktoken, whatever the reason. The usual one is that sentencepiece
# or protobuf is missing.
SENTENCEPIECE = "tokenizer.model"
# Classes that take what they are from the file, and not from the model's type.
GENERIC = (None, "TokenizersBackend", "PythonBackend", "PreTrainedTokenizerFast", "MistralCommonBackend")


def read_tokenizer(folder: Path, label: str, gguf: str | None = None, model_type: str = "") -> Any:
    """The tokenizer of the model in `folder`.

    Args:
        folder: of the model.
        label: names the model in errors.
        gguf: name of the GGUF file in `folder` that holds it, if one does.
        model_type: of the model in that file, if it is known.

    Raises:
        InputError: it has none that transformers can read.
    """
    options = {"gguf_file": gguf} if gguf else {}
    # To find the type by itself transformers takes 10 to 20 s, with a vocabulary of 152,000.
    if gguf and TOKENIZER_MAPPING_NAMES.get(model_type) not in GENERIC:
        options["tokenizer_type"] = model_type
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
        tokenizer("1")  # some invalid settings fail only here
        return tokenizer
    except Exception as error:  # a damaged file can raise anything, also a bare Exception
        raise InputError(f"{label} has no readable tokenizer ({_reason(folder, error, gguf is not None)})") from error
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
