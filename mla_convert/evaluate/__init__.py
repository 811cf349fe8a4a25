"""Quality and speed of a converted model against its original, and the gate over both."""

from mla_convert.moved import names_of

__getattr__ = names_of(__name__, "mla_convert.evaluate.quality.evaluation")
