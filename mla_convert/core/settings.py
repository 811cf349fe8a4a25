"""Settings of a conversion, with their bounds, defaults and help text. Imports no torch.

Each field says everything about its option: the command line (`cli/options.py`), docs/reference/options.md and the table in
README.md are made from these fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mla_convert.core.errors import InputError, one_line
from mla_convert.core.original_cache import format_names
from mla_convert.core.units import Duration, Lengths, Tokens

PACKAGE = "package:"
Full = Literal["full"]
Trained = Literal["attention", "all", "lora"]
RopeSelection = Literal["by_loss", "engine_table", "evenly_spaced"]
Engine = Literal["vllm", "sglang", "llama.cpp"]
CacheRope = Literal["bf16", "fp8", "int8", "int4"]
CacheDtype = Literal["bf16", "fp8", "int8", "int4", "auto"]

# Panels of `--help`.
SIZE, TEXT, REFINE = "Cache size", "Calibration and evaluation text", "Refinement"
HEAL, RUN = "Healing", "Output and device"

# Settings that had another name in version 0.1, and their values that had other names.
OLD_NAMES: dict[str, tuple[str, dict[str, str]]] = {
    "planes": ("rope_selection", {"loss": "by_loss", "table": "engine_table", "even": "evenly_spaced"}),
    "calib_self": ("calib_self_generated", {}),
}


# PyTorch's generators take no larger seeds.
SEEDS = 1 << 63


def option(
    help: str,
    default: Any = None,
    *,
    panel: str,
    unset: str | None = None,
    flag: str | None = None,
    metavar: str | None = None,
    **bounds: Any,
) -> Any:
    """A pydantic field that is also a command-line option.

    Args:
        help: Meaning of the setting, as `--help` prints it.
        default: Value of the setting when it is not given.
        panel: Heading of `--help` under which the option stands.
        unset: The default in words, where it depends on the model or the device; None takes `default`.
        flag: Name of the option, if it is not made from the field's name.
        metavar: Name of the value in `--help`.
        **bounds: Bounds as pydantic's `Field` takes them (ge, gt, le, lt).
    """
    extra: dict[str, Any] = {"panel": panel, "unset": unset, "flag": flag, "metavar": metavar}
    return Field(default, description=help, json_schema_extra={"option": extra}, **bounds)


def with_new_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the names and values of version 0.1 replaced by those of this version.

    Raises:
        ValueError: A setting is given under both names.
    """
    renamed = dict(settings)
    for old, (new, values) in OLD_NAMES.items():
        if old in renamed:
            if new in renamed:
                raise ValueError(f"{old} is the old name of {new}: give one of them")
            value = renamed.pop(old)
            renamed[new] = values.get(value, value) if isinstance(value, str) else value
    return renamed


