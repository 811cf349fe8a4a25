"""The hidden states that a conversion carries from layer to layer, of the source and of the converted model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mla_convert.core.processes import Processes, alone
from mla_convert.method.calibrate.hidden_states import Activations
from mla_convert.method.calibrate.layer_inputs import beside_windows
from mla_convert.method.calibrate.layerwise import LayerwiseModel


@dataclass
class Streams:
    """Hidden states at the current layer boundary, of the source and of the converted model."""

    calib_original: Activations
    calib_converted: Activations
    eval_original: Activations
    eval_converted: Activations
    # of the packaged suite, where it is measured
    suite_original: Activations | None = None
    suite_converted: Activations | None = None

    @property
    def measured_original(self) -> tuple[Activations, ...]:
        """The source's states that the evaluation needs and the conversion does not."""
        return tuple(states for states in (self.eval_original, self.suite_original) if states)

    @property
    def measured_converted(self) -> tuple[Activations, ...]:
        """The converted model's states that the evaluation needs."""
        return tuple(states for states in (self.eval_converted, self.suite_converted) if states)

    @property
    def converted(self) -> tuple[Activations, ...]:
        """All states of the converted model."""
        return (self.calib_converted, *self.measured_converted)

    @property
    def original(self) -> tuple[Activations, ...]:
        """All states of the source."""
        return (self.calib_original, *self.measured_original)


def open_streams(
    layerwise: LayerwiseModel,
    calib: Tensor,
    evaluation: Tensor,
    suite: Tensor | None = None,
    processes: Processes | None = None,
) -> Streams:
    """Embed this process's share of the token windows; both models start from the same states.

    Args:
        layerwise: the source model.
        calib: calibration windows (N, L).
        evaluation: evaluation windows (N, L).
        suite: windows (N, L) of the packaged suite, where it is measured.
        processes: that share the windows, if there are several.
    """
    processes = processes or alone(layerwise.device)
    groups = [windows for windows in (calib, evaluation, suite) if windows is not None]
    own = [windows[processes.share(len(windows))] for windows in groups]
    besides = [beside_windows(layerwise, windows) for windows in own]
    # bfloat16 halves the states that have to fit a card. Reported figures are measured in float32.
    calib_dtype = torch.bfloat16 if layerwise.device.type == "cuda" else torch.float32
    states: list[Activations] = []
    for windows, beside, start in zip(groups, besides, layerwise.embed_each(own), strict=True):
        first = not states
        # what is measured is read once a layer, in order, for which host memory is fast enough
        dtype, on_host = (calib_dtype, False) if first else (torch.float32, True)
        states += [
            Activations(start, layerwise.device, dtype, on_host, processes, len(windows), beside and beside.clone())
            for _ in range(2)
        ]
        del start
        if first:
            states[0].check_finite(f"the embedding {layerwise.embedding}")
    return Streams(*states)


def embedded(layerwise: LayerwiseModel, windows: Tensor, processes: Processes) -> Activations:
    """Hidden states of this process's share of windows (N, L) that are measured, at the input of the first layer."""
    own = windows[processes.share(len(windows))]
    start, beside = layerwise.embed(own), beside_windows(layerwise, own)
    return Activations(start, layerwise.device, torch.float32, True, processes, len(windows), beside)
