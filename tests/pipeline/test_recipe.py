"""The packaged recipes: valid, distinct, and of sizes that the models they name can have; a user's own; those written."""

import json
import os
import re
from pathlib import Path

import pytest
import yaml

from mla_convert.core.errors import InputError, UsageError
from mla_convert.core.recipes import build_config, find_recipe, load_recipe, recipe_files, unknown_source
from mla_convert.core.settings import Settings
from mla_convert.method.factorise.sizes import make_plan
from mla_convert.source import texts
from mla_convert.source.shape import AttentionShape

# As published: layers, hidden size, heads, key/value heads, head size, bias on key or value.
SHAPES = {
    "demo": AttentionShape(6, 256, 4, 2, 64),
    "smollm2-135m": AttentionShape(30, 576, 9, 3, 64),
    "llama-1b": AttentionShape(16, 2048, 32, 8, 64),
    "llama-3b": AttentionShape(28, 3072, 24, 8, 128),
    "llama-8b": AttentionShape(32, 4096, 32, 8, 128),
    "llama2-7b": AttentionShape(32, 4096, 32, 32, 128),
    "mistral-7b": AttentionShape(32, 4096, 32, 8, 128),
    "qwen2.5-0.5b": AttentionShape(24, 896, 14, 2, 64, True),
    "qwen2.5-7b": AttentionShape(28, 3584, 28, 4, 128, True),
}
SAID = {"half": 0.5, "a third": 1 / 3, "a quarter": 0.25}


def test_all_are_known_here():
    assert recipe_files().keys() == SHAPES.keys()


@pytest.mark.parametrize("name", SHAPES)
def test_recipe(name):
    recipe = find_recipe(name)
    plan = make_plan(recipe.settings, SHAPES[name])
    assert 0 < plan.cache_ratio < 1 and plan.rope_dim % 16 == plan.rank % 16 == 0
    assert recipe.source.startswith("package:") if name == "demo" else recipe.source.count("/") == 1
    said = re.search(r"(\d+%|half|a third|a quarter) (of )?its cache", recipe.description)
    if said:
        share = SAID[said[1]] if said[1] in SAID else int(said[1][:-1]) / 100
        assert plan.cache_ratio == pytest.approx(share, abs=0.005), "the description says another size"


def test_names_and_aliases_are_unique():
    aliases = [alias for file in recipe_files().values() for alias in load_recipe(file).aliases]
    assert len({*aliases, *recipe_files()}) == len(aliases) + len(recipe_files())
    for alias in aliases:
        assert find_recipe(alias) is not None


def test_default_size_of_the_8b():
    plan = make_plan(find_recipe("llama-3.1-8b").settings, SHAPES["llama-8b"])
    assert (plan.rank, plan.rope_dim) == (512, 64)


@pytest.mark.parametrize(
    "content, problem",
    [
        ("description: d\nsource: o/n\ncolour: red", "colour"),
        ("description: d\nsource: o/n\nsettings: {rnak: 5}", "settings.rnak"),
        ("description: d\nsource: o/n\nsettings: {rank: many}", "settings.rank"),
        ("description: d\nsource: o/n\nsettings: {refine_steps: -1}", "settings.refine_steps"),
        ("description: d\nsource: o/n\nsettings: {rank: 8, kv_ratio: 0.5}", "rank and kv_ratio"),
        ("description: d", "source"),
        ("- a list", "bad.yaml"),
        ("", "bad.yaml"),
        ("description: [unclosed", "not valid YAML"),
        ("description: !!python/object/apply:os.getcwd []\nsource: o/n", "not valid YAML"),
    ],
)
def test_bad_recipes_are_refused_by_name(tmp_path: Path, content, problem):
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(InputError, match=r"bad\.yaml") as error:
        load_recipe(tmp_path / "bad.yaml")
    assert problem in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, rank, rope_dim, kv_ratio",
    [
        ({}, 512, 64, None),
        ({"rank": 256}, 256, None, None),
        ({"rank": 512}, 512, 64, None),
        ({"rank": 256, "rope_dim": 32}, 256, 32, None),
        ({"kv_ratio": 0.5}, None, None, 0.5),
        ({"rope_dim": 32}, 512, 32, None),
    ],
)
def test_options_override_a_recipe(options, rank, rope_dim, kv_ratio):
    config = build_config({"source": "llama-8b", **options})
    assert (config.rank, config.rope_dim, config.kv_ratio) == (rank, rope_dim, kv_ratio)
    assert config.source == "meta-llama/Llama-3.1-8B" and config.calib_samples == 128
    assert config.out == Path("llama-8b-mla")


