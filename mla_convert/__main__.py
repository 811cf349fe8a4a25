"""`python -m mla_convert` is `mla-convert`."""

from mla_convert.cli import main

main()
