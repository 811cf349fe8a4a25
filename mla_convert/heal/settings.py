"""Settings of a healing run, with their bounds, defaults and help text. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from mla_convert.core.original_cache import format_names
from mla_convert.core.settings import RUN, SEEDS, ConvertConfig, Trained, option
from mla_convert.core.units import Lengths, Tokens, parse_lengths

LENGTH = 2048
LORA_RANK = 64
# Passes over the self-generated text, which takes as long to generate as to train on; and its most tokens.
WRITTEN_PASSES, WRITTEN_MAX = 2, 1 << 23

# Panels of `--help`.
TEXT, TRAINING, LOSS = "Text", "Training", "Loss"


class HealSettings(BaseModel):
    """Everything that determines healing, apart from models and output. Tokens and windows are counted over all processes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: Tokens = option(
        "Tokens to train on, all passes over the text together: 200k, 20M, 1B.",
        20_000_000,
        panel=TEXT,
        unset="20M",
        metavar="TOKENS",
        ge=1,
    )
    data: str | list[str] | None = option(
        "Text to train on: .txt, .jsonl, .csv, .parquet, a data set NAME:CONFIG@SPLIT, which is streamed, package (the "
        "packaged texts) or hub (five pinned data sets). Give several, with weights, to cover everything that the model is for. "
        "The end of each is held out.",
        panel=TEXT,
        unset="packaged texts of several kinds",
        metavar="TEXT[=WEIGHT]",
    )
    for_task: str | list[str] | None = option(
        "Conversations of the task that the model is for: a .jsonl file, or a data set NAME:CONFIG@SPLIT, whose rows have "
        "messages, or prompt and completion. They are half of the given text, and the loss counts their answers alone.",
        panel=TEXT,
        metavar="DATA[=WEIGHT]",
    )
    joined: bool = option("Rows of the data are parts of one text, not documents.", False, panel=TEXT)
    length: Lengths | None = option(
        "Tokens in a window, or a mix of lengths with their fractions of the tokens: 1024:0.75,8192:0.25.",
        panel=TEXT,
        unset="2048, or the model's limit",
        metavar="LENGTHS",
    )
    # Without noise the KL is 1 to 2% lower (docs/research/healing.md, Noise).
    noise: float = option(
        "Fraction of the tokens of every second window that are replaced by random ones.", 0.0, panel=TEXT, ge=0, lt=1
    )
    # Half is better than none or a quarter on the demo model; on SmolLM2 a quarter to nine tenths differ by 3% of the
    # KL (docs/research/healing.md).
    self_share: float = option(
        "Fraction of the text that the original model generates before training.", 0.5, panel=TEXT, ge=0, lt=1
    )
    # All weights end at a lower KL than the attention alone (docs/research/healing.md, Optimizers).
    train: Trained = option(
        "Parameters to train: all, attention, or lora (needs the extra heal).", "all", panel=TRAINING, metavar="PART"
    )
    lr: float | None = option(
        "Peak learning rate, relative to each parameter's magnitude (lora: absolute).",
        panel=TRAINING,
        unset="follows from --train and the model's width",
        gt=0,
        le=1,
    )
    lora_rank: int = option("Rank of the adapters.", LORA_RANK, panel=TRAINING, ge=1)
    step_tokens: int | None = option(
        "Tokens in an optimiser step, over all processes.",
        panel=TRAINING,
        unset="follows from --tokens, at most 32768 (CPU: 8192)",
        ge=16,
    )
    micro_tokens: int | None = option("Tokens in a forward pass.", panel=TRAINING, unset="16384 (CPU: 4096)", ge=16)
    gradient_checkpointing: bool = option("Use less memory, a third slower.", False, panel=TRAINING)
    compile: bool | None = option(
        "Use torch.compile, and CUDA graphs on one GPU.", panel=TRAINING, unset="from 4M tokens on a GPU"
    )
    evaluations: int = option("Evaluations on the held-out text at most.", 20, panel=TRAINING, ge=1)
    patience: int = option("Evaluations without improvement that end the run.", 10, panel=TRAINING, ge=1)
    kl_weight: float = option("Weight of KL(original ‖ model).", 1.0, panel=LOSS, ge=0)
    ce_weight: float = option(
        "Weight of the cross-entropy on the given text, which teaches that text and not the original.",
        0.0,
        panel=LOSS,
        ge=0,
    )
    hidden_weight: float = option("Weight of the relative error of every layer's hidden states.", 0.0, panel=LOSS, ge=0)
    temperature: float = option("Temperature of both distributions in the KL.", 1.0, panel=LOSS, gt=0)
    checkpoint_minutes: float = option(
        "Minutes between checkpoints, from which the same command continues.", 10.0, panel=RUN, ge=0
    )
    seed: int = option("Seed for drawing windows and adapters.", 0, panel=RUN, ge=0, lt=SEEDS)

    @model_validator(mode="after")
    def _check_loss(self) -> HealSettings:
        if not (self.kl_weight or self.ce_weight or self.hidden_weight):
            raise ValueError("every weight of the loss is 0: give --kl-weight, --ce-weight or --hidden-weight")
        if self.train != "lora" and self.lora_rank != LORA_RANK:
            raise ValueError(f"lora_rank means nothing with train {self.train}: leave it out, or give --train lora")
        return self

    def mix(self, longest: int | None) -> tuple[tuple[int, float], ...]:
        """Window lengths with their fractions of the tokens.

        Args:
            longest: The model's longest context in tokens, if it has a limit.
        """
        return parse_lengths(self.length or str(min(LENGTH, longest or LENGTH)))

    def written_tokens(self, longest: int | None = None) -> int:
        """Tokens that the original generates before training, at least four windows.

        Args:
            longest: The model's longest context in tokens, if it has a limit.
        """
        if not self.self_share:
            return 0
        window = max(length for length, _ in self.mix(longest))
        return max(round(min(self.self_share * self.tokens / WRITTEN_PASSES, WRITTEN_MAX)), 4 * window)


