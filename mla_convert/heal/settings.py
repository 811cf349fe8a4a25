"""Settings of a healing run. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mla_convert.core.settings import Trained
from mla_convert.core.units import Lengths, Tokens, parse_lengths

LENGTH = 2048
# Passes over what the original writes, which takes as long as training on it; and the most that it writes.
WRITTEN_PASSES, WRITTEN_MAX = 2, 1 << 23


class HealSettings(BaseModel):
    """What healing does, apart from where models and output lie. Tokens and windows are counted over all processes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: Tokens = Field(ge=1)
    data: str | None = None
    joined: bool = False
    length: Lengths | None = None
    noise: float = Field(0.0, ge=0, lt=1)
    self_share: float = Field(0.5, ge=0, lt=1)
    train: Trained = "all"
    lora_rank: int = Field(64, ge=1)
    lr: float | None = Field(None, gt=0, le=1)
    step_tokens: int | None = Field(None, ge=16)
    micro_tokens: int | None = Field(None, ge=16)
    kl_weight: float = Field(1.0, ge=0)
    ce_weight: float = Field(0.0, ge=0)
    hidden_weight: float = Field(0.0, ge=0)
    temperature: float = Field(1.0, gt=0)
    evaluations: int = Field(20, ge=1)
    patience: int = Field(10, ge=1)
    checkpoint_minutes: float = Field(10.0, ge=0)
    gradient_checkpointing: bool = False
    compile: bool | None = None
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _some_loss(self) -> HealSettings:
        if not (self.kl_weight or self.ce_weight or self.hidden_weight):
            raise ValueError("every weight of the loss is 0: give --kl-weight, --ce-weight or --hidden-weight")
        return self

    def mix(self, longest: int | None) -> tuple[tuple[int, float], ...]:
        """Window lengths with their shares of the tokens. `longest` is the model's limit, if it has one."""
        return parse_lengths(self.length or str(min(LENGTH, longest or LENGTH)))

    def written_tokens(self, longest: int | None = None) -> int:
        """Tokens that the original writes beforehand, a few windows at least."""
        if not self.self_share:
            return 0
        window = max(length for length, _ in self.mix(longest))
        return max(round(min(self.self_share * self.tokens / WRITTEN_PASSES, WRITTEN_MAX)), 4 * window)


class HealConfig(HealSettings):
    """One healing run: a converted folder, its original, an output folder (by default the folder itself) and a device."""

    folder: Path
    teacher: str | None = None
    teacher_revision: str | None = None
    out: Path | None = None
    eval: str | None = None
    eval_windows: int | None = Field(None, ge=1)
    eval_length: int | None = Field(None, ge=16)
    passkey: bool = False
    passkey_length: int | None = Field(None, ge=1)
    device: str = "auto"
    overwrite: bool = False
