"""Progress of a run on stderr: a live bar on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from mla_convert.core.console import Terminal
from mla_convert.core.report_schema import JsonObject

COLUMNS = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn("steps"),
           TimeElapsedColumn(), TextColumn("elapsed,"), TimeRemainingColumn(), TextColumn("left"))  # fmt: skip

# A log gets a line after so many seconds, and later after a part of the time that has passed.
SECONDS, LINES = 10, 20


class Progress:
    """Progress over layers, counted in refinement steps, plus one step for all other work on a layer."""

    def __init__(self, console: Console | None = None, quiet: bool = False, verbose: bool = False):
        """Prepare the display; nothing is printed yet.

        Args:
            console: Where to print; stderr if None.
            quiet: Print nothing.
            verbose: Print a line for every layer.
        """
        self.console = console or Terminal(stderr=True)
        self.quiet = quiet
        self.verbose = verbose
        self._bars: Bars | None = None
        self._task: Any = None
        self._layer, self._layers, self._steps, self._label = 0, 0, 0, ""
        # Steps finished, by this run and before it, and all.
        self._finished, self._before, self._total = 0, 0, 0
        self._noted = False
        self._start = self._shown = time.perf_counter()

    def note(self, text: str) -> None:
        """Print one line."""
        if not self.quiet:
            # Not wrapped, so that a line stays one line in a log.
            self.console.print(text, markup=False, soft_wrap=True)

    def start(self, layers: int, steps: int, label: str = "layer", extra_steps: int = 0) -> None:
        """Begin a loop over layers.

        Args:
            layers: Number of layers.
            steps: Refinement steps of each layer.
            label: Name of one iteration.
            extra_steps: Extra steps of the last layers, counted once for each layer that takes them.
        """
        self._layer, self._layers, self._steps, self._noted = 0, layers, steps, False
        self._begin(label, f"{label} 1/{layers}", layers * (steps + 1) + extra_steps, 0)

    def step(self, layers: int = 1) -> None:
        """Count one refinement step of `layers` layers."""
        self._count(self._finished + layers)

    def begin(self, label: str, steps: int, done: int = 0, noted: bool = False) -> None:
        """Begin a loop over steps that is not a loop over layers.

        Args:
            label: Name of the loop.
            steps: Number of steps.
            done: Steps that an earlier run finished.
            noted: The caller prints lines of its own with `note`.
        """
        self._layers, self._noted = 0, noted
        self._begin(label, label, steps, done)

    def advance(self, done: int) -> None:
        """Set the number of finished steps of a loop begun by `begin`."""
        self._count(done)

    def skip(self, steps: int) -> None:
        """Count the steps of layers that an earlier run has finished."""
        self._before += steps
        self._count(self._finished + steps)

    def _begin(self, label: str, text: str, total: int, done: int) -> None:
        self._label, self._finished, self._before, self._total = label, done, done, total
        self._start = self._shown = time.perf_counter()
        if self.console.is_terminal and not self.quiet:
            self._bars = Bars(*COLUMNS, console=self.console, transient=True)
            self._task = self._bars.add_task(text, total=total, completed=done)
            self._bars.start()

    def _count(self, finished: int) -> None:
        self._finished = finished
        if self._bars:
            self._bars.update(self._task, completed=finished)
        else:
            self._log("", False)

    def layer_measured(self) -> None:
        """Count a pass over a layer that writes nothing."""
        self._done()

    def layer_done(self, report: JsonObject) -> None:
        """Count a layer that is on disk, and show its error."""
        self._done(f"residual error {report['residual_error']:.2e}  ")

    def _done(self, words: str = "") -> None:
        self._layer += 1
        last = self._layer == self._layers
        # The steps of a layer may be fewer than were announced.
        self._finished = self._total if last else max(self._finished, self._layer * (self._steps + 1))
        if self._bars:
            # A bar names the layer that is being worked on, not the one that has ended.
            text = f"{self._label} {min(self._layer + 1, self._layers)}/{self._layers}"
            self._bars.update(self._task, completed=self._finished, description=text)
        self._log(words, self.verbose or (bool(words) and last and not self._bars))

    def _log(self, words: str, now: bool) -> None:
        """Print a line `now`, or, where there is no bar, from time to time: every ten seconds at first, then less often."""
        elapsed = time.perf_counter() - self._start
        if not now and (
            self._bars or self._noted or elapsed - (self._shown - self._start) <= max(SECONDS, elapsed / LINES)
        ):
            return
        self._shown = self._start + elapsed
        if self._layers:
            text = f"{self._label} {self._layer}/{self._layers}"
            text += "" if words else f", step {self._finished}/{self._total}"
        else:
            text = f"{self._label}, step {self._finished}/{self._total}"
        made = self._finished - self._before
        left = f", about {elapsed / made * (self._total - self._finished):.0f} s left" if made > 0 else ""
        self.note(f"{text}  {words}{elapsed:.0f} s elapsed{left}")

    def stop(self) -> None:
        """End the live display, if there is one."""
        if self._bars:
            self._bars.stop()
            self._bars = None