class HealConfig(HealSettings):
    """One healing run: a converted folder, its original, an output folder (by default the folder itself) and a device."""

    folder: Path
    teacher: str | None = option(
        "The original: folder, Hub id, .gguf file or recipe.",
        panel=TEXT,
        unset="the source that the conversion's report names, if it can be found",
        metavar="MODEL",
    )
    teacher_revision: str | None = None
    eval: str | None = option("Evaluation text, as for `eval`.", panel=TEXT, unset="the conversion's", metavar="TEXT")
    eval_windows: int | None = option("Evaluation windows at most.", panel=TEXT, unset="the conversion's", ge=1)
    eval_length: int | None = option("Tokens in an evaluation window.", panel=TEXT, unset="the conversion's", ge=16)
    original_cache: list[str] | None = option(
        "Also measure the original with its own cache quantised, as for `eval`.", panel=TEXT, metavar="FORMAT"
    )
    passkey: bool = option("Run the passkey test before and after.", False, panel=TEXT)
    passkey_length: int | None = option(
        "Tokens of the longest passkey text; turns the test on.", panel=TEXT, unset="the model's context", ge=1
    )
    out: Path | None = option(
        "Folder to write.", panel=RUN, unset="FOLDER itself, replaced when all is done", metavar="PATH"
    )
    overwrite: bool = option("Replace an --out that is not a converted model.", False, panel=RUN)
    device: str = option("auto (CUDA if there is a GPU), cpu, cuda or cuda:N.", "auto", panel=RUN, metavar="DEVICE")

    @field_validator("original_cache", mode="before")
    @classmethod
    def _read_formats(cls, value: Any) -> list[str] | None:
        return None if value is None else format_names(value)


def conversion_healing(config: ConvertConfig) -> HealSettings | None:
    """Settings of the healing run that a conversion ends with; None if it has none.

    Text, learning rate and seed are those that the conversion names; `heal_data` alone is not resolved to the calibration
    text here.
    """
    if config.heal_tokens is None:
        return None
    given: dict[str, Any] = {
        "data": config.heal_data,
        "length": config.heal_length,
        "train": config.heal_train,
        "lr": config.heal_lr,
        "self_share": config.heal_self_share,
    }
    return HealSettings(
        tokens=config.heal_tokens, seed=config.seed, **{key: value for key, value in given.items() if value is not None}
    )
