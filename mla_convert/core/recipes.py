"""Recipes: named settings in YAML files, packaged or a user's own, and how options override them. Imports no torch."""

from __future__ import annotations

import difflib
import os
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mla_convert.core.errors import InputError, UsageError, one_line
from mla_convert.core.settings import ConvertConfig, Settings, with_new_names
from mla_convert.core.words import expanded
from mla_convert.core.yaml_positions import Marks, Scalars

YAML = (".yaml", ".yml")


class Recipe(BaseModel):
    """A named source with settings that suit it (one YAML file in `recipes/`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str = ""
    source: str
    revision: str | None = None
    aliases: list[str] = []
    settings: Settings = Settings()


def first_problem(error: ValidationError) -> str:
    """One line from a pydantic error: the setting and the problem with it."""
    return _problem(error.errors()[0])


def _problem(problem: Any) -> str:
    # For a union pydantic adds the member that it tried to the path; users know only the key.
    where = ".".join(str(part) for part in problem["loc"] if part not in ("int", "literal['full']"))
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def load_recipe(path: Any) -> Recipe:
    """Read and validate one recipe file.

    Raises:
        InputError: The file cannot be read, is not YAML, or has an unknown, repeated or ill-typed key. The message names the
            line, and for an unknown key the most similar known one.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"recipe {path} not found: give an existing YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path.name} cannot be read ({' '.join(str(error).split())})") from error
    try:
        # The text is parsed twice: the loaded values lack the line numbers that messages name.
        marks, content = Marks(text), yaml.load(text, Scalars)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or one_line(error)
        raise InputError(f"recipe {path.name}{_at(mark and mark.line + 1)}: not valid YAML: {problem}") from error
    repeated = marks.duplicate()
    # PyYAML would let the last of two equal keys win, in silence.
    if repeated:
        raise InputError(f"recipe {path.name}{_at(repeated[1])}: {repeated[0]} is given a second time")
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        # A misspelt key also makes the right one missing: report the misspelling.
        problem = min(error.errors(), key=lambda entry: entry["type"] != "extra_forbidden")
        words = _unknown_key(problem["loc"]) if problem["type"] == "extra_forbidden" else _problem(problem)
        raise InputError(f"recipe {path.name}{_at(marks.line(problem['loc']))}: {words}") from error


def _at(line: int | None) -> str:
    return f", line {line}" if line else ""


def _unknown_key(location: tuple[str | int, ...]) -> str:
    """The problem with a key that no recipe has, and the most similar known key."""
    known = [*Recipe.model_fields, *(f"settings.{key}" for key in Settings.model_fields)]
    key = str(location[-1])
    by_last = {name.rpartition(".")[2]: name for name in known}  # last parts are unique
    near = difflib.get_close_matches(key, by_last, n=1, cutoff=0.6)
    here = [last for last, name in by_last.items() if name == ".".join(map(str, (*location[:-1], last)))]
    hint = f"did you mean {by_last[near[0]]}?" if near else f"known there are {', '.join(here)}"
    return f"{'.'.join(map(str, location))} is no key of a recipe: {hint}"


def recipe_files() -> dict[str, Any]:
    """The packaged recipe files by name."""
    files = resources.files("mla_recipes").iterdir()
    return {file.name.removesuffix(".yaml"): file for file in sorted(files, key=str) if file.name.endswith(".yaml")}


def find_recipe(name: str) -> Recipe | None:
    """The packaged recipe of that name or alias, or None."""
    file = packaged_recipe(name)
    return None if file is None else load_recipe(file)


def packaged_recipe(name: str) -> Any:
    """The file of the packaged recipe of that name or alias, or None."""
    files = recipe_files()
    if name in files:
        return files[name]
    return next((file for file in files.values() if name in load_recipe(file).aliases), None)


def _recipe_hint(name: str) -> str:
    """The packaged recipe whose name or alias is most similar to `name`, or all of them."""
    names = [*recipe_files(), *(alias for file in recipe_files().values() for alias in load_recipe(file).aliases)]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known recipes: {', '.join(sorted(recipe_files()))}."


