"""Runs commands of ours in forks of one process that has everything imported, each on a disk that fails (fault_layer.c).

A line of JSON in: `argv`, `below` (the folder whose changes count), `at`, `kind`. A line out: `code` (negative: a signal),
`err`, `counted`.
"""

import ctypes
import gc
import json
import os
import sys
import tempfile

layer = ctypes.CDLL(os.environ["LD_PRELOAD"])
layer.fault_counted.restype = ctypes.c_long
layer.fault_share()

import pico  # noqa: E402

import mla_convert.cli.main  # noqa: E402
import mla_convert.heal.run  # noqa: E402
import mla_convert.pipeline.convert  # noqa: E402
import mla_convert.pipeline.refresh  # noqa: E402
import mla_convert.publish.engines.export  # noqa: E402
from mla_convert.evaluate.quality.suite import load_suite  # noqa: E402


def child(asked, out, err):
    code = 1
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = (open(fd, "w", closefd=False) for fd in (1, 2))  # noqa: SIM115
        sys.argv = ["mla-convert", *asked["argv"]]
        layer.fault_arm(asked["below"].encode(), ctypes.c_long(asked["at"]), asked["kind"])
        mla_convert.cli.main.main()
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        layer.fault_disarm()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


kept = pico.suite_tokens_kept()
kept.__enter__()
load_suite(pico.tokenizer(), 1, 16)  # every fork has its tokens
gc.freeze()  # else a collection in a fork copies every page

for line in sys.stdin:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            child(json.loads(line), out.fileno(), err.fileno())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        err.seek(0)
        said = err.read().decode("utf-8", "replace")
    print(json.dumps({"code": code, "err": said, "counted": layer.fault_counted()}), flush=True)
