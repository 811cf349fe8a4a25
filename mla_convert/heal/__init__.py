"""Heal: brief distillation of a converted model from its original, which gives back most of what the smaller cache took."""

from __future__ import annotations

from typing import Any

from mla_convert.heal.settings import HealConfig, HealSettings

__all__ = ["HealConfig", "HealSettings", "heal"]


def __getattr__(name: str) -> Any:
    """`heal` is imported when it is asked for: the command line's help needs the settings alone."""
    if name == "heal":
        from mla_convert.heal.run import heal

        return heal
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
