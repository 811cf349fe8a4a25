"""The report of a conversion: report.json, tables, model card and page."""

from mla_convert.moved import names_of

__getattr__ = names_of(__name__, "mla_convert.report.report")
