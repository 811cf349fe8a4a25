"""Refinement never makes a layer worse: toy modules for its properties, pico models for its use."""

import math

import pytest
import torch
from torch import nn

from mla_convert.method.calibrate.hidden_states import Activations
from mla_convert.method.refine import optimise
from mla_convert.method.refine.optimise import (
    CHANNEL_FLOOR,
    RefineSettings,
    batches,
    channel_weights,
    held_out_states,
    output_error,
    refine,
    relative_error,
    residual_error,
)

WINDOWS, LENGTH, SIZE = 20, 6, 8
CPU = torch.device("cpu")


@pytest.fixture
def task():
    """A linear student with weights near its teacher's, inputs and targets."""
    torch.manual_seed(0)
    inputs = Activations(torch.randn(WINDOWS, LENGTH, SIZE), CPU, torch.float32)
    teacher, student = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
    student.load_state_dict(
        {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in teacher.state_dict().items()}
    )
    targets = Activations((inputs.data + teacher(inputs.data)).detach(), CPU, torch.float32)
    return student, inputs, targets


def copied(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def unchanged(module, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_refinement_lowers_the_held_out_error(task):
    student, inputs, targets = task
    result = refine(student, student, inputs, targets, RefineSettings(60, 4, 0.02, 0))
    assert result.error_after < 0.5 * result.error_before and result.steps == 60
    assert result.error_after == pytest.approx(residual_error(student, inputs, held_out_states(targets)))
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in student.parameters())


def test_no_steps_change_nothing(task):
    student, inputs, targets = task
    before = copied(student)
    result = refine(student, student, inputs, targets, RefineSettings(0, 4, 0.02, 0))
    assert result.error_before == result.error_after and result.steps == 0 and unchanged(student, before)


@pytest.mark.parametrize("lr", [1e3, 1e30, float("inf"), float("nan")])
def test_divergence_leaves_the_start(task, lr):
    student, inputs, targets = task
    before = copied(student)
    result = refine(student, student, inputs, targets, RefineSettings(12, 4, lr, 0))
    assert result.error_after == result.error_before and unchanged(student, before)


def test_nan_in_training_windows_leaves_the_start_and_stops_early(task):
    student, inputs, targets = task
    targets.data[0, 0, 0] = torch.nan
    before = copied(student)
    result = refine(student, student, inputs, targets, RefineSettings(80, WINDOWS, 0.02, 0))
    assert unchanged(student, before) and result.steps < 80


def test_same_seed_gives_the_same_parameters(task):
    student, inputs, targets = task
    start, results = copied(student), []
    for seed in (0, 0, 1):
        student.load_state_dict(start)
        refine(student, student, inputs, targets, RefineSettings(8, 4, 0.02, seed))
        results.append(copied(student))
    assert unchanged(student, results[2]) and not torch.equal(results[1]["weight"], results[2]["weight"])
    assert torch.equal(results[0]["weight"], results[1]["weight"])


def test_held_out_windows_are_not_trained_on(task):
    student, inputs, targets = task
    with torch.no_grad():
        targets.data[-1] = inputs.data[-1] + student(inputs.data[-1])  # the start is perfect on the held-out window
    before = copied(student)
    refine(student, student, inputs, targets, RefineSettings(8, 4, 0.02, 0))
    assert unchanged(student, before)


class OneOfOne:
    """Stands for several processes: a part that is the whole, and an exchange that changes nothing."""

    alone, count, index = False, 1, 0

    def __init__(self):
        self.sums = 0

    def sum(self, tensor):
        self.sums += 1
        return tensor


@pytest.mark.parametrize("shared, recorded", [(False, True), (True, True), (True, False)])
def test_captured_steps_train_like_eager_ones(task, monkeypatch, shared, recorded):
    """The graph is a fake that runs its call eagerly, and not before its first replay. With several processes there are two, and
    the sum of the gradients between them; if they cannot be recorded, steps stay eager."""
    student, inputs, targets = task
    start, captures, trained = copied(student), [], []

    class OnCuda(torch.Tensor):
        is_cuda = True

    class Captured:
        def __init__(self, run, *examples):
            if not recorded:
                raise optimise.CaptureError
            self.run = run
            captures.append([example.shape for example in examples])

        def __call__(self, *inputs):
            self.run(*inputs)

    monkeypatch.setattr(optimise, "CapturedCall", Captured)
    for kind in (torch.Tensor, OnCuda):
        student.load_state_dict(start)
        student.zero_grad()
        processes = OneOfOne() if shared and kind is OnCuda else None
        parameters = [*student.parameters()]
        step = optimise.TrainingStep(parameters, student, RefineSettings(8, 4, 0.02, 0), relative_error, processes)
        for index in batches(WINDOWS, 4, 8, seed=0):
            step(inputs.get(index).as_subclass(kind), targets.get(index).as_subclass(kind))
        trained.append(copied(student))
    assert captures == [[(4, LENGTH, SIZE)] * 2, *([[]] if shared else [])][: None if recorded else 0]
    assert not unchanged(student, start) and (processes is None or processes.sums == 8)
    assert unchanged(student, trained[0])


def test_every_window_once_before_any_again():
    found = list(batches(10, 4, 5, seed=0))
    assert [len(batch) for batch in found] == [4] * 5
    assert sorted(torch.cat(found)[:10].tolist()) == sorted(torch.cat(found)[10:].tolist()) == list(range(10))


def test_errors_are_relative():
    expected = torch.randn(2, LENGTH, SIZE)
    assert relative_error(1.1 * expected, expected).item() == pytest.approx(math.log(1.01), rel=1e-4)
    states = Activations(expected, CPU, torch.float32)
    assert output_error(lambda x: 1.2 * x, lambda x: x, states) == pytest.approx(0.04, rel=1e-4)


def test_a_token_that_cannot_be_corrected_does_not_dominate():
    expected = torch.randn(1, 100, SIZE, generator=torch.Generator().manual_seed(0))
    found = (1.1 * expected).requires_grad_(True)
    with torch.no_grad():
        found[0, 7] = 40 * expected[0, 7]  # massive in one model and not in the other
    loss = relative_error(found, expected)
    loss.backward()
    size = found.grad[0].norm(dim=-1) * expected[0].norm(dim=-1)
    assert loss.item() < 10 * math.log(1.01) and 0 < size[7] < size.median()


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_refinement_improves_a_pico_model(convert_pico, name):
    settings = {"kv_ratio": 0.4, "calib_samples": 64}
    closed, refined = (convert_pico(name, refine_steps=steps, **settings) for steps in (0, 40))
    for layer in refined.layers:
        assert layer["residual_error"] <= layer["residual_error_closed_form"]
    assert refined.layers[0]["residual_error"] < 0.9 * closed.layers[0]["residual_error"]
    same = "output_error_closed_form"  # the residual error has weights that are measured for refinement only
    assert refined.layers[0][same] == closed.layers[0][same]


def test_weights_of_channels():
    """Weights follow the cost of channels; with equal costs, or equal relative errors, the loss is as without weights."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([100.0, 1.0, 1.0, 0.1])
    stream = Activations(torch.randn(6, 20, 4, generator=generator) * scale, torch.device("cpu"), torch.float32)
    even = channel_weights(torch.ones(4, dtype=torch.float64), stream)
    torch.testing.assert_close(even, torch.ones(4))
    weight = channel_weights(1 / scale.double() ** 4, stream)
    expected, weight = stream.data.double(), weight.double()
    small = relative_error(1.01 * expected, expected, weight).item()  # so small that its logarithm is linear
    assert small == pytest.approx(1e-4, rel=1e-3)
    alone = [relative_error(expected + 1e-4 * torch.eye(4)[i], expected, weight).item() for i in range(4)]
    assert alone[0] < alone[1] < alone[3] and alone[1] == pytest.approx(alone[2])
    # a channel without cost keeps a small weight, as the costs are measured on few tokens
    assert alone[0] / alone[3] == pytest.approx(CHANNEL_FLOOR / 4, rel=0.05)
