"""`mla-convert export`: a converted model in the form that serving engines know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mla_convert.cli.options import Quiet, Verbose, is_verbose, silence_libraries
from mla_convert.core.errors import UsageError
from mla_convert.core.words import say

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
        bool, typer.Option("--gguf", help="config.json as llama.cpp's converter wants it; for --profile engine.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that is there.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print what was written as JSON on stdout.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write DIR as a DeepSeek-V3 checkpoint, which vLLM, SGLang, llama.cpp and transformers know."""
    found = run_export(folder, profile, out, pad, dtype, gguf, overwrite, quiet)
    if json_:
        say(json.dumps({"out": str(found.out), **found.as_dict()}, indent=2))
    else:
        say(summary(found))


def run_export(
    folder: Path, profile: str, out: Path | None, pad: str, dtype: str, gguf: bool, overwrite: bool, quiet: bool
):
    """Options to settings, settings to an exported folder."""
    from mla_convert.publish.engines.padding import parse_pad

    padding = parse_pad(pad)
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise UsageError(f"dtype {dtype!r} is none of auto, float32, bfloat16")
    silence_libraries(quiet)
    from mla_convert.core.progress import Progress
    from mla_convert.publish.engines.export import export as export_folder
    from mla_convert.publish.engines.profiles import check_profile

    profile = check_profile(profile)
    out = default_out(folder, profile) if out is None else out
    progress = Progress(quiet=quiet, verbose=is_verbose())
    return export_folder(folder, out, profile, dtype, padding, gguf, overwrite, progress)


def default_out(folder: Path, profile: str) -> Path:
    """Where an export goes when nobody says."""
    return folder.resolve().parent / f"{folder.resolve().name}-{profile}"


def summary(found) -> str:
    """What was written, in two lines."""
    sizes, more = found.sizes, found.sizes.cache_width - found.source_numbers
    padding = f", of which {more:g} are padding" if more else ""
    return (
        f"{found.out}: profile {found.profile}, {found.dtype}, rank {sizes.rank} + {sizes.rope_dim} rotary, heads of "
        f"{sizes.nope_dim} + {sizes.rope_dim} and {sizes.v_dim}\n"
        f"{sizes.cache_width} numbers cached per token and layer{padding}; the latent norm changes a latent by at most "
        f"{found.distortion:.0e} of itself"
    )
