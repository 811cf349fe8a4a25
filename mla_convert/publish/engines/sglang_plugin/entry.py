"""Entry point `sglang.srt.plugins`: makes converted models known to SGLang."""

from __future__ import annotations

import logging
import os

from packaging.version import Version

# Releases whose internals this plugin was run with: settings, pools and model runners are no stable interface.
SERIES = "0.5.17"
# SGLang imports the models of this package when it first asks for a class, behind its own.
MODELS, VARIABLE = "mla_convert.publish.engines.sglang_plugin.models", "SGLANG_EXTERNAL_MODEL_PACKAGE"


def serves(version: str) -> bool:
    """Whether a version of SGLang belongs to the series that the plugin was run with."""
    return Version(version).release[:3] == Version(SERIES).release


def refusal(version: str) -> str:
    """The reason why another version of SGLang does not serve converted folders."""
    return (
        f"mla_convert serves converted folders with SGLang {SERIES}, and {version} is installed: install sglang=={SERIES}, or "
        f"write a folder for this version with `mla-convert export`"
    )


def register() -> None:
    """Name the classes, and hook settings and cache. SGLang calls this in each process.

    Classes are named for every version and family: SGLang's fallback for unknown classes knows nothing of latents.
    """
    import sglang

    log = logging.getLogger("sglang.mla_convert")
    theirs = os.environ.setdefault(VARIABLE, MODELS)
    if theirs != MODELS:
        log.warning(f"mla_convert serves no converted folder where {VARIABLE} names another package ({theirs})")
        return
    if not serves(sglang.__version__):
        log.warning(refusal(sglang.__version__))
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from mla_convert.publish.engines.sglang_plugin import options, pool

    # A hook whose target is missing is logged by SGLang and left out; `models` then refuses the folder.
    pools = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._build_token_to_kv_pool"
    sizes = "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size"
    HookRegistry.register(
        "sglang.srt.server_args.ServerArgs._handle_cuda_graph_config", options.prepare, HookType.BEFORE
    )
    HookRegistry.register(pools, pool.build, HookType.AROUND)
    HookRegistry.register(sizes, pool.token_bytes, HookType.AROUND)
