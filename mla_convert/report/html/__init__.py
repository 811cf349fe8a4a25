"""The page report.html: text, plots and shapes."""
