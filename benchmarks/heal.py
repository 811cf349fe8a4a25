"""What healing gives and takes: speed against a plain loop, step sizes, final figures, a control, one GPU against two.

    python benchmarks/heal.py all CONVERTED... --teacher ORIGINAL --data TRAIN --eval TEST --other CODE.txt --seconds 200

Every part can be run alone. Each result is one line of JSON, on stdout and at the end of --results; models are written to a
temporary folder and deleted. `all` runs each part as a process of its own and survives the failure of one.
"""

import argparse
import contextlib
import gc
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from mla_convert import texts
from mla_convert.evaluate import evaluate_model
from mla_convert.heal import HealConfig, HealSettings, data, heal, loop
from mla_convert.heal.shared import Pair
from mla_convert.heal.state import StateFolder
from mla_convert.loading import find_model, load_model, load_tokenizer
from mla_convert.progress import Progress

CUDA = torch.cuda.is_available()
DEVICE, HOST = torch.device("cuda" if CUDA else "cpu"), torch.device("cpu")
FROZEN = torch.bfloat16 if CUDA else torch.float32
RATES, NOISES, TRAINED = (0.001, 0.002, 0.004), (0.0, 0.3), ("all", "attention")


def emit(args, **result):
    line = json.dumps(result)
    print(line, flush=True)
    with open(args.results, "a") as file:
        file.write(line + "\n")


def sync():
    if CUDA:
        torch.cuda.synchronize()


def free():
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def accelerator():
    return Accelerator(cpu=not CUDA, mixed_precision="bf16" if CUDA else "no")


def autocast():
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA)


def settings_of(args, **own):
    base = {
        "tokens": 1,
        "length": str(args.length),
        "step_tokens": args.step_tokens,
        "micro_tokens": args.step_tokens,
        "compile": False,
    }
    return HealSettings(**{**base, **own})


def make_pair(converted, teacher, settings):
    student = load_model(find_model(converted), torch.float32 if settings.train == "all" else "auto", HOST)
    return Pair(student, load_model(find_model(teacher), FROZEN, HOST), settings, FROZEN)


def corpus_of(args, wanted):
    """All of the training text, tokenised once for every part."""
    folder = Path(args.work) / "corpus"
    if not (folder / data.IDS).exists():
        data.make_corpus(args.data, load_tokenizer(find_model(args.converted[0])), wanted, folder)
    return data.open_corpus(folder)


def labelled(args, spec, count):
    windows = texts.evaluation_windows(
        texts.load_text(spec, "evaluation")[0], load_tokenizer(find_model(args.converted[0])), count, args.length, spec
    )
    labels = torch.full_like(windows, data.IGNORED)
    labels[:, :-1] = windows[:, 1:]
    return windows, labels


# Speed


def timed(args, name, step, steps):
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for _ in range(3):
        step()
    sync()
    first, began = time.perf_counter() - began, time.perf_counter()
    for _ in range(steps):
        step()
    sync()
    seconds = (time.perf_counter() - began) / steps
    peak = round(torch.cuda.max_memory_allocated() / 1e9, 2) if CUDA else None
    emit(
        args,
        part="speed",
        name=name,
        tokens_per_second=round(args.step_tokens / seconds),
        first_steps=round(first, 1),
        peak_gb=peak,
    )
    return args.step_tokens / seconds


