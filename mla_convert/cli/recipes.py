"""`mla-convert recipes`: list the packaged recipes, or print one."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from mla_convert.cli.options import Verbose
from mla_convert.core.errors import UsageError
from mla_convert.core.words import say

EXAMPLE = "mla-convert recipes show llama-8b"


def recipes(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[show] NAME", help="Recipe to print: name, alias or YAML file.", show_default=False),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
    verbose: Verbose = False,
) -> None:
    """List the recipes, or print the YAML of one, to start your own from (`mla-convert ./mine.yaml`)."""
    from mla_convert.core.recipes import Recipe, load_recipe, recipe_file, recipe_files

    words = list(words or [])
    if words[:1] == ["show"]:
        words.pop(0)
        if not words:
            raise UsageError("recipes show: no NAME is given (mla-convert recipes lists them)")
    if len(words) > 1:
        raise UsageError(f"recipes prints one recipe at a time: {' '.join(words)!r} are {len(words)}")

    def entry(name: str, recipe: Recipe) -> dict[str, Any]:
        return {"name": name, **recipe.model_dump(exclude_unset=True, mode="json")}

    if words:
        file = recipe_file(words[0])
        recipe = load_recipe(file)  # an invalid recipe is not printed
        if json_:
            say(json.dumps(entry(file.name.rpartition(".")[0], recipe), indent=2))
        else:
            say(file.read_text(encoding="utf-8"), end="")
        return
    known = {name: load_recipe(file) for name, file in recipe_files().items()}
    if json_:
        say(json.dumps([entry(name, recipe) for name, recipe in known.items()], indent=2))
        return
    from rich.table import Table

    from mla_convert.core.console import Terminal

    table = Table(title="mla-convert NAME", title_justify="left", show_lines=True)
    table.add_column("name", no_wrap=True)
    table.add_column("source, description")
    table.add_column("size", no_wrap=True)
    for name, recipe in known.items():
        table.add_row("\n".join([name, *recipe.aliases]), f"{recipe.source}\n{recipe.description}", _size(recipe))
    Terminal().print(table)


def _size(recipe: Any) -> str:
    """Rank and rotary dims, or the fraction of the cache that is kept, as far as the recipe sets them."""
    settings = recipe.settings
    if settings.rank is not None:
        return f"rank {settings.rank}" + (f" + {settings.rope_dim}" if settings.rope_dim is not None else "")
    return f"{settings.kv_ratio:.0%} of the cache" if settings.kv_ratio is not None else "default"
