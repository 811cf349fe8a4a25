"""The report of a conversion: report.json, tables, model card and page."""
