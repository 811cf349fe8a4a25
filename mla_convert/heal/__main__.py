"""`python -m mla_convert.heal`, the name of version 0.1 for `python -m mla_convert heal`."""

import runpy
import sys
import warnings

warnings.simplefilter("default", DeprecationWarning)
warnings.warn("python -m mla_convert.heal is now python -m mla_convert heal", DeprecationWarning, stacklevel=1)
sys.argv[1:1] = ["heal"]
runpy.run_module("mla_convert", run_name="__main__")
