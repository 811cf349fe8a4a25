"""A budget of time chooses windows and steps by the plan's estimate, says so, and is bounded by the defaults."""

import json

import pytest
import torch
import yaml

from mla_convert.core.errors import UsageError
from mla_convert.core.recipes import build_config
from mla_convert.pipeline.budget import STEPS, WINDOWS, within_budget
from mla_convert.pipeline.dry_run import plan_conversion
from mla_convert.pipeline.resolve import resolve
from mla_convert.source.source import open_source

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def source(sources):
    return open_source(str(sources("llama")))


def config_of(source, **settings):
    return build_config({"source": str(source.folder), **settings})


def seconds(config, place="cpu"):
    """The middle of the plan's range."""
    low, high = plan_conversion(config).run.time[place].seconds
    return (low * high) ** 0.5


@pytest.mark.parametrize(
    "place, device, fraction", [("cpu", CPU, 0.9), ("cpu", CPU, 0.7), ("h100", CUDA, 0.9), ("h100", CUDA, 0.3)]
)
def test_the_estimate_of_the_choice_is_within_the_budget(source, place, device, fraction):
    least = seconds(config_of(source, calib_samples=WINDOWS, refine_steps=STEPS), place)
    budget = least + fraction * (seconds(config_of(source), place) - least)
    chosen, words = within_budget(config_of(source, budget=budget), source, device)
    plain = resolve(config_of(source), source, device)
    taken = seconds(chosen.model_copy(update={"budget": None}), place)
    assert 0.8 * budget < taken <= budget * 1.0001
    assert chosen.calib_samples < plain.calibration[0] and chosen.refine_steps < plain.refinement.steps
    assert f"{chosen.calib_samples} calibration windows and {chosen.refine_steps} steps" in words


def test_defaults_are_the_most(source):
    chosen, _ = within_budget(config_of(source, budget="100h"), source, CPU)
    plain = resolve(config_of(source), source, CPU)
    assert (chosen.calib_samples, chosen.refine_steps) == (plain.calibration[0], plain.refinement.steps)
    assert within_budget(config_of(source), source, CPU) == (config_of(source), None)


def test_a_given_number_stays(source):
    budget = 0.5 * seconds(config_of(source, refine_steps=200))
    chosen, _ = within_budget(config_of(source, budget=budget, calib_samples=32), source, CPU)
    assert chosen.calib_samples == 32 and chosen.refine_steps <= 30


def test_several_processes_do_more_in_the_time(source):
    budget = config_of(source, budget=0.75 * seconds(config_of(source)))
    alone, shared = (within_budget(budget, source, CPU, count)[0] for count in (1, 4))
    assert shared.calib_samples > alone.calib_samples


def test_too_little_is_refused(source, cli):
    with pytest.raises(UsageError, match="at least, more than --budget"):
        within_budget(config_of(source, budget=1e-9), source, CPU)
    assert cli("plan", source.folder, "--budget", "0.000001s")[0] == 0  # it says so for each device
    for value, word in (("10", "no duration"), ("0s", "no duration"), ("5 days", "no duration")):
        code, _, err = cli("plan", source.folder, "--budget", value)
        assert code == 2 and word in err
    code, _, err = cli(source.folder, "--budget", "1h", "--calib-samples", 8, "--refine-steps", 3)
    assert code == 2 and "at most one" in err


def test_the_choice_is_recorded(source, convert_folder):
    budget = 0.5 * seconds(
        config_of(source, calib_length=48, eval_windows=4, eval_length=48, suite_windows=0, uniform=True)
    )
    report = convert_folder(source.folder, budget=budget, calib_samples=None, refine_steps=None)
    written = json.loads((report.out / "report.json").read_text())
    (note,) = [line for line in written["notes"] if "for a budget of" in line]
    settings = yaml.safe_load((report.out / "recipe.yaml").read_text())["settings"]
    assert f"{settings['calib_samples']} calibration windows and {settings['refine_steps']} steps" in note
    assert settings["calib_samples"] < 32 and "budget" not in settings and written["settings"]["budget"] == budget
