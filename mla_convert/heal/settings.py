"""Settings of a healing run. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

LENGTHS = "2048"


class HealSettings(BaseModel):
    """What healing does, apart from where models and output lie. Tokens and windows are counted over all processes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int = Field(ge=1)
    data: str | None = None
    joined: bool = False
    length: str = LENGTHS
    train: Literal["attention", "all", "lora"] = "all"
    lora_rank: int = Field(64, ge=1)
    lr: float | None = Field(None, gt=0, le=1)
    step_tokens: int | None = Field(None, ge=16)
    micro_tokens: int | None = Field(None, ge=16)
    kl_weight: float = Field(1.0, ge=0)
    ce_weight: float = Field(0.0, ge=0)
    hidden_weight: float = Field(0.0, ge=0)
    temperature: float = Field(1.0, gt=0)
    evaluations: int = Field(20, ge=1)
    patience: int = Field(6, ge=1)
    checkpoint_minutes: float = Field(10.0, ge=0)
    gradient_checkpointing: bool = False
    compile: bool | None = None
    seed: int = Field(0, ge=0)

    @field_validator("length")
    @classmethod
    def _readable(cls, value: str) -> str:
        parse_lengths(value)
        return value

    @property
    def mix(self) -> tuple[tuple[int, float], ...]:
        """Window lengths with their shares of the tokens."""
        return parse_lengths(self.length)


class HealConfig(HealSettings):
    """One healing run: a converted folder, its original, an output folder (by default the folder itself) and a device."""

    folder: Path
    teacher: str | None = None
    out: Path | None = None
    eval: str | None = None
    eval_windows: int | None = Field(None, ge=1)
    eval_length: int | None = Field(None, ge=16)
    passkey: bool = False
    passkey_length: int | None = Field(None, ge=1)
    device: str = "auto"
    overwrite: bool = False


def parse_lengths(text: str) -> tuple[tuple[int, float], ...]:
    """`1024` or `1024:0.75,4096:0.25` as lengths and shares that sum to 1.

    Raises:
        ValueError: anything else.
    """
    found = []
    for part in text.split(","):
        length, _, share = part.partition(":")
        try:
            entry = int(length), float(share) if share else 1.0
        except ValueError:
            raise ValueError(f"{text!r} is neither a length nor lengths with shares (1024:0.75,4096:0.25)") from None
        if entry[0] < 16 or not 0 < entry[1] < float("inf"):
            raise ValueError(f"{part!r} is no length of at least 16 tokens with a share above 0")
        found.append(entry)
    if len({length for length, _ in found}) < len(found):
        raise ValueError(f"{text!r} has a length twice")
    total = sum(share for _, share in found)
    return tuple((length, share / total) for length, share in found)


def parse_tokens(text: str) -> int:
    """`200k`, `20M`, `1.5B` or a plain number of tokens.

    Raises:
        ValueError: anything else.
    """
    sizes = {"k": 1e3, "m": 1e6, "b": 1e9}
    number, unit = (text[:-1], sizes[text[-1].lower()]) if text and text[-1].lower() in sizes else (text, 1.0)
    try:
        tokens = float(number) * unit
    except ValueError:
        tokens = -1.0
    if not 1 <= tokens < 1e15:
        raise ValueError(f"{text!r} is no number of tokens: give 200k, 20M or 1.5B, say")
    return round(tokens)
