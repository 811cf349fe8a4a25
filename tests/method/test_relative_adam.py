"""Adam with relative learning rates, its schedule, and the best state of a run."""

import math

import pytest
import torch
from torch import nn

from mla_convert.method.refine.relative_adam import MIN_SCALE, BestState, RelativeAdam, set_rates, warmup_cosine


def parameters(*scales):
    return [nn.Parameter(torch.full((4,), scale)) for scale in scales]


def test_rates_follow_the_size_of_the_parameters():
    optimizer = RelativeAdam(parameters(2.0, 0.5, 0.0), 0.01, (0.9, 0.98))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.02, 0.005, 0.01 * MIN_SCALE])
    set_rates(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.0025, 0.005 * MIN_SCALE])


def test_parameters_of_about_equal_size_share_a_group():
    optimizer = RelativeAdam(parameters(1.0, 1.1, 4.0), 0.01, (0.9, 0.95), grouped=True, fused=False)
    assert [(len(group["params"]), group["lr"]) for group in optimizer.param_groups] == [(2, 0.01), (1, 0.04)]
    absolute = RelativeAdam(parameters(0.0, 1.0), 0.01, (0.9, 0.95), relative=False, grouped=True, fused=False)
    assert [(len(group["params"]), group["lr"]) for group in absolute.param_groups] == [(2, 0.01)]


def test_first_step_is_one_rate_long():
    (parameter,) = parameters(2.0)
    optimizer = RelativeAdam([parameter], 0.01, (0.9, 0.98))
    parameter.grad = torch.tensor([3.0, -3.0, 1e-3, 0.0])
    optimizer.step()
    assert parameter.tolist() == pytest.approx([1.98, 2.02, 1.98, 2.0], abs=1e-5)


def test_decay_follows_the_warmup_or_overlaps_it():
    after = [warmup_cosine(step, 10, 2, floor=0.1) for step in range(11)]
    assert after[:3] == [0.5, 1.0, 1.0] and after[10] == pytest.approx(0.1)
    assert after[6] == pytest.approx(0.1 + 0.9 / 2)
    overlapping = [warmup_cosine(step, 10, 2, overlap=True) for step in range(11)]
    assert overlapping[0] == 0.5 and overlapping[1] == pytest.approx(0.5 * (1 + math.cos(math.pi / 10)))
    assert overlapping[5] == pytest.approx(0.5) and overlapping[10] == pytest.approx(0)


def test_the_best_state_has_the_least_error():
    best, taken = BestState(1.0, "start"), []
    for number, error in enumerate([1.0, math.nan, 0.5, 0.7, math.inf, 0.2]):
        if best.update(error, lambda number=number: number):
            taken.append(number)
    assert taken == [2, 5] and (best.error, best.state) == (0.2, 5)