def unknown_source(name: str) -> InputError:
    """The error for a name that is no path, recipe or Hub id; suggests the most similar recipe."""
    return InputError(f"{name!r} is no folder, .gguf file, recipe or Hub id (owner/name): {_recipe_hint(name)}")


def recipe_file(name: str) -> Any:
    """The file of a recipe named by its path, or of a packaged one named by its name or alias.

    Raises:
        InputError: There is no such recipe.
    """
    files = recipe_files()
    # A file without the suffix counts unless it has the name of a packaged recipe, which it would hide.
    if Path(name).suffix in YAML or (Path(name).is_file() and name not in files):
        return expanded(name)
    file = packaged_recipe(name)
    if file is None:
        raise InputError(f"{name!r} is neither a YAML file nor a packaged recipe: {_recipe_hint(name)}")
    return file


def build_config(options: dict[str, Any]) -> ConvertConfig:
    """The settings of a recipe, if one is named, overridden by the given options.

    A recipe is named by the source itself (packaged name or YAML path) or by the option `recipe`. Beside the latter a source
    may be given, which replaces the recipe's.

    Args:
        options: Settings by name, also by their names in version 0.1; those that are None are not given.

    Raises:
        UsageError: Options out of range or contradicting each other, or neither source nor recipe.
        InputError: The recipe is not valid.
    """
    try:
        # Renamed before the merge with a recipe: an old name would not override the recipe's new one, and both together
        # are refused.
        given = with_new_names({key: value for key, value in options.items() if value is not None})
    except ValueError as error:
        raise UsageError(str(error)) from error
    named, source = given.pop("recipe", None), given.get("source")
    if named is None and source is None:
        raise UsageError("no SOURCE is given: name a folder, Hub id, .gguf file or recipe, or give --recipe FILE")
    # A checkpoint's folder may have the name of a packaged recipe; what is on the disk then counts.
    as_recipe = None if source is None or Path(source).is_dir() else _recipe_of_source(source)
    if named and as_recipe:
        raise UsageError(f"SOURCE {source} is a recipe too: give one of the two")
    recipe = load_recipe(recipe_file(named)) if named else as_recipe
    base: dict[str, Any] = {}
    if recipe:
        # Without defaults: `--for` and `--export` change only settings that nobody has stated
        # (publish/engines/target_engine.py).
        base = recipe.settings.model_dump(exclude_unset=True)
        if as_recipe:
            given.pop("source")
        if "source" not in given:
            base["source"] = recipe.source
            base["out"] = Path(_recipe_output(str(named or source), recipe))
            if recipe.revision:
                base["revision"] = recipe.revision
    # A given rank replaces a recipe's ratio and the other way round; a recipe's rope_dim belongs to its size.
    if {"rank", "kv_ratio"} & given.keys():
        if given.get("rank", base.get("rank")) != base.get("rank") or "kv_ratio" in given:
            base.pop("rope_dim", None)
        base.pop("rank", None)
        base.pop("kv_ratio", None)
    if "budget" in given:  # it chooses what the recipe has chosen
        base.pop("calib_samples", None)
        base.pop("refine_steps", None)
    try:
        return ConvertConfig.model_validate({**base, **given})
    except ValidationError as error:
        raise UsageError(first_problem(error)) from error


def _recipe_of_source(source: str) -> Recipe | None:
    """The recipe that SOURCE names by path or name; None if SOURCE names a checkpoint."""
    if Path(source).suffix in YAML:
        return load_recipe(expanded(source))
    return None if Path(source).exists() else find_recipe(source)


def _recipe_output(name: str, recipe: Recipe) -> str:
    """Output folder of a recipe, named after the recipe, or after its source if the file is called recipe.yaml."""
    path = Path(name)
    if path.suffix not in YAML:
        return default_name(name)
    return default_name(recipe.source if path.stem == "recipe" else path.stem)


def default_name(source: str) -> str:
    """Name of the output folder when none is given."""
    return Path(os.path.abspath(source)).name.removesuffix(".gguf") + "-mla"
