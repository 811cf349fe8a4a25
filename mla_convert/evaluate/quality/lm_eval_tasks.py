"""Tasks of lm-evaluation-harness, run on a loaded model. The harness is the optional extra `eval`."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import math
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import OutOfMemoryError, nn

from mla_convert.core.errors import InputError, ResourceError, UsageError, one_line
from mla_convert.core.progress import Progress
from mla_convert.core.report_schema import JsonObject, Mean, Metric, Task, Tasks
from mla_convert.core.words import expanded

BATCH = 8
FILES = (".yaml", ".yml")


class TaskRunner:
    """Tasks of the harness, loaded once and run on several models.

    Args:
        names: tasks by their names in the harness, or task files (.yaml).
        limit: examples of a task at most.
        progress: decides whether the harness's own progress is shown.

    Raises:
        UsageError: the harness is not installed.
        InputError: the harness does not know a task, or cannot load it.
        ResourceError: a data set cannot be fetched.
    """

    def __init__(self, names: list[str], limit: int | None, progress: Progress):
        """Load the tasks."""
        if not importlib.util.find_spec("lm_eval"):
            raise UsageError('--tasks needs lm-evaluation-harness: pip install "lm_eval>=0.4.13" (the extra eval)')
        # For a task file that does not exist the harness only reports that no task has such a name.
        for name in names:
            if name.endswith(FILES) and not expanded(name).is_file():
                raise InputError(f"task file {name} not found")
        self.names = [str(expanded(name).resolve()) if name.endswith(FILES) else name for name in names]
        self.limit, self._shown = limit, progress.verbose or (not progress.quiet and sys.stderr.isatty())
        with self._harness("cannot be loaded"):
            from lm_eval.tasks import TaskManager

            # Reading the harness's own thousands of tasks takes seconds; a file that names none of them does not need them.
            self._manager = TaskManager(include_defaults=not all(map(_stands_alone, self.names)))
            self._manager.load(self.names)  # a faulty task fails here, before any model is loaded

    def run(self, model: nn.Module, tokenizer: Any) -> dict[str, Task]:
        """Results by task or group; each metric's value is under `after`."""
        with self._harness("failed"):
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM

            class Model(HFLM):
                """Without the harness's look-up of the model's revision on the Hub: the model is loaded already."""

                def get_model_info(self) -> JsonObject:
                    return {}

            # A copy, because the harness adds a pad token to a tokenizer that has none.
            wrapped = Model(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=BATCH)
            output = simple_evaluate(wrapped, tasks=self.names, task_manager=self._manager, limit=self.limit,
                                     log_samples=False)  # fmt: skip
        return {
            task: Task(
                version=output.get("versions", {}).get(task),
                shots=output.get("n-shot", {}).get(task),
                examples=output.get("n-samples", {}).get(task, {}).get("effective"),
                metrics=_metrics(content),
            )
            for task, content in output["results"].items()
        }

    @contextlib.contextmanager
    def _harness(self, what: str) -> Iterator[None]:
        """Convert the harness's failures; show its progress only on a terminal or with -v, never on stdout."""
        from datasets import disable_progress_bars
        from datasets.exceptions import DatasetNotFoundError

        if not self._shown:
            disable_progress_bars()
        try:
            with contextlib.ExitStack() as stack:
                if not self._shown:
                    stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
                stack.enter_context(contextlib.redirect_stdout(sys.stderr))
                yield
        except (MemoryError, OutOfMemoryError):
            raise
        except (ConnectionError, DatasetNotFoundError) as error:
            raise ResourceError(f"the data of {self._named()} cannot be fetched: {one_line(error)}") from error
        except Exception as error:  # a task is code, which may raise anything
            raise InputError(f"{self._named()} {what}: {type(error).__name__}: {one_line(error)}") from error

    def _named(self) -> str:
        names = [Path(name).name if name.endswith(FILES) else name for name in self.names]
        return f"task{'s' if len(names) > 1 else ''} {', '.join(names)}"


def _stands_alone(name: str) -> bool:
    """Whether a task is a file of its own, and not a group of others."""
    return name.endswith(FILES) and not re.search(r"^group\b", Path(name).read_text("utf-8", "replace"), re.MULTILINE)


def _metrics(content: JsonObject) -> dict[str, Metric]:
    """The harness's `metric,filter` and `metric_stderr,filter` as metrics."""
    metrics = {}
    for key, value in content.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = content.get(f"{metric}_stderr,{kind}")
            error = float(error) if isinstance(error, int | float) else math.nan
            name = metric if kind == "none" else f"{metric} ({kind})"
            metrics[name] = Metric(after=Mean(value=float(value), error=error))
    return metrics


def summarise(original: dict[str, Task] | None, model: dict[str, Task], limit: int | None) -> Tasks:
    """Results of both models in a report."""
    results = {}
    for name, task in model.items():
        reference = original[name].metrics if original else {}
        metrics = {
            metric: Metric(before=reference[metric].after if metric in reference else None, after=values.after)
            for metric, values in task.metrics.items()
        }
        results[name] = task.model_copy(update={"metrics": metrics})
    return Tasks(harness=metadata.version("lm_eval"), limit=limit, results=results)
