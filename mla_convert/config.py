"""Settings of a conversion, and the recipes that hold them by name. Imports no torch."""

from __future__ import annotations

import difflib
import os
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mla_convert.errors import InputError, UsageError

Full = Literal["full"]


class Settings(BaseModel):
    """What a conversion does, apart from where its source and output lie. Recipes may set any of these."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int | Full | None = None
    rope_dim: int | Full | None = None
    kv_ratio: float | None = None
    planes: Literal["loss", "even"] = "loss"
    calib: str | None = None
    calib_samples: int | None = Field(None, ge=1)
    calib_length: int | None = Field(None, ge=16)
    eval: str | None = None
    eval_windows: int = Field(40, ge=1)
    eval_length: int | None = Field(None, ge=16)
    refine_steps: int | None = Field(None, ge=0)
    refine_batch: int | None = Field(None, ge=1)
    refine_lr: float = Field(0.02, gt=0, le=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _rank_or_ratio(self) -> Settings:
        if self.rank is not None and self.kv_ratio is not None:
            raise ValueError("rank and kv_ratio are two ways to say one thing: give one of them")
        return self


class ConvertConfig(Settings):
    """One conversion: a source, an output folder, a device and the settings."""

    source: str
    revision: str | None = None
    out: Path | None = None
    overwrite: bool = False
    device: str = "auto"


class Recipe(BaseModel):
    """A named source with settings that were found to suit it (one YAML file in `recipes/`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str
    source: str
    revision: str | None = None
    aliases: list[str] = []
    settings: Settings = Settings()


def first_problem(error: ValidationError) -> str:
    """One line from a pydantic error: the setting and what is wrong with it."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"] if part not in ("int", "literal['full']"))
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def load_recipe(path: Any) -> Recipe:
    """Read and validate one recipe file.

    Raises:
        InputError: the file is not YAML, or has an unknown or ill-typed key.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Recipe.model_validate(content)
    except yaml.YAMLError as error:
        raise InputError(f"recipe {path.name} is not valid YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise InputError(f"recipe {path.name}: {first_problem(error)}") from error


def recipe_files() -> dict[str, Any]:
    """The packaged recipe files by name."""
    files = resources.files("mla_recipes").iterdir()
    return {file.name.removesuffix(".yaml"): file for file in sorted(files, key=str) if file.name.endswith(".yaml")}


def find_recipe(name: str) -> Recipe | None:
    """The packaged recipe of that name or alias, or None."""
    files = recipe_files()
    if name in files:
        return load_recipe(files[name])
    for file in files.values():
        recipe = load_recipe(file)
        if name in recipe.aliases:
            return recipe
    return None


def unknown_source(name: str) -> InputError:
    """The error for a name that is no path, recipe or Hub id; suggests the nearest recipe."""
    names = [*recipe_files(), *(alias for file in recipe_files().values() for alias in load_recipe(file).aliases)]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known recipes: {', '.join(sorted(recipe_files()))}."
    return InputError(f"{name!r} is no folder, .gguf file, recipe or Hub id (owner/name): {hint}")


def build_config(options: dict[str, Any]) -> ConvertConfig:
    """Settings of a recipe, if the source names one, overridden by the options given (those that are not None).

    Raises:
        UsageError: options out of range or contradicting each other.
    """
    given = {key: value for key, value in options.items() if value is not None}
    source = given["source"]
    recipe = None if Path(source).exists() else find_recipe(source)
    base: dict[str, Any] = {}
    if recipe:
        base = recipe.settings.model_dump(exclude_unset=True)
        base["source"] = recipe.source
        if recipe.revision:
            base["revision"] = recipe.revision
        base["out"] = Path(default_name(source))
        given.pop("source")
    # A rank given replaces a recipe's ratio and the other way round; a recipe's rope_dim belongs to its size.
    if {"rank", "kv_ratio"} & given.keys():
        if given.get("rank", base.get("rank")) != base.get("rank") or "kv_ratio" in given:
            base.pop("rope_dim", None)
        base.pop("rank", None)
        base.pop("kv_ratio", None)
    try:
        return ConvertConfig.model_validate({**base, **given})
    except ValidationError as error:
        raise UsageError(first_problem(error)) from error


def default_name(source: str) -> str:
    """Name of the output folder when none is given."""
    return Path(os.path.abspath(source)).name.removesuffix(".gguf") + "-mla"
