"""Correctness over the whole grid: random kernels (a set of compile-time constants), each on a dozen cases."""

from __future__ import annotations

import argparse
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from cases import CACHE_SCALE, as_problem, disagreement, make_case, pack_case
from gpu_workers import Pool
from harness import Log, Shape, decode_calls, device_name, half, left, make_slices, row_error, row_format
from torch import Tensor
from tune import SHARED_LIMIT, candidates, empty_problem, hopper_candidates, packed_candidates

from mla_attention import RowFormat, mla_decode, mla_write, naive_write
from mla_attention.decode import launch_decode
from mla_attention.hopper_packed import packed_hopper_config
from mla_attention.packed import packed_config
from mla_attention.rows import naive_unpack
from mla_attention.tuning import DecodeConfig, default_config

LENGTHS = ([0, 1, 15, 16], [17, 31, 33, 64], [63, 65, 127, 3], [1000, 4096, 1, 0], [700, 20, 513, 2049])
# Long enough that a program attends to more tiles than its pipeline holds, and to the end of a sequence.
DEEP, VERY_DEEP = [40000, 5, 30001, 0], [131072, 5, 70000, 0]
HEADS = (1, 3, 9, 14, 16, 32, 63, 64, 128)


def grid_groups(seed: int, packed: float = 0.6) -> Iterator[dict[str, Any]]:
    """Endless random groups: compile-time constants of a kernel, and options of its calls; a share of them on packed rows."""
    rng = random.Random(seed)
    ranks = [64, 128, 256, 512, 576, 96, 160, 384, 144, *range(16, 577, 16), 640, 768, 1024]
    for index in itertools.count():
        rank = ranks[index % len(ranks)]
        dtype = rng.choice(["bfloat16", "bfloat16", "float16", "float32"])
        rope_dim = rng.choice(range(0, 129, 16))
        pool = [default_config(rank, rope_dim, rng.choice([8, 32, 128]), getattr(torch, dtype))]
        if dtype != "float32":
            pool += candidates(rank, rope_dim, rng.choice([8, 32, 128]))
            hopper = hopper_candidates(rank, rope_dim)
            pool = hopper or pool if rng.random() < 0.75 else pool
        form = None
        if rng.random() < packed:
            form = random_format(rank, rng)
            shape = (rank, rope_dim, rng.choice([8, 32, 128]), 1, 64, 0, False, form)
            problem = empty_problem(shape, 0, "cpu", getattr(torch, dtype))
            pool = [packed_config(problem, SHARED_LIMIT)] * 3
            pool += packed_candidates(problem) if dtype != "float32" else []
            hopper = packed_hopper_config(problem) if dtype == "bfloat16" else None
            pool = [hopper] if hopper and rng.random() < 0.75 else pool
        config = replace(rng.choice(pool), pdl=rng.random() < 0.3, min_tiles=rng.choice([1, 4]))
        yield {
            "rank": rank, "rope_dim": rope_dim, "dtype": dtype, "form": form, "page_size": rng.choice([0, 0, 1, 16, 64, 128]),
            "config": asdict(config), "num_splits": rng.choice([0, 0, 0, 1, 3]),
            "softcap": rng.choice([0.0, 0.0, 0.0, 5.0]), "window": rng.choice([None, None, None, 50]),
            "mask": rng.choice([None, None, None, None, "padding", "gaps"]),
            "seed": index,
        }  # fmt: skip


def random_format(rank: int, rng: random.Random) -> RowFormat:
    """A format of packed rows."""
    kind = rng.choice(["fp8", "fp8", "int8", "int4", "int4", "mixed"])
    wide = {"fp8": rank, "int8": rank, "int4": 0, "mixed": rng.randrange(0, rank + 1, 16)}[kind]
    return RowFormat(wide, int(kind == "fp8"), rng.choice([0, 32, 64, 128, 48]), rng.choice([0, 1]))


def fitted(group: dict[str, Any], device: str) -> dict[str, Any]:
    """The group, made small enough for the interpreter where it runs there."""
    if device == "cuda":
        return group
    rank, form = 16 + group["rank"] % 48 // 16 * 16, group["form"]
    form = form and form._replace(wide=min(form.wide, rank))
    return group | {"rank": rank, "rope_dim": group["rope_dim"] % 32, "dtype": "float32", "form": form,
                    "config": group["config"] | {"pdl": False}}  # fmt: skip


