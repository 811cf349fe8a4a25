"""Shared by all parts: results, models, text, and a short evaluation on other texts."""

import gc
import json
import math
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from accelerate import Accelerator

from mla_convert.core.progress import Progress
from mla_convert.heal import HealSettings, data, loop, prepare_text
from mla_convert.heal.state import StateFolder
from mla_convert.heal.teacher_student import TeacherStudent
from mla_convert.source import texts
from mla_convert.source.load_model import find_model, load_model, load_tokenizer
from mla_convert.source.tokens import ordinary_tokens

CUDA = torch.cuda.is_available()
DEVICE, HOST = torch.device("cuda" if CUDA else "cpu"), torch.device("cpu")
FROZEN = torch.bfloat16 if CUDA else torch.float32
BEGAN = time.perf_counter()


def emit(args, **result):
    line = json.dumps({**result, "at": round(time.perf_counter() - BEGAN, 1)})
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


def peak():
    return round(torch.cuda.max_memory_allocated() / 1e9, 2) if CUDA else None


def accelerator():
    return Accelerator(cpu=not CUDA, mixed_precision="bf16" if CUDA else "no")


def autocast():
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA)


def words(text):
    """'lr=0.002,train=all' as settings, whose values pydantic parses."""
    return dict(part.split("=") for part in text.split(",") if part)


def settings_of(args, **own):
    return HealSettings(**{"tokens": 1, "length": str(args.length), "step_tokens": args.step_tokens,
                           "micro_tokens": args.step_tokens, "compile": False, **own})  # fmt: skip


def make_pair(converted, teacher, settings):
    student = load_model(find_model(converted), torch.float32 if settings.train == "all" else "auto", HOST)
    return TeacherStudent.build(student, load_model(find_model(teacher), FROZEN, HOST), settings, FROZEN)


def signal(args, name):
    """Tell the processes that wait for a part that it is done."""
    Path(args.work, f"{name}.done").touch()


def wait_for(args, name, seconds=120):
    end = time.time() + seconds
    while name and not Path(args.work, f"{name}.done").exists() and time.time() < end:
        time.sleep(0.05)


def corpus_folder(args, tokens, written=True):
    return Path(args.work) / f"corpus-{tokens}-{'mixed' if written else 'text'}"


def corpus_of(args, tokens, written=True):
    """Text for runs over `tokens` tokens, with or without self-generated text; prepared once for all parts."""
    folder, bare = corpus_folder(args, tokens, written), corpus_folder(args, tokens, False)
    origin = find_model(args.teacher)
    # The processor tokenises while the device generates.
    with ThreadPoolExecutor() as pool:
        made = None
        if not (bare / data.IDS).exists():
            wanted = data.needed_tokens(tokens)
            made = pool.submit(data.make_corpus, args.data, load_tokenizer(origin), wanted, bare)
        if written and not (folder / data.IDS).exists():
            began = time.perf_counter()
            engine, settings = accelerator(), settings_of(args, tokens=tokens)
            ids = prepare_text.generate_text(engine, settings, origin, load_tokenizer(origin), Progress(quiet=True))
            emit(args, part="written", tokens=len(ids), seconds=round(time.perf_counter() - began, 1), peak_gb=peak())
            made and made.result()
            shutil.copytree(bare, folder, dirs_exist_ok=True)
            data.add_generated(folder, ids)
            free()
        made and made.result()
    return data.open_corpus(folder)


def trainer_of(args, pair, corpus, settings, name):
    """A trainer with its state in `args.work`."""
    engine = accelerator()
    vocabulary = ordinary_tokens(load_tokenizer(find_model(args.teacher)))
    state = StateFolder(Path(args.work) / name, {}, engine)
    return engine, loop.Trainer(engine, pair, corpus, settings, state, Progress(quiet=True), vocabulary)


def judged(args, count=8):
    """Windows (N, L) and labels of --eval and --other."""
    tokenizer, found = load_tokenizer(find_model(args.teacher)), {}
    for spec in (args.eval, *args.other):
        windows = texts.evaluation_windows(texts.load_text(spec, "evaluation")[0], tokenizer, count, args.length, spec)
        labels = torch.full_like(windows, data.IGNORED)
        labels[:, :-1] = windows[:, 1:]
        found[Path(spec).name] = windows.to(DEVICE), labels.to(DEVICE)
    return found


@torch.no_grad()
def judge(model, sets):
    """KL and the perplexity over the original's on each text."""
    found = {}
    for name, (windows, labels) in sets.items():
        parts = [model(w[None], k[None])[1] for w, k in zip(windows, labels, strict=True)]
        _, kl, ce, original = torch.stack(parts).mean(0).tolist()
        # The means are over tokens, and the last token of a window has no label.
        per_label = windows.shape[1] / (windows.shape[1] - 1)
        found[name] = {"kl": round(kl, 5), "ratio": round(math.exp((ce - original) * per_label), 4)}
    return found
