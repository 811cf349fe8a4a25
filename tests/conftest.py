"""Shared fixtures. Nothing here or in any test reaches a network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")

import importlib.util
import sys
from pathlib import Path

import pytest

# importlib import mode leaves sys.path alone, so the shared helper is loaded by its file
_spec = importlib.util.spec_from_file_location("pico", Path(__file__).parent / "pico.py")
pico = importlib.util.module_from_spec(_spec)
sys.modules["pico"] = pico
_spec.loader.exec_module(pico)


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """name -> folder of that pico checkpoint, made once a session."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = pico.save(name, tmp_path_factory.mktemp(name) / "source")
        return made[name]

    return get


@pytest.fixture(scope="session")
def convert_pico(sources, tmp_path_factory):
    """Convert a pico checkpoint with small texts; remembers conversions with equal settings."""
    from mla_convert import ConvertConfig, convert
    from mla_convert.progress import Progress

    made = {}

    def run(name: str, **settings):
        key = (name, repr(sorted(settings.items())))
        if key not in made:
            folder = sources(name)
            text = str(folder.parent / "text.txt")
            defaults = {"calib": text, "eval": text, "calib_samples": 16, "calib_length": 48, "eval_windows": 4, "eval_length": 48,
                            "refine_steps": 0, "device": "cpu", "out": tmp_path_factory.mktemp("out") / name}  # fmt: skip
            made[key] = convert(ConvertConfig(source=str(folder), **{**defaults, **settings}), Progress(quiet=True))
        return made[key]

    return run
