"""The Python files that stand beside the weights of a converted model, as this version has them. Imports no torch."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from mla_convert.core.files import write_file

# In mla_convert/modeling: add a file here and every folder gets it, `refresh` and `push` included.
CODE = ("configuration_mla.py", "decode_mla.py", "modeling_mla.py")
# In mla_convert/engines, for exports of profile hf-code.
SERVED = ("modeling_mla_served.py",)


def code_files(exported: bool = False) -> dict[str, bytes]:
    """Content by name."""
    package = resources.files("mla_convert").joinpath("publish/engines" if exported else "modeling")
    return {name: package.joinpath(name).read_bytes() for name in (SERVED if exported else CODE)}


def write_code(folder: Path, exported: bool = False) -> None:
    """Write the Python files into a folder."""
    for name, content in code_files(exported).items():
        write_file(folder / name, content)
