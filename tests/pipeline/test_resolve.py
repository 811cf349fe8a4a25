"""`resolve`: one resolution of the settings, which the dry run, the conversion, its report and its recipe share."""

import dataclasses
import json

import pytest
import torch
import yaml

from mla_convert.core.errors import InputError, UsageError
from mla_convert.core.settings import ConvertConfig
from mla_convert.pipeline.dry_run import plan_conversion
from mla_convert.pipeline.resolve import resolve
from mla_convert.source.source import open_source

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def resolved(sources):
    def get(name="llama", device=CPU, **settings):
        config = ConvertConfig(source=str(sources(name)), **settings)
        return resolve(config, open_source(config.source, weights=False), device)

    return get


def test_defaults_depend_on_the_device(resolved):
    cpu, cuda = resolved(), resolved(device=CUDA)
    assert cpu.calibration == (32, 256) and cuda.calibration == (2048, 256)  # of a model with 256 positions
    assert (cpu.refinement.steps, cpu.refinement.block) == (30, 1)
    assert cuda.refinement.steps == 200 and cuda.refinement.block > 1 and cuda.refinement.output_steps > 0
    assert cpu.plan == cuda.plan and not cpu.uniform and cpu.is_measured and cpu.healing is None


def test_steps_of_blocks_follow_the_windows_that_the_text_fills(resolved):
    full = resolved(device=CUDA, calib_self_generated=0)
    few = full.for_texts(250, 256)
    assert few.calibration == (250, 256) and few.generated == 0
    assert few.refinement.block_steps == 200 * 250 // 125 < full.refinement.block_steps


def test_self_generated_windows_stand_beside_those_of_the_texts(resolved):
    mixed = resolved(device=CUDA, calib_self_generated=0.75, calib_samples=200).for_texts(50, 256)
    assert (mixed.calibration, mixed.generated) == ((200, 256), 150)
    assert mixed.self_generated == mixed.chosen["calib_self_generated"] == 0.75
    again = resolved(device=CUDA, calib_self_generated=0.75, calib_samples=mixed.calibration[0])
    assert again.for_texts(50, 256).calibration == mixed.calibration  # as a recipe repeats it


def test_it_is_frozen(resolved):
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolved().plan = None


def test_an_engine_stays_in_the_settings(resolved):
    first = resolved(engine="llama.cpp", rank=12)
    assert first.settings.engine == "llama.cpp" and first.uniform
    assert (first.plan.rank, first.plan.rope_dim, first.settings.rope_selection) == (12, 8, "engine_table")
    again = resolve(first.settings, first.source, CPU)
    assert again.settings == first.settings and again.plan == first.plan


@pytest.mark.parametrize(
    "settings, error",
    [({"rank": 99}, InputError), ({"engine": "vllm", "rank": 12}, UsageError), ({"kv_ratio": 3}, InputError)],
)
def test_sizes_that_cannot_be_are_refused(resolved, settings, error):
    with pytest.raises(error):
        resolved(**settings)


def test_healing_is_resolved_once(resolved):
    healing = resolved(heal_tokens=2000, heal_train="attention", heal_lr=0.1, seed=3).healing
    assert (healing.tokens, healing.train, healing.lr, healing.seed) == (2000, "attention", 0.1, 3)
    assert healing.model_fields_set == {"tokens", "train", "lr", "seed"}  # healing's own defaults for the others


@pytest.mark.parametrize("size", [("--kv-ratio", 0.5), ("--for", "llama.cpp", "--rank", 12)])
def test_report_and_recipe_record_what_was_resolved(cli, sources, resolved, tmp_path, size):
    text = sources("llama").parent / "text.txt"
    small = ("--calib", text, "--eval", text, "--calib-samples", 8, "--calib-length", 32, "--eval-windows", 2, "--eval-length",
             32, "--suite-windows", 0, "--refine-steps", 2, "--device", "cpu", "-q")  # fmt: skip
    code, _, err = cli("convert", sources("llama"), *size, *small, "--out", tmp_path / "first")
    assert code == 0, err
    engine = {"engine": "llama.cpp", "rank": 12} if "--for" in size else {"kv_ratio": 0.5}
    expected = resolved(calib_samples=8, calib_length=32, refine_steps=2, **engine)
    reported = json.loads((tmp_path / "first" / "report.json").read_text())["settings"]
    recipe = yaml.safe_load((tmp_path / "first" / "recipe.yaml").read_text())["settings"]
    for name, value in expected.chosen.items():
        assert reported[name] == recipe[name] == value, name
    assert (recipe["rank"], recipe["rope_dim"]) == (expected.plan.rank, expected.plan.rope_dim)
    assert recipe.get("engine") == expected.settings.engine == reported["engine"]
    planned = plan_conversion(expected.settings.model_copy(update={"kv_ratio": None, "rank": recipe["rank"]}))
    assert planned.cache.plan.cache_width == expected.plan.cache_width
    # the recipe, engine included, gives the same weights
    code, _, err = cli("--recipe", tmp_path / "first" / "recipe.yaml", "--out", tmp_path / "second",
                       sources("llama"), "--calib", text, "--eval", text, "--device", "cpu", "-q")  # fmt: skip
    assert code == 0, err
    sums = [json.loads((tmp_path / name / "report.json").read_text())["checksums"] for name in ("first", "second")]
    assert sums[0] == sums[1]
