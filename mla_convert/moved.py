"""Import paths of version 0.1: they keep working, with a DeprecationWarning, until version 0.4."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

ROOT = "mla_convert."
# Modules whose old name is free. If a package has the old name now, its `__getattr__` comes from `names_of`.
MOVED = {
    "activations": "method.calibrate.hidden_states",
    "allocate": "method.factorise.allocate",
    "amounts": "core.units",
    "attend": "modeling.attention_backends",
    "attention": "method.factorise.layer",
    "bench": "evaluate.speed.decode",
    "bench_models": "evaluate.speed.models",
    "beyond": "report.update",
    "caching": "modeling.caching",
    "calibrate": "method.calibrate.statistics",
    "card": "report.model_card",
    "carried": "source.carried",
    "checkpoint": "source.checkpoint",
    "checkpoint.writer": "write.writer",
    "code": "modeling.shipped_code",
    "commands": "cli",
    "config": "core.recipes",  # which imports the settings too
    "config_file": "source.config_file",
    "decoding": "evaluate.quality.greedy_agreement",
    "divergence": "modeling.distillation",
    "divergence_kernel": "modeling.distillation_triton",
    "engines": "publish.engines",
    "engines.converted": "publish.engines.converted_checkpoint",
    "engines.features": "publish.engines.qk_norm",
    "engines.served_config": "publish.engines.deepseek_config",
    "engines.sizes": "publish.engines.padding",
    "engines.tensors": "publish.engines.latent_attention",
    "engines.towards": "publish.engines.target_engine",
    "environment": "core.runtime",
    "errors": "core.errors",
    "factorise": "method.factorise.svd",
    "families": "source.families",
    "figures": "core.report_file",
    "files": "core.files",
    "folder": "write.model_files",
    "gate": "evaluate.gate",
    "heal.cost": "pipeline.estimate.heal",
    "heal.passes": "heal.cuda_graph",
    "heal.shared": "heal.teacher_student",
    "hub": "publish.hub",
    "inspection": "pipeline.inspect",
    "intact": "write.intact",
    "kinds": "evaluate.quality.kinds",
    "layers": "pipeline.layers",
    "licence": "source.licence",
    "linalg": "method.factorise.linalg",
    "loading": "source.load_model",
    "measure": "evaluate.quality.perplexity",
    "mixture": "source.mixture",
    "openings": "method.calibrate.openings",
    "page": "report.html.page",
    "passkey": "evaluate.quality.passkey",
    "place": "source.place",
    "plan": "method.factorise.sizes",
    "planning": "pipeline.dry_run",
    "plots": "report.html.plots",
    "probes": "evaluate.quality.probes",
    "progress": "core.progress",
    "recipe_file": "pipeline.recipe",
    "refine": "method.refine.optimise",
    "refresh": "pipeline.refresh",
    "report_schema": "core.report_schema",
    "revise": "write.revise",
    "rope": "method.factorise.rope",
    "schedule": "method.refine.schedule",
    "selfcheck": "write.selfcheck",
    "selfwritten": "method.calibrate.self_generated",
    "sensitivity": "method.factorise.sensitivity",
    "shapes": "evaluate.speed.shapes",
    "sizing": "pipeline.estimate.memory",
    "skeleton": "method.calibrate.layerwise",
    "source_checks": "source.checks",
    "speed_report": "report.speed",
    "streamed": "pipeline.streamed",
    "suite": "evaluate.quality.suite",
    "sums": "core.sums",
    "svg": "report.html.svg",
    "sweep": "pipeline.sweep",
    "tasks": "evaluate.quality.lm_eval_tasks",
    "terminal": "core.console",
    "text_files": "source.text_files",
    "texts": "source.texts",
    "timing": "pipeline.estimate.time",
    "tokenizer": "source.tokenizer",
    "tokens": "source.tokens",
    "verify": "write.verify",
    "words": "core.words",
    "yaml_marks": "core.yaml_positions",
}
# Public names that changed, by the old name of their module.
RENAMED = {"engines.serve_check": {"Asking": "EngineRequest"}, "probes": {"Probes": "ProbeSettings"}}


def _new_name(old: str) -> str | None:
    """The new name of a module that moved, alone or with its package; None if it did not move."""
    if not old.startswith(ROOT):
        return None
    name, rest = old.removeprefix(ROOT), ""
    while name:
        if name in MOVED:
            return ROOT + MOVED[name] + rest
        name, _, last = name.rpartition(".")
        rest = f".{last}{rest}"
    return None


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} is now {new}; the old name goes with version 0.4", DeprecationWarning, stacklevel=3)


class _Finder(MetaPathFinder, Loader):
    """Finds modules that moved. It is the last finder, so it is asked only for modules that no other one finds."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        new = _new_name(fullname)
        return None if new is None else ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        old, new = module.__name__, str(_new_name(module.__name__))
        target = importlib.import_module(new)
        _warn(old, new)
        renamed = RENAMED.get(old.removeprefix(ROOT), {})
        module.__getattr__ = lambda name: getattr(target, renamed.get(name, name))  # type: ignore[method-assign]


def names_of(package: str, module: str) -> Callable[[str], Any]:
    """`__getattr__` of a package whose name was a module's in version 0.1: that module's names, with a warning."""

    def get(name: str) -> Any:
        if not name.startswith("__"):
            value = getattr(importlib.import_module(module), name, None)
            # A module there is what that module imports, and perhaps a part of the package that is about to be imported.
            if value is not None and not isinstance(value, ModuleType):
                _warn(f"{package}.{name}", f"{module}.{name}")
                return value
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get


class _Callable(ModuleType):
    """A module whose name was a function's in version 0.1: calling the module calls its function of that name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function, with a warning."""
        name = self.__name__.rpartition(".")[2]
        _warn(self.__name__, f"{self.__name__}.{name}")
        return getattr(self, name)(*args, **kwargs)


def callable_as_before(module: str) -> None:
    """Make a module callable, so that `from package import name` still gives a function's replacement."""
    sys.modules[module].__class__ = _Callable


sys.meta_path.append(_Finder())