class Settings(BaseModel):
    """Everything that determines a conversion, apart from its source, output folder and device. Recipes may set any field."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int | Full | None = option(
        "Rank of the KV latent per token and layer (kv_lora_rank), or 'full'.",
        panel=SIZE,
        unset="follows from --kv-ratio",
        metavar="RANK",
    )
    rope_dim: int | Full | None = option(
        "Rotary dimensions kept in the cache (qk_rope_head_dim, an even number), or 'full'.",
        panel=SIZE,
        unset="a third of the rank, at most 64",
        metavar="DIM",
    )
    nope_dim: int | Full | None = option(
        "Content dimensions kept in each head (qk_nope_head_dim), or 'full'. Fewer make queries and keys narrower: 64 beside "
        "64 rotary ones are as wide as an original's head of 128. Layers without RoPE keep all.",
        panel=SIZE,
        unset="full: the original's head_dim",
        metavar="DIM",
    )
    kv_ratio: float | None = option(
        "Fraction of the original KV cache to keep, in bytes; chooses rank and rope-dim.",
        panel=SIZE,
        unset="0.5 if no rank is given",
    )
    cache_dtype: CacheDtype = option(
        "Numbers of the cached latent: bf16 (the model's own dtype), fp8 (e4m3), int8, int4, or auto, which mixes int8 and "
        "int4 channels by measured loss (int4 alone below 35% of the bytes). Refinement and healing see the quantised cache.",
        "bf16",
        panel=SIZE,
        metavar="DTYPE",
    )
    cache_group: int | None = option(
        "Channels of a quantised latent that share a scale, 32 to 128.",
        panel=SIZE,
        unset="64 (fp8: all; 48 with rotary keys in int4)",
        metavar="CHANNELS",
        ge=32,
        le=128,
    )
    cache_rope: CacheRope | None = option(
        "Numbers of the rotary key in a quantised cache: bf16, fp8 (e4m3), int8, which rounds less in as many bytes and "
        "decodes without the kernels, or int4, for a latent with channels in int4.",
        panel=SIZE,
        unset="fp8; int4 for int4 and auto where --kv-ratio is below 0.35",
        metavar="DTYPE",
    )
    uniform: bool = option(
        "Use the same rank and rope-dim in every layer, as serving engines require. Otherwise their bytes are a budget, of "
        "which layers that lose more get more.",
        False,
        panel=SIZE,
    )
    rope_selection: RopeSelection = option(
        "Which planes stay rotary: by_loss (those that would lose most), engine_table (of those, one for each frequency, as "
        "serving engines require) or evenly_spaced.",
        "by_loss",
        panel=SIZE,
        metavar="SELECTION",
    )
    engine: Engine | None = option(
        "Choose sizes and planes that vllm, sglang or llama.cpp can serve; then see `export`.",
        panel=SIZE,
        flag="--for",
        metavar="ENGINE",
    )
    calib: str | list[str] | None = option(
        "Calibration text: .txt, .jsonl, .csv, .parquet, a data set NAME:CONFIG@SPLIT, package (the packaged texts) or hub (five "
        "pinned data sets). Give several, with weights, to cover everything that the model is for.",
        panel=TEXT,
        unset="packaged texts of several kinds",
        metavar="TEXT[=WEIGHT]",
    )
    calib_samples: int | None = option(
        "Calibration windows.", panel=TEXT, unset="2048, of wide models fewer, at least 256 (CPU: 32)", ge=1
    )
    calib_length: int | None = option("Tokens in a calibration window.", panel=TEXT, unset="1024 (CPU: 512)", ge=16)
    # Measured with textbooks as the only text: ×1.98 instead of ×2.45 on code at a third of the cache. Where much is
    # kept it makes no difference (docs/research/calibration-text.md).
    calib_noise: float = option(
        "Fraction of the tokens of every second calibration window that are replaced by random ones, so that the model "
        "stays good on other text.",
        0.3,
        panel=TEXT,
        ge=0,
        le=1,
    )
    calib_self_generated: float | None = option(
        "Fraction of the calibration windows that the original model generates. The whole original must then fit on the "
        "device.",
        panel=TEXT,
        unset="0.5, or more where the texts are short, on a GPU with memory for eight copies of it; else 0",
        ge=0,
        le=1,
    )
    eval: str | None = option(
        "Evaluation text, named as for --calib. 'none' skips the evaluation, and the report says so.",
        panel=TEXT,
        unset="WikiText-2 from the Hub, or the packaged text if the Hub cannot be reached",
        metavar="TEXT",
    )
    # The number of windows of the published figures (docs/results/quality.md), with 2048 tokens in each.
    eval_windows: int = option("Evaluation windows at most.", 40, panel=TEXT, ge=1)
    eval_length: int | None = option(
        "Tokens in an evaluation window.", panel=TEXT, unset="2048, or the model's limit", ge=16
    )
    suite_windows: int | None = option(
        "Windows of each kind of text in the packaged suite that the result is measured on; 0 leaves the suite out.",
        panel=TEXT,
        unset="4 of 1024 tokens (CPU: 2 of 512)",
        ge=0,
    )
    original_cache: list[str] | None = option(
        "Also measure the original with its own cache quantised, on the same windows: fp8, int8, int4, int3, int2, or with "
        "-hadamard behind the last three. Give several, or commas between them.",
        panel=TEXT,
        metavar="FORMAT",
    )
    held_out: str | None = option(
        "Also report perplexity on this text, to choose settings by. 'calib' takes the last tenth of the calibration text, "
        "which calibration then does not use.",
        panel=TEXT,
        metavar="TEXT",
    )
    refine_steps: int | None = option(
        "Gradient steps per layer; 0 keeps the closed form.", panel=REFINE, unset="200 (CPU: 30)", ge=0
    )
    refine_batch: int | None = option("Windows in a step.", panel=REFINE, unset="8192 tokens' worth (CPU: 2048)", ge=1)
    # The largest rate: a layer that loses little takes a smaller one, by the square root of its own error
    # (docs/research/refinement.md). The same holds for `block_lr`.
    refine_lr: float = option(
        "Learning rate relative to each parameter's magnitude; lower where little is lost.",
        0.025,
        panel=REFINE,
        gt=0,
        le=1,
    )
    refine_block: int | None = option(
        "Layers in a block, which are refined together after each alone; 1: no blocks.",
        panel=REFINE,
        unset="up to 6, as memory allows (CPU: 1)",
        ge=1,
    )
    block_steps: int | None = option(
        "Gradient steps per block.",
        panel=REFINE,
        unset="--refine-steps for every 125 calibration windows",
        ge=0,
    )
    block_lr: float = option("Learning rate for blocks, as --refine-lr.", 0.009, panel=REFINE, gt=0, le=1)
    output_steps: int | None = option(
        "Extra steps of the last layers, towards the original's next-token distribution.",
        panel=REFINE,
        unset="a quarter of a block's (CPU: 0)",
        ge=0,
    )
    output_layers: int | None = option(
        "Layers at the end, in whole blocks, that take the extra steps together.",
        panel=REFINE,
        unset="as many as fit in a quarter of a GPU's memory (CPU: the last block)",
        ge=1,
    )
    budget: Duration | None = option(
        "Choose calibration windows and steps such that the conversion takes about this time (90s, 10min, 1.5h) at most, by "
        "the estimate of `plan`; healing comes on top.",
        panel=REFINE,
        metavar="TIME",
        gt=0,
    )
    heal_tokens: Tokens | None = option(
        "Heal the result: distil it from the original on this many tokens (200k, 20M), as `heal` does.",
        panel=HEAL,
        metavar="TOKENS",
        ge=1,
    )
    heal_data: str | list[str] | None = option(
        "Text for healing, as for --calib; give several, with weights.",
        panel=HEAL,
        unset="the calibration text",
        metavar="TEXT[=WEIGHT]",
    )
    heal_length: Lengths | None = option(
        "Tokens in a window of healing, or a mix of lengths: 1024:0.75,8192:0.25.",
        panel=HEAL,
        unset="2048, or the model's limit",
        metavar="LENGTHS",
    )
    heal_train: Trained | None = option(
        "Parameters that healing trains: all, attention or lora.", panel=HEAL, unset="all", metavar="PART"
    )
    heal_lr: float | None = option(
        "Peak learning rate of healing, relative to each parameter's magnitude.",
        panel=HEAL,
        unset="follows from --heal-train and the model's width",
        gt=0,
        le=1,
    )
    heal_self_share: float | None = option(
        "Fraction of the healing text that the original model generates.", panel=HEAL, unset="0.5", ge=0, lt=1
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto (the source's), float32, bfloat16 or float16.", "auto", panel=RUN, metavar="DTYPE"
    )
    seed: int = option("Seed for drawing calibration windows and batches.", 0, panel=RUN, ge=0, lt=SEEDS)

    # Before the fields are checked, because an unknown name is refused there.
    @model_validator(mode="before")
    @classmethod
    def _read_old_names(cls, data: Any) -> Any:
        return with_new_names(data) if isinstance(data, Mapping) else data

    @field_validator("original_cache", mode="before")
    @classmethod
    def _read_formats(cls, value: Any) -> list[str] | None:
        return None if value is None else format_names(value)

    @model_validator(mode="after")
    def _check_rank_or_ratio(self) -> Settings:
        if self.rank is not None and self.kv_ratio is not None:
            raise ValueError("rank and kv_ratio both set the size: give one of them")
        return self

    @model_validator(mode="after")
    def _check_group(self) -> Settings:
        given = next((key for key in ("cache_group", "cache_rope") if getattr(self, key) is not None), None)
        if given and self.cache_dtype == "bf16":
            raise ValueError(f"{given} means nothing with cache_dtype bf16: leave it out or quantise the cache")
        return self

    @model_validator(mode="after")
    def _check_budget(self) -> Settings:
        if self.budget is not None and self.calib_samples is not None and self.refine_steps is not None:
            raise ValueError("budget chooses calib_samples and refine_steps: give at most one of them beside it")
        return self

    @model_validator(mode="after")
    def _check_evaluation(self) -> Settings:
        # Healing measures on the windows of the evaluation, and held-out text is scored together with them.
        measured = next(
            (key for key in ("held_out", "heal_tokens", "original_cache") if getattr(self, key) is not None), None
        )
        if self.eval == "none" and measured:
            raise ValueError(f"{measured} needs an evaluation, and eval is none: leave out one of them")
        return self

    @model_validator(mode="after")
    def _check_healing(self) -> Settings:
        extra = [key for key, value in self if key.startswith("heal_") and key != "heal_tokens" and value is not None]
        if extra and self.heal_tokens is None:
            raise ValueError(f"{extra[0]} means nothing without heal_tokens")
        return self


class ConvertConfig(Settings):
    """One conversion: a source, an output folder, a device and the settings."""

    source: str
    out: Path | None = option("Folder to write.", panel=RUN, unset="NAME-mla in the working folder", metavar="PATH")
    overwrite: bool = option("Replace an output folder that is not a converted model.", False, panel=RUN)
    revision: str | None = option("Branch, tag or commit of a Hub source.", panel=RUN, metavar="REVISION")
    device: str = option("auto (CUDA if there is a GPU), cpu, cuda or cuda:N.", "auto", panel=RUN, metavar="DEVICE")


def packaged(name: str, what: str) -> Path:
    """Path of the file or folder that `package:NAME/INNER` names.

    Args:
        name: The name, with its prefix.
        what: Purpose of the file, for the message.

    Raises:
        InputError: There is no such package.
    """
    package, _, inner = name.removeprefix(PACKAGE).partition("/")
    try:
        return Path(str(resources.files(package))) / inner
    # importlib has no common error for a name that is no package: an empty one raises ValueError, `.` TypeError, one
    # that is not installed ImportError.
    except (ImportError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{what} {name} not found: there is no package {package!r} ({one_line(error)})") from error
