"""Tasks of lm-evaluation-harness, through its model object. The harness is the optional extra `eval`."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import OutOfMemoryError, nn

from mla_convert.core.errors import InputError, ResourceError, UsageError, one_line
from mla_convert.core.progress import Progress
from mla_convert.core.words import expanded

BATCH = 8
FILES = (".yaml", ".yml")


class Tasks:
    """Tasks, by their names in the harness or as task files (.yaml), that several models can be measured on.

    Raises:
        UsageError: the harness is not installed.
        InputError: a task that it does not know or cannot load.
        ResourceError: a data set that cannot be fetched.
    """

    def __init__(self, names: list[str], limit: int | None, progress: Progress):
        if not importlib.util.find_spec("lm_eval"):
            raise UsageError('--tasks needs lm-evaluation-harness: pip install "lm_eval>=0.4.13" (the extra eval)')
        # The harness takes a path as well, but says of one that is not there only that no task has such a name.
        for name in names:
            if name.endswith(FILES) and not expanded(name).is_file():
                raise InputError(f"task file {name} not found")
        self.names = [str(expanded(name).resolve()) if name.endswith(FILES) else name for name in names]
        self.limit, self._shown = limit, progress.verbose or (not progress.quiet and sys.stderr.isatty())
        with self._harness("cannot be loaded"):
            from lm_eval.tasks import TaskManager

            # Reading the harness's own thousands of tasks takes seconds, which a file that names none of them can do without.
            self._manager = TaskManager(include_defaults=not all(map(_stands_alone, self.names)))
            self._manager.load(self.names)  # what is wrong with a task shows before any model is loaded

    def run(self, model: nn.Module, tokenizer: Any) -> dict[str, Any]:
        """Task (or group) -> its version, shots, examples and metrics, each metric a value with its standard error."""
        with self._harness("failed"):
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM

            class Model(HFLM):
                """Without the harness's look-up of a model's revision on the Hub: this one has been loaded already."""

                def get_model_info(self) -> dict[str, Any]:
                    return {}

            # The harness gives a tokenizer without padding a pad token.
            wrapped = Model(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=BATCH)
            found = simple_evaluate(wrapped, tasks=self.names, task_manager=self._manager, limit=self.limit,
                                    log_samples=False)  # fmt: skip
        results = {}
        for task, content in found["results"].items():
            counted = found.get("n-samples", {}).get(task, {})
            results[task] = {
                "version": found.get("versions", {}).get(task),
                "shots": found.get("n-shot", {}).get(task),
                "examples": counted.get("effective"),
                "metrics": _metrics(content),
            }
        return results

    @contextlib.contextmanager
    def _harness(self, what: str) -> Iterator[None]:
        """Its failures as ours; its bars and words only on a terminal or with -v, and nothing on stdout."""
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
        except Exception as error:  # a task is code of its own, which may raise anything
            raise InputError(f"{self._named()} {what}: {type(error).__name__}: {one_line(error)}") from error

    def _named(self) -> str:
        names = [Path(name).name if name.endswith(FILES) else name for name in self.names]
        return f"task{'s' if len(names) > 1 else ''} {', '.join(names)}"


def _stands_alone(name: str) -> bool:
    """Whether a task is a file of its own, and not a group of others."""
    return name.endswith(FILES) and not re.search(r"^group\b", Path(name).read_text("utf-8", "replace"), re.MULTILINE)


def _metrics(content: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """The harness's `metric,filter` and `metric_stderr,filter` as metric -> value and standard error."""
    found = {}
    for key, value in content.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = content.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else f"{metric} ({kind})"
            found[name] = {"value": float(value), "error": float(error) if isinstance(error, int | float) else None}
    return found


def summarise(original: dict[str, Any] | None, model: dict[str, Any], limit: int | None) -> dict[str, Any]:
    """As in report.json: of every task its metrics, of both models."""
    results = {}
    for task, ours in model.items():
        theirs = original[task]["metrics"] if original else {}
        metrics = {name: {"before": theirs.get(name), "after": value} for name, value in ours["metrics"].items()}
        results[task] = {**ours, "metrics": metrics}
    return {"harness": metadata.version("lm_eval"), "limit": limit, "results": results}
