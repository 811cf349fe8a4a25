"""The packaged recipes: valid, distinct, and of sizes that the models they name can have."""

import re
from pathlib import Path

import pytest

from mla_convert.config import build_config, find_recipe, load_recipe, recipe_files, unknown_source
from mla_convert.errors import InputError, UsageError
from mla_convert.plan import AttentionShape, make_plan

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
    assert 0 < plan.ratio < 1 and plan.rope_dim % 16 == plan.rank % 16 == 0
    assert recipe.source.startswith("package:") if name == "demo" else recipe.source.count("/") == 1
    said = re.search(r"(\d+%|half|a third|a quarter) (of )?its cache", recipe.description)
    if said:
        share = SAID[said[1]] if said[1] in SAID else int(said[1][:-1]) / 100
        assert plan.ratio == pytest.approx(share, abs=0.005), "the description says another size"


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
    with pytest.raises(UsageError, match="two ways to say one thing"):
        build_config({"source": "demo", "rank": 8, "kv_ratio": 0.5})
    with pytest.raises(UsageError, match=r"^dtype: "):
        build_config({"source": "demo", "dtype": "int8"})


def test_a_folder_goes_before_a_recipe_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    config = build_config({"source": "demo"})
    assert config.source == "demo" and config.kv_ratio is None


@pytest.mark.parametrize(
    "typed, hint", [("llama-8bb", "'llama-8b'"), ("Demo", "'demo'"), ("xyzzy", "known recipes: demo,")]
)
def test_unknown_names_get_a_hint(typed, hint):
    assert hint in str(unknown_source(typed))