def random_mask(case: dict[str, Any], tokens: int, lengths: list[int], gaps: bool, rng: random.Random) -> Tensor:
    """A mask with left padding of random width, and optionally one token in four hidden."""
    device = case["latent_cache"].device
    position = torch.arange(case["latent_cache"].shape[1], device=device)
    limit = torch.tensor(lengths, device=device)[:, None] - tokens + 1 + torch.arange(tokens, device=device)
    start = torch.tensor([rng.randrange(max(length, 1)) for length in lengths], device=device)
    mask = (position < limit[..., None]) & (position >= start[:, None, None])
    return mask & (torch.rand(mask.shape, device=device) < 0.75) if gaps else mask


def run_group(group: dict[str, Any], device: str, cases: int = 12) -> list[tuple[dict[str, Any], str | None]]:
    """Results of one kernel on several lengths, head counts and numbers of query tokens: (case, error or None).

    Errors of the GPU are raised, and the pool replaces the process.
    """
    rng = random.Random(group["seed"])
    config = DecodeConfig(**group["config"])
    dtype = getattr(torch, group["dtype"])
    options = {"softcap": group["softcap"], "window": group["window"]}
    results = []
    for number in range(cases):
        tokens = rng.choice([1, 1, 2, 4])
        heads = rng.choice(HEADS if device == "cuda" else [1, 3])
        lengths = LENGTHS[number % len(LENGTHS)] if device == "cuda" else LENGTHS[number % 2]
        if number == cases - 1 and device == "cuda":
            lengths = VERY_DEEP if group["seed"] % 25 == 0 else DEEP
        case = make_case(4, tokens, heads, group["rank"], group["rope_dim"], lengths, dtype, group["page_size"],
                         device, seed=number)  # fmt: skip
        if group["form"]:
            case = pack_case(case, group["form"])
        out = torch.full_like(case["q_latent"], torch.nan)
        lse = torch.full((4, heads, tokens), torch.nan, device=device)
        mask = None
        if group["mask"] and not group["page_size"] and not group["window"] and max(lengths) < 10000:
            mask = random_mask(case, tokens, lengths, group["mask"] == "gaps", rng)
            del case["cache_seqlens"]
        problem = as_problem(case, out, lse, group["num_splits"], group["softcap"], group["window"], mask)
        launch_decode(problem, config)
        label = {"heads": heads, "tokens": tokens, "lengths": lengths}
        results.append((label, disagreement(out, lse, case, mask=mask, **options)))
    if device == "cuda":
        torch.cuda.empty_cache()  # the other processes need it
    return results


def large_offsets(device: str) -> str | None:
    """Error on a cache of more than 2^31 numbers, in which the last sequence begins beyond that; None if there is none."""
    span = (1 << 21) + 64
    latent = torch.empty(3, span, 512, device=device, dtype=torch.bfloat16)
    rope = torch.empty(3, span, 64, device=device, dtype=torch.bfloat16)
    case = make_case(3, 1, 32, 512, 64, [100, 40, 3000], torch.bfloat16, device=device)
    rows = case["latent_cache"].shape[1]
    latent[:, :rows], rope[:, :rows] = case["latent_cache"], case["rope_cache"]
    small = dict(case)
    out, lse = torch.full_like(case["q_latent"], torch.nan), torch.full((3, 32, 1), torch.nan, device=device)
    launch_decode(as_problem(case | {"latent_cache": latent, "rope_cache": rope}, out, lse))
    error = disagreement(out, lse, small)
    del latent, rope
    torch.cuda.empty_cache()
    return error


def operators(device: str) -> str | None:
    """Error of the public functions, called as in a model: write new tokens, then decode, eager and compiled."""
    batch, tokens, heads, rank, planes = 2, 3, 32, 512, 32
    case = make_case(batch, tokens, heads, rank, 2 * planes, [100, 37], half(device), 64, device)
    positions = case["cache_seqlens"][:, None] - tokens + torch.arange(tokens, device=device, dtype=torch.int32)
    angles = torch.rand(batch, tokens, planes, device=device) * 6
    compressed = (torch.randn(batch, tokens, rank + 2 * planes, device=device) * CACHE_SCALE).to(half(device))
    new = {"latent": compressed[..., :rank], "k_rope": compressed[..., rank:], "q_rope": case["q_rope"],
           "cos": angles.cos(), "sin": angles.sin(), "positions": positions, "block_table": case["block_table"]}  # fmt: skip
    caches = {name: case[name].clone() for name in ("latent_cache", "rope_cache")}
    expected = naive_write(**new, **caches)
    case["q_rope"] = mla_write(**new, latent_cache=case["latent_cache"], rope_cache=case["rope_cache"])
    for result, reference in ((case["q_rope"], expected), *((case[name], caches[name]) for name in caches)):
        if not torch.allclose(result.float(), reference.float(), atol=2e-3, rtol=1e-2, equal_nan=True):
            return "mla_write differs from its reference"
    scale = case["softmax_scale"]
    out, lse = mla_decode(**case, return_lse=True)
    compiled = torch.compile(
        lambda inputs: mla_decode(**inputs, softmax_scale=scale), fullgraph=True, backend="aot_eager"
    )
    again = compiled({name: value for name, value in case.items() if torch.is_tensor(value)})
    if not torch.equal(again, out):
        return "mla_decode differs when compiled"
    return disagreement(out, lse, case)


