"""heal() itself, measured before and after; and the original through the same text, as a control."""

import math
import shutil
from pathlib import Path

import torch
from common import CUDA, DEVICE, autocast, corpus_of, emit, judged, words

from mla_convert.evaluate import evaluate_model
from mla_convert.heal import HealConfig, data, heal, loop
from mla_convert.loading import find_model, load_model
from mla_convert.progress import Progress


def main(args):
    for converted in args.converted:
        name, out = Path(converted).name, Path(args.work) / f"healed-{Path(converted).name}"
        report = heal(
            HealConfig(folder=converted, teacher=args.teacher, data=args.data, eval=args.eval, eval_windows=args.windows,
                       eval_length=args.length, passkey_length=args.passkey_length, out=out, overwrite=True,
                       tokens=args.tokens, **words(args.own)),
            Progress(),
        )  # fmt: skip
        record, found = report["heal"], {}
        for what, value in (("before", record["before"]), ("after", report)):
            passkey = [[entry["length"], *(entry[side]["match"]["value"] for side in ("before", "after"))]
                       for entry in value["beyond"]["passkey"]["lengths"]]  # fmt: skip
            found[what] = {"ratio": value["evaluation"]["ratio"], "perplexity": value["evaluation"]["after"]["value"],
                           **{key: value["beyond"]["next_token"][key]["value"] for key in ("kl", "agreement")},
                           "passkey": passkey}  # fmt: skip
        kept = ("tokens", "seconds", "tokens_per_second", "best_tokens", "stopped", "settings", "device")
        curve = [[round(entry["tokens"] / 1e6, 2), entry["kl"], entry["loss"]] for entry in record["curve"]]
        emit(args, part="final", converted=name, **found, **{key: record[key] for key in kept}, curve=curve)
        for spec in args.other:
            ratios = [
                evaluate_model(
                    str(folder), args.teacher, text=spec, windows=8, length=args.length, device=DEVICE.type,
                    progress=Progress(quiet=True),
                ).ratio.value for folder in (converted, out)
            ]  # fmt: skip
            emit(args, part="final", converted=name, text=Path(spec).name, before=ratios[0], after=ratios[1])
        shutil.rmtree(out, ignore_errors=True)


def control(args):
    """The original through the same text by cross-entropy: what of a perplexity is the domain."""
    model = load_model(find_model(args.teacher), torch.float32, DEVICE).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=loop.BETAS, weight_decay=0.0, fused=CUDA)
    corpus, sets, steps = corpus_of(args, args.tokens, 0.0), judged(args, args.windows), args.tokens // args.step_tokens
    schedule = data.Schedule(corpus, ((args.length, 1.0),), args.step_tokens, steps, 0)

    @torch.no_grad()
    def perplexities():
        found = {}
        for name, (windows, _) in sets.items():
            with autocast():
                losses = [float(model(ids[None], labels=ids[None], use_cache=False).loss) for ids in windows]
            found[name] = round(math.exp(sum(losses) / len(losses)), 4)
        return found

    before = perplexities()
    for number in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-4 * loop.scheduled(number, steps)
        begins = [window.begin for window in schedule.step(number)[1]]
        ids = data.cut(corpus, begins, args.length).ids.to(DEVICE)
        with autocast():
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    emit(args, part="control", tokens=steps * args.step_tokens, before=before, after=perplexities())
