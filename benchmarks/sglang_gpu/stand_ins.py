"""Stand-in packages for SGLang, and what newer versions of transformers need: `stand_ins.py SITE [NAME ...]`.

NAME is a package that serving a dense language model imports and does not use. On a CPU, sgl_kernel is one of them.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

TEXT = '''"""Stands in for a package that serving a dense language model does not need."""

import importlib.machinery
import sys

__version__ = "0.2.1"
__path__ = []


class _Anything(type):
    """A class whose attributes are such classes."""

    def __getattr__(cls, name):
        return _anything(name)


def _anything(name):
    if name.startswith("__"):
        raise AttributeError(name)
    members = {"__init__": lambda self, *args, **options: None, "__get_pydantic_core_schema__": classmethod(_schema)}
    return _Anything(name, (), members)


def _schema(cls, *_):
    """Pydantic's schema of a field of such a class: anything."""
    from pydantic_core import core_schema

    return core_schema.any_schema()


class _Finder:
    """Makes every submodule a module of such classes."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.startswith(__name__ + "."):
            return importlib.machinery.ModuleSpec(name, _Finder, is_package=True)
        return None

    @staticmethod
    def create_module(spec):
        return None

    @staticmethod
    def exec_module(module):
        module.__getattr__ = _anything


__getattr__ = _anything
sys.meta_path.append(_Finder)
'''
# (file, pattern, replacement) in SGLang 0.5.17.
PATCHES = (
    # It is made for transformers 5.12, and registers types that 5.17 has of its own.
    ("configs/qwen3_asr.py", r'^(AutoConfig\.register\("\w+", \w+)\)$', r"\1, exist_ok=True)"),
    # On a CPU its RoPE for DeepSeek's class knows YaRN alone; the plain one runs there, too.
    ("layers/rotary_embedding/factory.py", r'^    if device != "cpu":$', "    if True:"),
)


def main() -> None:
    """Write the packages, and patch SGLang where it is in the folder."""
    site = Path(sys.argv[1])
    for name in sys.argv[2:]:
        (site / name).mkdir(parents=True, exist_ok=True)
        (site / name / "__init__.py").write_text(TEXT)
    for file, pattern, replacement in PATCHES if (site / "sglang").is_dir() else ():
        path = site / "sglang" / "srt" / file
        text, count = re.subn(pattern, replacement, path.read_text(), flags=re.MULTILINE)
        if count:
            path.write_text(text)
        elif replacement.strip() not in text and "exist_ok=True" not in text:
            sys.exit(f"{path} is not as in SGLang 0.5.17: nothing to patch")


if __name__ == "__main__":
    main()
