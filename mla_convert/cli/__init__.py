"""The commands of `mla-convert`, one file each: they read options, call the library and print. Import no torch."""

from mla_convert.moved import names_of

__getattr__ = names_of(__name__, "mla_convert.cli.main")
