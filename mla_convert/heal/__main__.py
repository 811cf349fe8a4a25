"""`python -m mla_convert.heal` is `mla-convert heal`; `accelerate launch -m mla_convert.heal` runs it on several GPUs."""

import sys

from mla_convert.cli.main import main

sys.argv[1:1] = ["heal"]
main()
