"""Options of commands: those of settings, made from their fields, and those that several commands declare. Imports no torch."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from mla_convert.cli.terminal import set_verbose
from mla_convert.core.original_cache import NAMES
from mla_convert.core.settings import OLD_NAMES, RUN

HUB, MEASURE, PROBES, LIMITS, OUTPUT = "Hub", "Measurement", "Beyond perplexity", "Limits", "Output"
Command = Callable[..., None]


def from_settings(
    model: type[BaseModel],
    *,
    skip: Collection[str] = (),
    only: Collection[str] | None = None,
    words: Mapping[str, str] | None = None,
) -> Callable[[Command], Command]:
    """Replace the parameter `settings` of a command by one option for each field of a settings model.

    The command is called with `settings` as a dictionary of the options that were given, under their fields' names.

    Args:
        model: The settings, whose fields are made by `core.settings.option`; other fields make no option.
        skip: Fields that make no option.
        only: The fields that make options; None for all of them.
        words: Help of fields that mean less in this command than in the settings, default included.
    """
    if unknown := {*skip, *(only or ())} - model.model_fields.keys():
        raise TypeError(f"{model.__name__} has no fields {', '.join(sorted(unknown))}")
    chosen = {name for name in model.model_fields if name not in skip and (only is None or name in only)}
    options = [
        parameter
        for name in model.model_fields
        if name in chosen
        for parameter in _parameters(model, name, (words or {}).get(name))
    ]

    def decorate(command: Command) -> Command:
        declared = inspect.signature(command, eval_str=True).parameters
        made = {parameter.name for parameter in options}
        signature: list[inspect.Parameter] = []
        # In the order in which --help lists them.
        for name, parameter in declared.items():
            signature += options if name == "settings" else [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]

        def run(**values: Any) -> Any:
            # An option that was not given must not override the setting of a recipe.
            settings = {name: value for name, value in values.items() if name in made and value is not None}
            return command(settings=settings, **{name: value for name, value in values.items() if name not in made})

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        # typer reads the options from the signature.
        run.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
        return run

    return decorate


def _parameters(model: type[BaseModel], name: str, words: str | None) -> Iterator[inspect.Parameter]:
    """The option of one field, and a hidden one for its name in version 0.1."""
    field = model.model_fields[name]
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    if not isinstance(about := extra.get("option"), dict):
        return
    flag = str(about["flag"] or f"--{name.replace('_', '-')}")
    # A flag without a fixed default has to be switched off as well as on.
    if bool in alternatives(field) and field.default is None:
        flag = f"{flag}/--no-{flag.removeprefix('--')}"
    yield _option(name, field, flag, about, words, hidden=False)
    for old, (new, _) in OLD_NAMES.items():
        if new == name:
            yield _option(old, field, f"--{old.replace('_', '-')}", about, words, hidden=True)


def _option(
    name: str, field: FieldInfo, flag: str, about: dict[str, Any], words: str | None, hidden: bool
) -> inspect.Parameter:
    value = _type(field)
    default = default_words(field)
    info = typer.Option(
        flag,
        help=words or (f"{field.description} Default: {default}." if default else field.description),
        rich_help_panel=about["panel"],
        metavar=about["metavar"],
        parser=rank_or_full if Literal["full"] in alternatives(field) else None,
        show_default=False,
        hidden=hidden,
    )
    # No default here: `default_words` prints it, the settings have it, and None tells that the option was not given.
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[value | None, info]
    )


def default_words(field: FieldInfo) -> str:
    """The default of a setting in words; empty for flags and for settings without a default."""
    extra = field.json_schema_extra
    about = extra.get("option") if isinstance(extra, dict) else None
    if isinstance(about, dict) and about["unset"]:
        return str(about["unset"])
    default = field.default
    if default is None or isinstance(default, bool):
        return ""
    return f"{default:g}" if isinstance(default, float) else str(default)


def alternatives(field: FieldInfo) -> tuple[Any, ...]:
    """The types of a field, those of a union one by one."""
    union = get_origin(field.annotation) in (Union, types.UnionType)
    return get_args(field.annotation) if union else (field.annotation,)


def _type(field: FieldInfo) -> Any:
    """The type that the parser converts an option's value to; pydantic checks the value itself."""
    kinds = alternatives(field)
    # A list first: its other member, a single text, is how recipes write it.
    if list[str] in kinds:
        return list[str]
    # A field with a validator of its own reads the text itself, such as 20M or 1024:0.75,8192:0.25.
    if not any(isinstance(entry, BeforeValidator) for entry in field.metadata):
        for kind in (bool, int, float, Path):
            if kind in kinds and Literal["full"] not in kinds:
                return kind
    return str


def rank_or_full(value: str | None) -> int | str | None:
    """A rank or rope-dim as typed: a whole number or `full`."""
    if value is None or value == "full":
        return value
    try:
        return int(value)
    except ValueError:
        raise typer.BadParameter(f"{value!r} is neither a whole number nor 'full'") from None


Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", callback=set_verbose, help="Print more: messages of libraries, and where an error came from."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress.")]

