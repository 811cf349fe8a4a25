"""Settings of a conversion, and the recipes that hold them by name or in a YAML file. Imports no torch."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mla_convert.core.errors import InputError, one_line
from mla_convert.core.units import Lengths, Tokens

PACKAGE = "package:"
Full = Literal["full"]
Trained = Literal["attention", "all", "lora"]


class Settings(BaseModel):
    """What a conversion does, apart from where its source and output lie. Recipes may set any of these."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int | Full | None = None
    rope_dim: int | Full | None = None
    kv_ratio: float | None = None
    uniform: bool = False
    planes: Literal["loss", "table", "even"] = "loss"
    engine: Literal["vllm", "sglang", "llama.cpp"] | None = None
    calib: str | list[str] | None = None
    calib_samples: int | None = Field(None, ge=1)
    calib_length: int | None = Field(None, ge=16)
    calib_noise: float = Field(0.3, ge=0, le=1)
    calib_self: float | None = Field(None, ge=0, le=1)
    eval: str | None = None
    eval_windows: int = Field(40, ge=1)
    eval_length: int | None = Field(None, ge=16)
    held_out: str | None = None
    suite_windows: int | None = Field(None, ge=0)
    refine_steps: int | None = Field(None, ge=0)
    refine_batch: int | None = Field(None, ge=1)
    refine_lr: float = Field(0.025, gt=0, le=1)
    refine_block: int | None = Field(None, ge=1)
    block_steps: int | None = Field(None, ge=0)
    block_lr: float = Field(0.009, gt=0, le=1)
    output_steps: int | None = Field(None, ge=0)
    output_layers: int | None = Field(None, ge=1)
    heal_tokens: Tokens | None = Field(None, ge=1)
    heal_data: str | None = None
    heal_length: Lengths | None = None
    heal_train: Trained | None = None
    heal_lr: float | None = Field(None, gt=0, le=1)
    heal_self_share: float | None = Field(None, ge=0, lt=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _rank_or_ratio(self) -> Settings:
        if self.rank is not None and self.kv_ratio is not None:
            raise ValueError("rank and kv_ratio are two ways to say one thing: give one of them")
        return self

    @model_validator(mode="after")
    def _evaluation_or_not(self) -> Settings:
        measured = next((key for key in ("held_out", "heal_tokens") if getattr(self, key) is not None), None)
        if self.eval == "none" and measured:
            raise ValueError(f"{measured} needs an evaluation, and eval is none: leave out one of them")
        return self

    @model_validator(mode="after")
    def _healing_or_not(self) -> Settings:
        extra = [key for key, value in self if key.startswith("heal_") and key != "heal_tokens" and value is not None]
        if extra and self.heal_tokens is None:
            raise ValueError(f"{extra[0]} means nothing without heal_tokens")
        return self


class ConvertConfig(Settings):
    """One conversion: a source, an output folder, a device and the settings."""

    source: str
    revision: str | None = None
    out: Path | None = None
    overwrite: bool = False
    device: str = "auto"


def packaged(name: str, what: str) -> Path:
    """Where `package:NAME/INNER` lies. `what` it is, for the message.

    Raises:
        InputError: there is no such package.
    """
    package, _, inner = name.removeprefix(PACKAGE).partition("/")
    try:
        return Path(str(resources.files(package))) / inner
    except (ImportError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{what} {name} not found: there is no package {package!r} ({one_line(error)})") from error
