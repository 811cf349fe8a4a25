"""Conversion from source to written folder, dry runs, sweeps and inspection."""

from mla_convert.moved import names_of

__getattr__ = names_of(__name__, "mla_convert.pipeline.convert")
