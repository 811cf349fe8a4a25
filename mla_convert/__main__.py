"""`python -m mla_convert` is `mla-convert`."""

from mla_convert.cli.main import main

main()