def test_options_out_of_range_are_refused():
    with pytest.raises(UsageError, match="both set the size"):
        build_config({"source": "demo", "rank": 8, "kv_ratio": 0.5})
    with pytest.raises(UsageError, match=r"^dtype: "):
        build_config({"source": "demo", "dtype": "int8"})


def test_a_folder_goes_before_a_recipe_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    bounded = build_config({"source": "demo", "budget": "10min"})  # it chooses what the recipe has chosen
    assert bounded.budget == 600 and bounded.calib_samples is bounded.refine_steps is None
    config = build_config({"source": "demo"})
    assert config.source == "demo" and config.kv_ratio is None


@pytest.mark.parametrize(
    "typed, hint", [("llama-8bb", "'llama-8b'"), ("Demo", "'demo'"), ("xyzzy", "known recipes: demo,")]
)
def test_unknown_names_get_a_hint(typed, hint):
    assert hint in str(unknown_source(typed))


# ---- what is wrong, and in which line


SETTINGS = "description: d\nsource: o/n\nsettings:\n"
UNKNOWN = "is no key of a recipe: did you mean"
KEYS = "description, source, revision, aliases, settings"


@pytest.mark.parametrize(
    "content, line, problem",
    [
        (SETTINGS + "  rnak: 5\n", 4, f"settings.rnak {UNKNOWN} settings.rank?"),
        (
            SETTINGS + "\n  # a comment\n  calib_sample: 5\n",
            6,
            f"settings.calib_sample {UNKNOWN} settings.calib_samples?",
        ),
        (SETTINGS + "  revision: main\n", 4, f"settings.revision {UNKNOWN} revision?"),
        ("description: d\nsorce: o/n\n", 2, f"sorce {UNKNOWN} source?"),
        ("description: d\nsource: o/n\nrank: 5\n", 3, f"rank {UNKNOWN} settings.rank?"),
        ("description: d\nsource: o/n\nxyzzy: 1", 3, f"xyzzy is no key of a recipe: known there are {KEYS}"),
        (SETTINGS + "  rank: 8\n  seed: x\n", 5, "settings.seed: "),
        (SETTINGS + "  rank: 8\n  kv_ratio: 0.5\n", 3, "settings: rank and kv_ratio"),
        (SETTINGS + "  rank: 8\n  rank: 16\n", 5, "settings.rank is given a second time"),
        ("description: d\nsource: o/n\naliases:\n - a\n - [b]\n", 5, "aliases.1: "),
        ("description: d\nsource: 'o/n\n", 3, "not valid YAML: found unexpected end"),
        ("description: d\n  source: o/n\n", 2, "not valid YAML: mapping values are not allowed here"),
        ("description: d\nsource: \x07\n", None, "not valid YAML: "),
        ("[" * 1500, None, "not valid YAML: "),
        ("&a [*a]\n", None, "Input should be a valid dictionary"),
    ],
)
def test_problems_name_their_line(cli, tmp_path, content, line, problem):
    (tmp_path / "bad.yaml").write_text(content)
    code, out, err = cli("recipes", tmp_path / "bad.yaml")
    where = f", line {line}" if line else ""
    assert code == 4 and not out and len(err.splitlines()) == 1
    assert err.startswith(f"mla-convert: recipe bad.yaml{where}: {problem}")