# ---- a source to convert

Source = Annotated[
    str | None,
    typer.Argument(
        help="Folder, Hub id (owner/name), .gguf file, or recipe (demo, llama-8b, …, or a .yaml file).",
        show_default=False,
    ),
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        help="Settings from a YAML file (recipe.yaml of an output repeats its run) or packaged recipe; SOURCE, if given, "
        "replaces the recipe's source.",
        show_default=False,
    ),
]
Export = Annotated[
    str | None,
    typer.Option(
        metavar="PROFILE",
        help="Then also export the result for engines, as `export` does, beside it: portable, engine or hf-code.",
        rich_help_panel=RUN,
        show_default=False,
    ),
]

# ---- the Hub

Private = Annotated[
    bool | None,
    typer.Option(
        "--private",
        help="Make the repository private. An existing repository keeps its visibility; a public one is refused.",
        rich_help_panel=HUB,
    ),
]

# ---- a measurement

Model = Annotated[
    str, typer.Argument(help="Folder, Hub id (owner/name), .gguf file or recipe; converted or not.", show_default=False)
]
Against = Annotated[
    str | None, typer.Option(help="The original, named like MODEL.", show_default=False, rich_help_panel=MEASURE)
]
Text = Annotated[
    str | None,
    typer.Option(
        "--eval",
        help="Text: .txt, .jsonl, .csv, .parquet, or a data set NAME:CONFIG@SPLIT. Default: the conversion's if it can be "
        "found, else WikiText-2 from the Hub, or the packaged text if the Hub cannot be reached.",
        show_default=False,
        rich_help_panel=MEASURE,
    ),
]
Windows = Annotated[
    int | None,
    typer.Option(
        help="Windows at most. Default: the conversion's, else 40.", show_default=False, rich_help_panel=MEASURE
    ),
]
Length = Annotated[
    int | None,
    typer.Option(
        help="Tokens in a window. Default: the conversion's, else 2048 or the model's limit.",
        show_default=False,
        rich_help_panel=MEASURE,
    ),
]
SuiteWindows = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Windows of each kind of text in the packaged suite; 0 leaves it out. Default: the conversion's, else 4 (CPU: 2).",
        show_default=False,
        rich_help_panel=MEASURE,
    ),
]
OriginalCache = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FORMAT",
        help=f"Also measure the original with its own cache quantised, on the same windows: {', '.join(NAMES)}. Give several, "
        "or commas between them.",
        show_default=False,
        rich_help_panel=MEASURE,
    ),
]
Dtype = Annotated[
    str, typer.Option(help="auto (as MODEL is stored), float32, bfloat16 or float16.", rich_help_panel=MEASURE)
]
Device = Annotated[
    str, typer.Option(help="auto (CUDA if there is a GPU), cpu, cuda or cuda:N.", rich_help_panel=MEASURE)
]
FromReport = Annotated[
    bool,
    typer.Option("--from-report", help="Trust the model's report.json instead of measuring.", rich_help_panel=MEASURE),
]

# ---- limits of a gate

MaxRatio = Annotated[
    float | None,
    typer.Option(help="Largest ratio of perplexity to the original's.", rich_help_panel=LIMITS, show_default=False),
]
MaxPerplexity = Annotated[
    float | None, typer.Option(help="Largest perplexity.", rich_help_panel=LIMITS, show_default=False)
]
MinSaving = Annotated[
    str | None,
    typer.Option(
        metavar="FRACTION",
        help="Smallest fraction of the KV cache that is saved: 70% or 0.7.",
        rich_help_panel=LIMITS,
        show_default=False,
    ),
]
MaxWorst = Annotated[
    float | None,
    typer.Option(
        "--max-worst-ratio",
        help="Largest ratio of perplexity on the worst kind of text in the packaged suite.",
        rich_help_panel=LIMITS,
        show_default=False,
    ),
]
MaxKl = Annotated[
    float | None,
    typer.Option(
        metavar="NATS",
        help="Largest KL(original ‖ model) of the next token, mean over the suite's kinds of text.",
        rich_help_panel=LIMITS,
        show_default=False,
    ),
]
MinAgreement = Annotated[
    str | None,
    typer.Option(
        metavar="FRACTION",
        help="Smallest fraction of tokens at which both models predict the same next token: 90% or 0.9.",
        rich_help_panel=LIMITS,
        show_default=False,
    ),
]
Baseline = Annotated[
    Path | None,
    typer.Option(
        help="report.json (or eval --json) of an earlier conversion to compare perplexity with.",
        rich_help_panel=LIMITS,
        show_default=False,
    ),
]
MaxRegression = Annotated[
    str | None,
    typer.Option(
        metavar="FRACTION",
        help="Largest increase of perplexity over the baseline's: 1% or 0.01. Default: 1%.",
        rich_help_panel=LIMITS,
        show_default=False,
    ),
]
