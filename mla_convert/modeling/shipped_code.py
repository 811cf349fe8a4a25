"""The Python files that are written beside the weights of a converted model. Imports no torch."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from mla_convert.core.files import write_file

# Files of mla_convert/modeling. Conversion, `refresh` and `push` all use this list.
CODE = (
    "attention_mla.py", "configuration_mla.py", "decode_mla.py", "latent_format_mla.py", "modeling_mla.py",
    "quantised_latent_mla.py", "stock_mla.py",
)  # fmt: skip
# Files of mla_convert/publish/engines, for exports of profile hf-code.
SERVED = ("modeling_mla_served.py",)


def code_files(exported: bool = False) -> dict[str, bytes]:
    """Content of the files by name: of a converted model, or of an export."""
    package = resources.files("mla_convert").joinpath("publish/engines" if exported else "modeling")
    return {name: package.joinpath(name).read_bytes() for name in (SERVED if exported else CODE)}


def write_code(folder: Path, exported: bool = False) -> None:
    """Write the Python files of a converted model, or of an export, to a folder."""
    for name, content in code_files(exported).items():
        write_file(folder / name, content)