def test_a_recipe_that_is_no_text(cli, tmp_path):
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder.yml").mkdir()
    assert cli("recipes", tmp_path / "bad.yaml")[0] == cli("recipes", tmp_path / "folder.yml")[0] == 4
    code, _, err = cli("--recipe", tmp_path / "none.yaml")
    assert code == 4 and "none.yaml not found" in err


# ---- the command


def test_list(cli):
    code, out, err = cli("recipes")
    assert code == 0 and not err
    for name in SHAPES:
        assert name in out
    assert "rank 512 + 64" in out and "50% of the cache" in out and "meta-llama/Llama-3.1-8B" in out


def test_list_as_json(cli):
    code, out, err = cli("recipes", "--json")
    found = {entry["name"]: entry for entry in json.loads(out)}
    assert code == 0 and not err and found.keys() == SHAPES.keys()
    assert found["llama-8b"]["settings"]["rank"] == 512 and found["llama-8b"]["aliases"] == ["llama-3.1-8b"]


@pytest.mark.parametrize("words", [["llama-8b"], ["show", "llama-8b"], ["show", "llama-3.1-8b"]])
def test_show(cli, words):
    code, out, err = cli("recipes", *words)
    assert (code, out, err) == (0, recipe_files()["llama-8b"].read_text(encoding="utf-8"), "")
    entry = json.loads(cli("recipes", *words, "--json")[1])
    assert entry == {"name": "llama-8b", **yaml.safe_load(out)}


def test_what_is_shown_can_be_used(cli, tmp_path):
    (tmp_path / "mine.yaml").write_text(cli("recipes", "llama-8b")[1])
    mine, packaged = build_config({"source": str(tmp_path / "mine.yaml")}), build_config({"source": "llama-8b"})
    assert mine == packaged.model_copy(update={"out": Path("mine-mla")})


@pytest.mark.parametrize(
    "words, code, culprit",
    [(["llama-8"], 4, "did you mean 'llama-8b'?"), (["show"], 2, "no NAME"), (["demo", "llama-8b"], 2, "one recipe at a time")],
)  # fmt: skip
def test_show_refuses(cli, words, code, culprit):
    found, out, err = cli("recipes", *words)
    assert found == code and culprit in err and len(err.splitlines()) == 1 and not out


# ---- --recipe


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.yaml").write_text("description: d\nsource: o/n\nrevision: abc\nsettings: {rank: 64, seed: 3}\n")
    return str(tmp_path / "mine.yaml")


def test_a_source_takes_the_place_of_the_recipes(mine):
    config = build_config({"recipe": mine})
    assert (config.source, config.revision, config.rank, config.out) == ("o/n", "abc", 64, Path("mine-mla"))
    config = build_config({"recipe": mine, "source": "./model", "rank": 32})
    assert (config.source, config.revision, config.rank, config.seed, config.out) == ("./model", None, 32, 3, None)
    assert build_config({"recipe": "llama-8b", "source": "./model"}).rank == 512


def test_two_recipes_or_no_source_are_refused(cli, mine):
    with pytest.raises(UsageError, match="llama-8b is a recipe too"):
        build_config({"recipe": mine, "source": "llama-8b"})
    code, out, err = cli("--rank", 8)
    assert code == 2 and "no SOURCE" in err and len(err.splitlines()) == 1 and not out
    code, _, err = cli("convert", "--recipe", "llama8b")
    assert code == 4 and "did you mean 'llama-8b'?" in err


