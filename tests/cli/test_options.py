"""Options made from the settings' fields: none of version 0.1 is gone, the pages about them are up to date, old names work."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import typer.main
from pydantic import BaseModel

from mla_convert.cli.main import app
from mla_convert.cli.options import from_settings
from mla_convert.core.errors import InputError, UsageError
from mla_convert.core.recipes import build_config, load_recipe
from mla_convert.core.settings import OLD_NAMES, ConvertConfig, Settings, option
from mla_convert.heal.settings import HealConfig

ROOT = Path(__file__).parents[2]
COMMANDS = typer.main.get_command(app).commands


def names(command, hidden=True):
    """Names of a command's options."""
    shown = [parameter for parameter in COMMANDS[command].params if hidden or not getattr(parameter, "hidden", False)]
    return {
        name
        for parameter in shown
        for name in (*parameter.opts, *getattr(parameter, "secondary_opts", ()))
        if name[0] == "-"
    }


def test_every_option_of_version_0_1_is_there():
    before = json.loads((Path(__file__).parent / "options_v01.json").read_text())
    assert before.keys() <= COMMANDS.keys()
    for command, known in before.items():
        assert set(known) <= names(command), command
    new = {"--rope-selection", "--calib-self-generated", "--cache-dtype", "--cache-group", "--cache-rope", "--nope-dim",
           "--original-cache"}  # fmt: skip
    assert names("sweep") - set(before["sweep"]) == new
    assert names("convert") - set(before["convert"]) == {*new, "--gpus", "--budget"}
    assert names("heal") - set(before["heal"]) == {"--original-cache", "--for-task"}


def test_old_names_are_hidden():
    old = {f"--{name.replace('_', '-')}" for name in OLD_NAMES}
    assert old <= names("convert") and not old & names("convert", hidden=False)


@pytest.mark.parametrize("model, command", [(ConvertConfig, "convert"), (HealConfig, "heal")])
def test_every_setting_is_an_option(model, command):
    made = {parameter.name for parameter in COMMANDS[command].params}
    assert model.model_fields.keys() - made <= {"teacher_revision"}


def test_no_command_says_less_than_its_fields(cli):
    out = " ".join(cli("convert", "--help")[1].replace("│", " ").split())
    for field in ConvertConfig.model_fields.values():
        assert (field.description or "").split(". ")[0][:40] in out


# ---- names of version 0.1


@pytest.mark.parametrize("old, new", [("loss", "by_loss"), ("table", "engine_table"), ("even", "evenly_spaced")])
def test_old_names_and_values_are_read(old, new, tmp_path):
    settings = {"planes": old, "calib_self": 0.25}
    for read in (Settings.model_validate(settings), build_config({"source": "o/n", **settings})):
        assert (read.rope_selection, read.calib_self_generated) == (new, 0.25)
    (tmp_path / "old.yaml").write_text(f"description: d\nsource: o/n\nsettings: {{planes: {old}, calib_self: 0.25}}\n")
    recipe = load_recipe(tmp_path / "old.yaml")
    assert (recipe.settings.rope_selection, recipe.settings.calib_self_generated) == (new, 0.25)
    assert "rope_selection" in recipe.settings.model_fields_set
    # an option under its old name goes before a recipe's setting, whichever name that has
    assert build_config({"recipe": str(tmp_path / "old.yaml"), "planes": "even"}).rope_selection == "evenly_spaced"


def test_both_names_at_once_are_refused(tmp_path):
    with pytest.raises(UsageError, match="planes is the old name of rope_selection"):
        build_config({"source": "o/n", "planes": "loss", "rope_selection": "by_loss"})
    (tmp_path / "both.yaml").write_text(
        "description: d\nsource: o/n\nsettings: {planes: loss, rope_selection: by_loss}\n"
    )
    with pytest.raises(InputError, match=r"both\.yaml, line 3: settings: planes is the old name"):
        load_recipe(tmp_path / "both.yaml")


@pytest.mark.parametrize("value", ["most", ["loss"], {"loss": 1}, 3])
def test_an_old_name_with_no_value_of_it(value):
    with pytest.raises(UsageError, match=r"^rope_selection: "):
        build_config({"source": "o/n", "planes": value})


def test_old_options_on_the_command_line(cli, sources):
    code, _, err = cli("convert", sources("llama"), "--planes", "most")
    assert code == 2 and "rope_selection" in err and err.count("\n") == 1


# ---- from_settings


class Sizes(BaseModel):
    """Settings of a test."""

    count: int = option("How many.", 3, panel="Sizes", ge=1)
    fast: bool | None = option("Quickly.", panel="Sizes")
    place: Path | None = option("Where.", panel="Sizes", unset="here", flag="--where")
    inner: int = 0


def call(*words, **options):
    given = {}

    @from_settings(Sizes, **options)
    def command(*, settings: dict, loud: bool = False) -> None:
        given.update(settings, loud=loud)

    single = typer.Typer()
    single.command()(command)
    single(list(words), standalone_mode=False)
    return given


def test_options_that_are_given_are_settings():
    assert call() == {"loud": False}
    words = ("--count", "2", "--no-fast", "--where", "x", "--loud")
    assert call(*words) == {"count": 2, "fast": False, "place": Path("x"), "loud": True}
    assert call("--count", "2", only=("count",)) == {"count": 2, "loud": False}


def test_unknown_fields_are_an_error():
    with pytest.raises(TypeError, match="has no fields colour"):
        call(skip=("colour",))


# ---- the pages


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_options_page", ROOT / "scripts" / "make_options_page.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_pages_are_up_to_date(script):
    hint = "run python scripts/make_options_page.py"
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), hint
    readme = script.README.read_text(encoding="utf-8")
    assert readme == script.with_table(readme), hint


def test_the_page_has_every_option(script):
    for command in COMMANDS:
        section = script.section(command, script.commands()[command])
        for name in names(command, hidden=False) - {"--help", "-h", "--verbose", "-v"}:
            assert f"`{name}`" in section, (command, name)
