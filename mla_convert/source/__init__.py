"""The source checkpoint: where it is, its configuration, families, tokenizer, weights and texts."""

from mla_convert.moved import names_of

__getattr__ = names_of(__name__, "mla_convert.source.source")
