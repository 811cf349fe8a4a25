import sys, json, itertools, torch
from pathlib import Path
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "kernels" / "torch-ext"), str(ROOT / "tests" / "kernels")]
from common import *
from common import make_slices, decode_calls, time_calls, row_error, read_bandwidth
import mla_attention.decode as D
import mla_attention.decode_kernels as K
from mla_attention.tuning import DecodeConfig
class Nothing:
    def __getitem__(self, grid): return lambda *a, **k: None
real = K.mla_decode_fwd_kernel_combine; launch = D._hopper_launch
out = open(sys.argv[1], "w")
bw = read_bandwidth("cuda"); print("read", bw)
C = lambda **k: DecodeConfig(64, 64, hopper=True, **k)
last = None
def run(shape, cfg, splits, tag=""):
    global last, sl
    if last != shape:
        sl = None; torch.cuda.empty_cache(); sl = make_slices(*shape, "cuda"); last = shape
    slices, nbytes, flops = sl
    row = {"shape": shape, "cfg": str(cfg), "splits": splits}
    try:
        row["error"] = row_error(slices, cfg, splits)
        row["us"] = time_calls(decode_calls(slices, cfg, splits), "cuda")
        K.mla_decode_fwd_kernel_combine = Nothing()
        row["split_us"] = time_calls(decode_calls(slices, cfg, splits), "cuda")
        K.mla_decode_fwd_kernel_combine = real
        D._hopper_launch = lambda *a: None
        row["combine_us"] = time_calls(decode_calls(slices, cfg, splits), "cuda")
        D._hopper_launch = launch
        if not shape[5] and not shape[6] and shape[3] > 1:
            q, qr, latent, rope, *rest = slices
            one = (q, qr, latent[:1, :1].expand(1, *latent.shape[1:]), rope[:1, :1].expand(1, *rope.shape[1:]), *rest)
            K.mla_decode_fwd_kernel_combine = Nothing()
            row["l2_us"] = time_calls(decode_calls(one, cfg, splits) * 3, "cuda")
            K.mla_decode_fwd_kernel_combine = real
        row["share"] = nbytes / row["us"] / 1e3 / bw
    except Exception as e:
        K.mla_decode_fwd_kernel_combine = real; D._hopper_launch = launch
        row["problem"] = repr(e)[:200]
    out.write(json.dumps(row) + "\n"); out.flush()
    print({k: (round(v, 4) if isinstance(v, float) else v) for k, v in row.items() if k != "cfg"}, "st", cfg.stages, "left", cfg.left, "per", cfg.per_sm, "pdl", cfg.pdl, flush=True)
for h in (32, 16, 64, 128):
    shape = (512, 64, h, 32, 8192, 0, False)
    for cfg, s in [(C(stages=2), 0), (C(stages=2), 4), (C(stages=2, pdl=True), 4), (C(stages=2, pdl=True), 0), (C(stages=2, left=2), 4)]:
        if h == 128 and s: s = 2
        run(shape, cfg, s)
run((512, 64, 32, 32, 8192, 64, False), C(stages=2, pdl=True), 0)
run((512, 64, 32, 32, 8192, 64, True), C(stages=2, pdl=True), 0)
run((512, 64, 32, 128, 8192, 0, False), C(stages=2, pdl=True), 0)
run((512, 64, 32, 128, 8192, 0, False), C(stages=2, pdl=True), 1)
for r, p, cfgs in [(256, 64, [C(stages=4), C(stages=4, left=4)]), (128, 64, [C(stages=7), C(stages=3, left=2, per_sm=2)]), (96, 32, [C(stages=8), C(stages=4, left=2, per_sm=2)])]:
    for cfg in cfgs:
        for s in (0, 4): run((r, p, 32, 32, 8192, 0, False), cfg, s * cfg.per_sm)
