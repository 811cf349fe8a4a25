"""`heal` from start to end, with quality before and after; and the original trained on the same text, as a control."""

import math
import shutil
import time
from pathlib import Path

import torch
from harness import CUDA, DEVICE, autocast, corpus_folder, corpus_of, emit, judged, wait_for, words

from mla_convert.core.progress import Progress
from mla_convert.evaluate.quality.evaluation import evaluate_model
from mla_convert.heal import HealConfig, heal, loop, run, windows
from mla_convert.heal.prepare_text import LABELS
from mla_convert.heal.schedule import Schedule
from mla_convert.method.refine.relative_adam import cosine
from mla_convert.source.load_model import find_model, load_model


def main(args):
    for converted in args.converted:
        name, out = Path(converted).name, Path(args.work) / f"healed-{Path(converted).name}"
        others = {}
        if args.gate:
            _prepared(args, name, lambda converted=converted, others=others: others.update(_others(args, converted)))
        report = heal(
            HealConfig(folder=converted, teacher=args.teacher, data=args.data, eval=args.eval, eval_windows=args.windows,
                       eval_length=args.length, passkey_length=args.passkey_length, length=str(args.length), out=out,
                       overwrite=True, tokens=args.tokens, step_tokens=args.step_tokens, micro_tokens=args.step_tokens,
                       **words(args.own)),
            Progress(),
        )  # fmt: skip
        record, found = report["heal"], {}
        for what, value in (("before", record["before"]), ("after", report)):
            passkey = [[entry["length"], *(entry[side]["match"]["value"] for side in ("before", "after"))]
                       for entry in value["probes"]["passkey"]["lengths"]]  # fmt: skip
            found[what] = {"ratio": value["evaluation"]["ratio"], "perplexity": value["evaluation"]["after"]["value"],
                           **{key: value["probes"]["next_token"][key]["value"] for key in ("kl", "agreement")},
                           "passkey": passkey}  # fmt: skip
        kept = ("tokens", "seconds", "tokens_per_second", "best_tokens", "stopped", "settings", "device")
        curve = [[round(entry["tokens"] / 1e6, 2), entry["kl"], entry["loss"]] for entry in record["curve"]]
        emit(args, part="final", converted=name, **found, **{key: record[key] for key in kept}, curve=curve)
        others, after = others or _others(args, converted), _others(args, out)
        for spec, before in others.items():
            emit(args, part="final", converted=name, text=spec, before=before, after=after[spec])
        shutil.rmtree(out, ignore_errors=True)


def _others(args, folder):
    """Perplexity over the original's on each text of --other."""
    return {
        Path(spec).name: evaluate_model(
            str(folder), args.teacher, text=spec, windows=8, length=args.length, device=DEVICE.type,
            progress=Progress(quiet=True),
        ).ratio.value for spec in args.other
    }  # fmt: skip


def _prepared(args, name, measure):
    """Make `heal` use the text of part `text` and train from --gate to --until, with a learning rate that follows the time."""
    train, step, began = run._train, loop.Trainer._step, []

    def prepare_corpus(state, *_):
        def make():
            wait_for(args, "text")
            for file in corpus_folder(args, args.tokens).iterdir():
                shutil.copy(file, state.folder)
            return {"labels": [Path(args.data).name]}

        return state.remember(LABELS, make)["labels"]

    def gated(*given):
        measure()
        wait_for(args, args.gate)
        return train(*given)

    def rate_factor(number, steps):
        done = (time.time() - began[0]) / (args.until - began[0]) if began else 0.0
        return min(1.0, (number + 1) / loop.WARMUP_MAX) * cosine(done, loop.FLOOR)

    def timed(trainer, number):
        if number == 3:  # compiled by now
            began.append(time.time())
        if number > 3 and time.time() > args.until:
            trainer.schedule.steps = trainer.schedule.steps[: number + 1]
        if number % 200 == 0:
            emit(args, part="progress", converted=name, tokens=trainer.run.tokens, kl=trainer.run.curve[-1]["kl"])
        return step(trainer, number)

    run.prepare_corpus, run._train, loop.Trainer._step = prepare_corpus, gated, timed
    if args.until:
        loop.rate_factor = rate_factor


def control(args):
    """Train the original on the same text by cross-entropy: the part of a perplexity that is adaptation to the domain."""
    model = load_model(find_model(args.teacher), torch.float32, DEVICE).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=loop.BETAS, weight_decay=0.0, fused=CUDA)
    sets = judged(args, args.windows)
    wait_for(args, "text" if Path(args.work, "began.done").exists() else None)
    corpus = corpus_of(args, args.tokens, False)
    schedule = Schedule(corpus, ((args.length, 1.0),), args.step_tokens, args.steps, 0)

    @torch.no_grad()
    def perplexities():
        found = {}
        for name, (every, _) in sets.items():
            with autocast():
                losses = [float(model(ids[None], labels=ids[None], use_cache=False).loss) for ids in every]
            found[name] = round(math.exp(sum(losses) / len(losses)), 4)
        return found

    before = perplexities()
    for number in range(args.steps):
        optimizer.param_groups[0]["lr"] = 3e-4 * loop.rate_factor(number, args.steps)
        begins = [window.begin for window in schedule.step(number)[1]]
        ids = windows.cut(corpus, begins, args.length).ids.to(DEVICE)
        with autocast():
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    emit(args, part="control", tokens=args.steps * args.step_tokens, before=before, after=perplexities())