def packed_writes(device: str) -> str | None:
    """Error of `mla_write` on packed rows: other bytes than the reference's in the latent, or another rotary key."""
    for name, rank, rope_dim in (
        ("fp8", 512, 64),
        ("int8/64", 80, 16),
        ("int4/128+8", 512, 64),
        ("int4/32", 80, 32),
        ("mixed/32", 256, 64),
    ):
        form = row_format(name, rank)
        angles = torch.rand(3, 5, rope_dim // 2, device=device) * 6
        new = {"latent": torch.randn(3, 5, rank, device=device).to(half(device)),
               "k_rope": torch.randn(3, 5, rope_dim, device=device).to(half(device)),
               "q_rope": torch.randn(3, 5, 7, rope_dim, device=device).to(half(device)), "cos": angles.cos(),
               "sin": angles.sin(), "positions": torch.arange(15, device=device).view(3, 5),
               "row_format": form, "rope_cache": None}  # fmt: skip
        rows = torch.full((3, 20, form.layout(rank, rope_dim).row_bytes), 77, dtype=torch.uint8, device=device)
        reference = rows.clone()
        query, expected = mla_write(**new, latent_cache=rows), naive_write(**new, latent_cache=reference)
        pairs = zip(*(naive_unpack(x, rank, rope_dim, form, torch.float32) for x in (rows, reference)), strict=True)
        (latent, expected_latent), (key, expected_key) = pairs
        differ = (latent != expected_latent).float().mean().item()
        if differ > 1e-3 or not torch.allclose(latent, expected_latent, rtol=0.13, atol=1e-3):
            return f"{name} {rank}: {differ:.1e} of the latent's numbers differ"
        if not torch.allclose(key, expected_key, rtol=0.13, atol=1e-2, equal_nan=True):
            return f"{name} {rank}: rotary keys differ by {(key - expected_key).abs().max().item():.1e}"
        if not torch.allclose(query.float(), expected.float(), atol=2e-3, rtol=1e-2):
            return f"{name} {rank}: queries differ"
    return None


def joint_writes(device: str) -> str | None:
    """The same for rows whose last channels are the rotary key times a matrix, in both kinds of cache."""
    for rank, rope_dim, form in (
        (224, 128, RowFormat(0, 0, 48)), (40, 24, RowFormat(0, 0, 32)), (160, 64, RowFormat(32, 0, 48)),
        (512, 128, RowFormat(0, 0)),
    ):  # fmt: skip
        angles = torch.rand(3, 5, rope_dim // 2, device=device) * 6
        latent, k_rope, q_rope = (
            torch.randn(3, 5, *size, device=device).to(half(device)) for size in ((rank,), (rope_dim,), (19, rope_dim))
        )
        basis = torch.linalg.qr(torch.randn(rope_dim, rope_dim, device=device))[0].to(half(device)).contiguous()
        new = {"latent": latent, "k_rope": k_rope, "q_rope": q_rope, "cos": angles.cos(), "sin": angles.sin(),
               "positions": torch.arange(15, device=device).view(3, 5), "row_format": form, "rope_cache": None,
               "key_basis": basis}  # fmt: skip
        size = form.layout(rank + rope_dim, 0).row_bytes
        for page_size in (0, 16):
            rows = torch.full((3, 16, size), 77, dtype=torch.uint8, device=device)
            table = torch.tensor([[2], [0], [1]], dtype=torch.int32, device=device) if page_size else None
            reference = rows.clone()
            query = mla_write(**new, latent_cache=rows, block_table=table, query_room=rank)[..., rank:]
            expected = naive_write(**new, latent_cache=reference, block_table=table)
            found, right = (naive_unpack(x, rank + rope_dim, 0, form, torch.float32)[0] for x in (rows, reference))
            differ = (found != right).float().mean().item()
            if differ > 0.02 or not torch.allclose(found, right, rtol=0.02, atol=1.0, equal_nan=True):
                return f"{rank} + {rope_dim}, pages of {page_size}: {differ:.1e} of the numbers differ"
            if not torch.allclose(query.float(), expected.float(), atol=2e-2, rtol=1e-2):
                return f"{rank} + {rope_dim}, pages of {page_size}: queries differ"
    return None


# Shapes with many tiles for every program, at full speed.
REPEATED = [
    (96, 32, 32, 32, 8192, 0, False, None), (128, 64, 32, 128, 8192, 0, False, None),
    (160, 32, 14, 32, 8192, 64, True, None), (256, 64, 128, 32, 8192, 0, False, None),
    (512, 64, 128, 32, 8192, 64, True, None), (512, 64, 32, 8, 32768, 0, False, None),
    (512, 64, 32, 32, 8192, 0, False, RowFormat(512, 1)), (512, 64, 32, 32, 8192, 64, True, RowFormat(0, 0, 128)),
    (96, 32, 32, 128, 8192, 0, False, RowFormat(96, 1)), (256, 64, 32, 8, 32768, 0, False, RowFormat(0, 0, 32, 1)),
    (352, 0, 9, 32, 8192, 64, True, RowFormat(0, 0, 48)),
]  # fmt: skip


def repeated(shape: Shape, device: str, times: int = 40) -> str | None:
    """Error of repeated calls, whose results must have the same bits every time; a race in a kernel changes them."""
    slices, _, _ = make_slices(*shape, device)
    error = row_error(slices, None, 0)
    if error > 5e-3:
        return f"a row is off by {error:.1e} of its norm"
    out, first = slices[6], None
    for _ in range(times):
        out.fill_(torch.nan)
        for call in reversed(decode_calls(slices, None, 0)):
            call()
        first = out.clone() if first is None else first
        if not torch.equal(out, first):
            return "a result differs from the one before"
    return None


def once(check: Callable[..., str | None], *arguments: Any) -> list[tuple[dict[str, Any], str | None]]:
    """The result of a single check in the form of `run_group`'s."""
    return [({}, check(*arguments))]


def table(counts: Counter) -> str:
    """Markdown table of right and wrong cases by every dimension of the grid."""
    lines = ["| dimension | value | right | wrong |", "|---|---|---|---|"]
    for name, value in sorted({key[:2] for key in counts}):
        lines.append(f"| {name} | {value} | {counts[name, value, True]} | {counts[name, value, False]} |")
    return "\n".join(lines)


def grid(arguments: argparse.Namespace) -> bool:
    """Run checks and random groups until the time is up; returns whether any case was wrong."""
    device = arguments.device
    log = Log(arguments.out, "grid")
    counts, kernels = Counter(), Counter()
    passed = failed = 0
    checks = [
        (check.__name__, once, check, device) for check in (operators, packed_writes, joint_writes, large_offsets)
    ]
    checks += [(f"repeated {shape}", once, repeated, shape, device) for shape in REPEATED]
    groups = grid_groups(arguments.seed, 0.6 if "bf16" in arguments.format else 1.0)
    pool = Pool(arguments.processes, seconds_per_job=60)
    while True:
        while pool.room and left(arguments) > 0:
            name, function, *rest = checks.pop(0) if checks else (None, run_group, fitted(next(groups), device), device)
            if name and name.split()[0] in ("large_offsets", "repeated") and device == "cpu":
                continue
            pool.start((name, rest[0]), function, *rest)
        for (name, group), results, problem in pool.finished():
            group = {"check": name} if name else group
            state = "run" if results else "too large" if "out of resource" in problem.lower() else "failed"
            kernels[state] += 1
            if state == "too large":
                continue
            for label, wrong in results or [({}, problem)]:
                passed, failed = passed + (not wrong), failed + bool(wrong)
                for key, value in {**group, **group.get("config", {}), **label}.items():
                    if key not in ("config", "seed"):
                        counts[key, str(value), not wrong] += 1
                if wrong:
                    log.add(f"WRONG {wrong} {label} {group}" if failed <= 20 else None, kind="failure",
                            problem=wrong, **label, group=group)  # fmt: skip
        if left(arguments) <= 0 and ((not pool.busy and not pool.done) or left(arguments) < -8):
            break
    pool.close()
    (arguments.out / "grid.md").write_text(table(counts) + "\n")
    log.add(f"{passed} cases right, {failed} wrong; kernels: {dict(kernels)}", kind="summary", passed=passed,
            failed=failed, kernels=kernels, device=device_name(device))  # fmt: skip
    return bool(failed)
