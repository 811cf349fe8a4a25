"""mla_convert: retrofit Multi-head Latent Attention onto MHA and GQA checkpoints.

`convert(ConvertConfig(source=..., rank=...))` is the whole job. Importing this package also lets transformers load a
converted folder without `trust_remote_code`; neither torch nor transformers is imported for that until somebody else does.
"""

from __future__ import annotations

import importlib
from typing import Any

from wrapt import when_imported

from mla_convert import moved  # noqa: F401  (finds what version 0.1 had elsewhere)
from mla_convert.version import __version__

_PUBLIC = {
    "convert": "mla_convert.pipeline.convert",
    "ConvertConfig": "mla_convert.core.settings",
    "Report": "mla_convert.report.report",
    "MlaConvertError": "mla_convert.core.errors",
}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]


@when_imported("transformers.models.auto.configuration_auto")
def _register_configs(_module: Any) -> None:
    """Make the converted counterparts of all supported families known to transformers' AutoConfig."""
    from mla_convert.modeling.register import register_configs

    register_configs()


@when_imported("transformers.models.auto.modeling_auto")
def _register_models(_module: Any) -> None:
    """Make them known to the Auto classes of models."""
    from mla_convert.modeling.register import register_models

    register_models()


__all__ = ["ConvertConfig", "MlaConvertError", "Report", "__version__", "convert"]
