"""Healing: a short distillation from the original, which recovers part of the quality lost to the smaller cache."""

from __future__ import annotations

from typing import Any

from mla_convert.heal.settings import HealConfig, HealSettings

__all__ = ["HealConfig", "HealSettings", "heal"]


def __getattr__(name: str) -> Any:
    """Import `heal` at its first use: the command line's help needs the settings alone, and no torch."""
    if name == "heal":
        from mla_convert.heal.run import heal

        return heal
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