# ---- recipe.yaml of an output


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize(
    "name, size",
    [("llama", ("--kv-ratio", 0.4)), ("llama", ("--rank", "full", "--rope-dim", "full")), ("qwen2", ("--rank", 6))],
)
def test_written_recipe_repeats_the_run(cli, sources, tmp_path, monkeypatch, name, size):
    folder = sources(name)
    monkeypatch.chdir(folder.parent)
    code, _, err = cli("source", *size, "-q", "--calib", "text.txt", "--eval", folder.parent / "text.txt", "--calib-samples", 8,
                       "--calib-length", 32, "--eval-windows", 2, "--refine-steps", 2, "--seed", 5, "--device", "cpu",
                       "--out", tmp_path / "first")  # fmt: skip
    assert code == 0, err
    recipe = tmp_path / "first" / "recipe.yaml"
    assert cli("-q", "--recipe", recipe, "--device", "cpu", "--out", tmp_path / "second")[0] == 0
    assert shards(tmp_path / "second") == shards(tmp_path / "first")
    assert (tmp_path / "second" / "recipe.yaml").read_bytes() == recipe.read_bytes()

    monkeypatch.chdir(tmp_path)  # from elsewhere, by the paths
    text = folder.parent / "text.txt"
    code, out, _ = cli("-q", folder, "--recipe", recipe, "--calib", text, "--eval", text, "--device", "cpu", "--out",
                       tmp_path / "third", "--json")  # fmt: skip
    assert code == 0 and shards(tmp_path / "third") == shards(tmp_path / "first")
    checksums = json.loads((tmp_path / "first" / "report.json").read_text())["checksums"]
    assert json.loads(out)["checksums"] == checksums


def test_written_recipe_holds_every_setting_and_no_path(convert_pico, sources):
    report = convert_pico("llama", kv_ratio=0.4)
    content = (report.out / "recipe.yaml").read_text()
    assert str(sources("llama").parent) not in content and os.path.expanduser("~") + "/" not in content
    assert "# source was a local file or folder" in content and "# text.txt was a local file" in content
    recipe = load_recipe(report.out / "recipe.yaml")
    absent = {
        "kv_ratio",
        "budget",
        "cache_group",
        "cache_rope",
        "engine",
        "held_out",
        "nope_dim",
        "original_cache",
        *(name for name in Settings.model_fields if name.startswith("heal_")),
    }
    assert recipe.settings.model_fields_set == {*Settings.model_fields} - absent
    assert None not in recipe.settings.model_dump(exclude=absent).values()
    assert recipe.settings.rank == report.cache["kv_lora_rank"] and recipe.source == "source"


def test_written_recipe_of_a_packaged_source(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = (
        "--refine-steps",
        0,
        "--calib-samples",
        8,
        "--calib-length",
        64,
        "--eval-windows",
        1,
        "--eval-length",
        64,
        "--device",
        "cpu",
        "-q",
    )
    assert cli("demo", *options, "--out", "first")[0] == 0
    content = yaml.safe_load((tmp_path / "first" / "recipe.yaml").read_text())
    assert content["source"] == "package:mla_demo/model" and content["settings"]["calib"].startswith(
        "package:mla_demo/"
    )
    assert "local" not in (tmp_path / "first" / "recipe.yaml").read_text()
    assert cli("first/recipe.yaml", "-q", "--device", "cpu")[0] == 0
    assert shards(tmp_path / "model-mla") == shards(tmp_path / "first")


def test_texts_that_stood_in_are_named(tmp_path):
    fetched = "Salesforce/wikitext:wikitext-2-raw-v1@train"
    assert texts.repeatable(None, fetched, "calibration") == (fetched, False)
    fallen_back = "mla_demo/calibration.txt.gz (WikiText-2 could not be fetched from the Hub)"
    assert texts.repeatable(None, fallen_back, "calibration") == ("package:mla_demo/calibration.txt.gz", False)
    (tmp_path / "mine.txt").write_text("a text")
    assert texts.repeatable(str(tmp_path / "mine.txt"), "mine.txt", "evaluation") == ("mine.txt", True)
    assert texts.repeatable("owner/name@test", "owner/name@test", "evaluation") == ("owner/name@test", False)