def speed(args):
    corpus = corpus_of(args, 4_000_000)
    batch = data.cut(corpus, [index * args.length for index in range(args.step_tokens // args.length)], args.length).to(
        DEVICE
    )

    def plain():
        student = load_model(find_model(args.converted[0]), torch.float32, DEVICE).requires_grad_(True).train()
        teacher = load_model(find_model(args.teacher), FROZEN, DEVICE)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6, fused=CUDA)

        def step():
            with autocast():
                with torch.no_grad():
                    target = teacher(batch.ids, use_cache=False).logits.float().log_softmax(-1)
                ours = student(batch.ids, use_cache=False).logits.float().log_softmax(-1)
                loss = F.kl_div(ours.flatten(0, 1), target.flatten(0, 1), reduction="batchmean", log_target=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return timed(args, "plain transformers loop, KL", step, args.steps)

    def ours(**own):
        settings = settings_of(args, **own)
        pair, engine = make_pair(args.converted[0], args.teacher, settings).place(DEVICE), accelerator()
        if settings.gradient_checkpointing:
            pair.checkpoint_gradients()
        if settings.compile:
            pair.compile()
        model, optimizer = engine.prepare(pair, loop.make_optimizer(pair, settings))
        parameters = [p for p in model.parameters() if p.requires_grad]
        for group in optimizer.param_groups:
            group["lr"] = 1e-6

        def step():
            loss, _ = model(batch.ids, batch.labels)
            engine.backward(loss)
            engine.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        found = timed(args, f"ours, {own or 'all'}", step, args.steps)
        engine.free_memory(model, optimizer)
        return found

    speeds = {}
    for name, run in (
        ("plain", plain),
        ("eager", ours),
        ("compiled", lambda: ours(compile=True)),
        ("attention", lambda: ours(train="attention")),
        ("attention, compiled", lambda: ours(train="attention", compile=True)),
        ("checkpointing", lambda: ours(gradient_checkpointing=True)),
    ):
        try:
            speeds[name] = run()
        except Exception as error:
            emit(args, part="speed", name=name, error=repr(error)[:500])
        free()
    found = max(("eager", "compiled"), key=lambda name: speeds.get(name, 0.0))
    (Path(args.work) / "speed.json").write_text(
        json.dumps({"compile": found == "compiled", "speed": speeds.get(found, 1.0)})
    )


# Step sizes


def race(args):
    """Short runs; the best by KL on text of the training kind's sibling (--eval is not looked at) and on --other."""
    corpus, best, began = corpus_of(args, 4_000_000), None, time.perf_counter()
    judged = [labelled(args, spec, 8) for spec in args.other]
    tokenizer = load_tokenizer(find_model(args.converted[0]))
    for train, noise, lr in ((t, n, r) for n in NOISES for t in TRAINED for r in RATES):
        if time.perf_counter() - began > args.seconds:
            break
        settings = settings_of(
            args, lr=lr, noise=noise, train=train, tokens=args.steps * args.step_tokens, evaluations=1
        )
        state, engine = Path(args.work) / "race", accelerator()
        shutil.rmtree(state, ignore_errors=True)
        pair = make_pair(args.converted[0], args.teacher, settings).place(DEVICE)
        trainer = loop.Trainer(
            engine,
            pair,
            corpus,
            settings,
            StateFolder(state, {}, engine),
            Progress(quiet=True),
            texts.ordinary_tokens(tokenizer),
        )
        run = trainer.train()
        found = []
        with torch.no_grad():
            for windows, labels in judged:
                parts = [
                    trainer.model(w[None].to(DEVICE), k[None].to(DEVICE))[1]
                    for w, k in zip(windows, labels, strict=True)
                ]
                found.append(round(float(torch.stack(parts)[:, 1].mean()), 5))
        emit(
            args,
            part="race",
            lr=lr,
            noise=noise,
            train=train,
            kl=found,
            held_out=[entry["kl"] for entry in run.curve],
            tokens=run.tokens,
            seconds=run.seconds,
        )
        if best is None or math.prod(found) < best[0]:
            best = math.prod(found), {"lr": lr, "noise": noise, "train": train}
            (Path(args.work) / "race.json").write_text(json.dumps(best[1]))
        engine.free_memory(trainer.model, trainer.optimizer)
        del trainer, pair
        free()


# Final figures


def known(args, name, default):
    with contextlib.suppress(OSError, ValueError):
        return {**default, **json.loads((Path(args.work) / name).read_text())}
    return default


def final(args):
    """heal() itself, measured before and after on --eval, and on --other."""
    how = known(args, "speed.json", {"compile": False, "speed": 70_000.0 if CUDA else 500.0})
    chosen = known(args, "race.json", {"lr": 0.002, "noise": 0.0, "train": "all"})
    tokens = args.tokens or int(how["speed"] * args.seconds * args.share)
    for converted in args.converted:
        out = Path(args.work) / f"healed-{Path(converted).name}"
        report = heal(
            HealConfig(
                folder=converted,
                teacher=args.teacher,
                data=args.data,
                eval=args.eval,
                eval_windows=args.windows,
                eval_length=args.length,
                passkey_length=args.passkey_length,
                out=out,
                overwrite=True,
                tokens=tokens,
                step_tokens=args.step_tokens,
                micro_tokens=args.step_tokens,
                length=str(args.length),
                compile=how["compile"],
                self_share=args.self_share,
                **chosen,
            ),
            Progress(verbose=True),
        )
        record = report["heal"]
        emit(
            args,
            part="final",
            converted=Path(converted).name,
            before=record["before"]["evaluation"]["ratio"],
            after=report["evaluation"]["ratio"],
            beyond_before=record["before"]["beyond"],
            beyond_after=report["beyond"],
            **{
                key: record[key]
                for key in ("settings", "tokens", "seconds", "tokens_per_second", "best_tokens", "stopped", "curve")
            },
        )
        for spec in args.other:
            ratios = [
                evaluate_model(
                    str(folder), args.teacher, text=spec, windows=8, length=args.length, device=DEVICE.type
                ).ratio.value
                for folder in (converted, out)
            ]
            emit(
                args,
                part="final",
                converted=Path(converted).name,
                text=Path(spec).name,
                before=ratios[0],
                after=ratios[1],
            )
        shutil.rmtree(out, ignore_errors=True)


def control(args):
    """The original through the same text by cross-entropy: what of a perplexity is the domain."""
    corpus, (windows, _) = corpus_of(args, 4_000_000), labelled(args, args.eval, args.windows)
    model = load_model(find_model(args.teacher), torch.float32, DEVICE).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=loop.BETAS, weight_decay=0.0, fused=CUDA)
    schedule = data.Schedule(corpus, ((args.length, 1.0),), args.step_tokens, args.steps, 0)

    @torch.no_grad()
    def perplexity():
        with autocast():
            losses = [
                float(model(ids[None].to(DEVICE), labels=ids[None].to(DEVICE), use_cache=False).loss) for ids in windows
            ]
        return math.exp(sum(losses) / len(losses))

    before = perplexity()
    for step in range(args.steps):
        optimizer.param_groups[0]["lr"] = 3e-4 * loop.scheduled(step, args.steps)
        ids = data.cut(corpus, schedule.begins(step)[1], args.length).ids.to(DEVICE)
        with autocast():
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    emit(args, part="control", tokens=args.steps * args.step_tokens, before=before, after=perplexity())


# Several processes


def processes(args):
    """The same few steps on whatever this was launched with; by rank 0 the losses, the speed and the memory."""
    settings = settings_of(
        args, lr=0.001, step_tokens=2 * args.step_tokens, tokens=2 * args.step_tokens * args.steps, evaluations=1
    )
    engine = accelerator()
    state = Path(args.work) / f"state-{args.name}"
    pair = make_pair(args.converted[0], args.teacher, settings).place(engine.device)
    trainer = loop.Trainer(
        engine, pair, corpus_of(args, 4_000_000), settings, StateFolder(state, {}, engine), Progress(quiet=True)
    )
    inner, marks = trainer._step, []

    def step(number):
        found = inner(number)
        sync()
        marks.append(time.perf_counter())
        return found

    trainer._step = step
    run = trainer.train()
    if engine.is_main_process:
        steady = marks[min(4, len(marks) - 2) :]
        rate = (len(steady) - 1) * settings.step_tokens / (steady[-1] - steady[0])
        peak = round(torch.cuda.max_memory_allocated() / 1e9, 2) if CUDA else None
        emit(
            args,
            part="processes",
            name=args.name,
            processes=engine.num_processes,
            kind=str(engine.distributed_type),
            losses=run.losses,
            held_out=[entry["kl"] for entry in run.curve],
            tokens_per_second=round(rate),
            peak_gb=peak,
        )


# All of it


def everything(args):
    def run(part, *more, launch=(sys.executable,), env=None, converted=args.converted):
        common = [
            "--teacher",
            args.teacher,
            "--data",
            args.data,
            "--eval",
            args.eval,
            "--results",
            args.results,
            "--work",
            args.work,
            "--length",
            args.length,
            "--step-tokens",
            args.step_tokens,
            "--windows",
            args.windows,
            "--self-share",
            args.self_share,
            *(("--other", *args.other) if args.other else ()),
        ]
        command = [*launch, __file__, part, *converted, *common, *more]
        done = subprocess.run([*map(str, command)], env=os.environ | (env or {}))
        if done.returncode:
            emit(args, part=part, error=f"exit code {done.returncode}")

    small = args.converted[len(args.converted) // 2 :][:1]
    run("speed", converted=small)
    run("race", "--seconds", args.seconds, converted=small)
    for folder in args.converted:
        run("final", "--seconds", args.seconds, "--passkey-length", args.passkey_length, converted=[folder])
    run("control", "--steps", 50, converted=small)
    run("processes", "--name", "one", converted=small)
    if torch.cuda.device_count() > 1:
        both = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
        run("processes", "--name", "ddp", launch=both, converted=small)
        sharded = {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
            "FSDP_RESHARD_AFTER_FORWARD": "true",
        }
        run("processes", "--name", "fsdp2", launch=both, env=sharded, converted=small)


PARTS = {"all": everything, "speed": speed, "race": race, "final": final, "control": control, "processes": processes}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("converted", nargs="+", help="converted folders")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval", required=True, help="text of the final figures")
    parser.add_argument("--other", nargs="*", default=[], help="texts to choose settings by, and to measure on as well")
    parser.add_argument("--results", default="heal-bench.jsonl")
    parser.add_argument("--work", help="temporary folder; deleted if not given")
    parser.add_argument("--seconds", type=float, default=60, help="of training for each final figure, and of the race")
    parser.add_argument("--share", type=float, default=0.9, help="of them that is spent on steps")
    parser.add_argument("--tokens", type=int, help="of a final run, instead of --seconds")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--step-tokens", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--passkey-length", type=int, default=2048)
    parser.add_argument("--self-share", type=float, default=0.0)
    parser.add_argument("--name", default="one")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        args.work = args.work or stack.enter_context(tempfile.TemporaryDirectory())
        PARTS[args.part](args)


if __name__ == "__main__":
    main()
