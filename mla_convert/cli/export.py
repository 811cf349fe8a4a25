"""`mla-convert export`: write a converted model in a form that serving engines load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mla_convert.cli.options import Quiet, Verbose
from mla_convert.cli.terminal import is_verbose, silence_libraries
from mla_convert.core.errors import UsageError
from mla_convert.core.words import say

# The class for the annotation alone: its module imports torch.
if TYPE_CHECKING:
    from mla_convert.publish.engines.export import Export

EXAMPLE = "mla-convert export llama-8b-mla --profile portable --out llama-8b-vllm"
PROFILES = (
    "portable (no code; transformers, vLLM, SGLang), engine (GGUF and quantised weights), hf-code (biases, norms on queries "
    "and keys, RoPE scalings, any planes; transformers and vLLM, with --trust-remote-code)"
)

Profile = Annotated[str, typer.Option(help=f"{PROFILES}.")]
Pad = Annotated[
    str,
    typer.Option(
        help="Zero padding: auto (to the smallest sizes that vLLM takes), a rank (256, 448, 512), or none (engines without "
        "a list of sizes: transformers, llama.cpp, SGLang with Triton).",
        show_default=True,
    ),
]


def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a converted model.", show_default=False)],
    profile: Profile = "portable",
    out: Annotated[Path | None, typer.Option(help="Folder to write. Default: DIR-PROFILE.", show_default=False)] = None,
    pad: Pad = "auto",
    dtype: Annotated[str, typer.Option(help="auto (as DIR is stored), float32 or bfloat16.")] = "auto",
    gguf: Annotated[
        bool, typer.Option("--gguf", help="Write config.json as llama.cpp's converter reads it; for --profile engine.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write DIR as a DeepSeek-V3 checkpoint, which vLLM, SGLang, llama.cpp and transformers load."""
    exported = run_export(folder, profile, out, pad=pad, dtype=dtype, gguf=gguf, overwrite=overwrite, quiet=quiet)
    if json_:
        say(json.dumps({"out": str(exported.out), **exported.as_dict()}, indent=2))
    else:
        say(summary(exported))


def run_export(
    folder: Path,
    profile: str,
    out: Path | None = None,
    *,
    pad: str = "auto",
    dtype: str = "auto",
    gguf: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> Export:
    """Export a converted folder, with options as typed.

    Args:
        folder: The converted folder.
        profile: Name of the profile.
        out: Folder to write; None writes beside `folder`.
        pad: Zero padding: auto, none or a rank.
        dtype: auto, float32 or bfloat16.
        gguf: Write config.json as llama.cpp's converter reads it.
        overwrite: Replace an existing folder.
        quiet: Show no progress.

    Raises:
        UsageError: An option that is none of those.
        InputError: The model cannot be exported.
    """
    from mla_convert.publish.engines.padding import parse_pad

    # Options are checked before torch is imported.
    padding = parse_pad(pad)
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise UsageError(f"dtype {dtype!r} is none of auto, float32, bfloat16")
    silence_libraries(quiet)
    from mla_convert.core.progress import Progress
    from mla_convert.publish.engines.export import export as export_folder
    from mla_convert.publish.engines.profiles import check_profile
    from mla_convert.publish.engines.target_engine import default_export

    name = check_profile(profile)
    out = default_export(folder, name) if out is None else out
    progress = Progress(quiet=quiet, verbose=is_verbose())
    return export_folder(folder, out, name, dtype, padding, gguf, overwrite, progress)


def summary(exported: Export) -> str:
    """Sizes of an export, in two lines."""
    sizes, more = exported.sizes, exported.sizes.cache_width - exported.source_numbers
    padding = f", of which {more:g} are padding" if more else ""
    return (
        f"{exported.out}: profile {exported.profile}, {exported.dtype}, rank {sizes.rank} + {sizes.rope_dim} rotary, heads of "
        f"{sizes.nope_dim} + {sizes.rope_dim} and {sizes.v_dim}\n"
        f"{sizes.cache_width} numbers cached per token and layer{padding}; the latent norm changes a latent by at most "
        f"{exported.distortion:.0e} of itself"
    )
