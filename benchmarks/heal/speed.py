"""Tokens per second and memory of one training step, of healing and of a plain transformers loop, on the same batch."""

import time

import torch
import torch.nn.functional as F
from harness import (
    CUDA,
    DEVICE,
    FROZEN,
    accelerator,
    autocast,
    corpus_of,
    emit,
    free,
    make_pair,
    peak,
    settings_of,
    signal,
    sync,
)

from mla_convert.heal import loop, windows
from mla_convert.heal.cuda_graph import EAGER_PASSES, GraphedStep
from mla_convert.source.load_model import find_model, load_model

# Settings, and whether passes are captured as CUDA graphs.
VARIANTS = (
    ("all", {}, False),
    ("all, compiled", {"compile": True}, False),
    ("all, compiled, captured", {"compile": True}, True),
    ("attention, compiled, captured", {"train": "attention", "compile": True}, True),
    ("all, checkpointed", {"gradient_checkpointing": True}, False),
)

QUICK = (("all, compiled, captured", {"compile": True}, True),)


def timed(args, name, step, steps=8, warm=3):
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for _ in range(warm):
        step()
    sync()
    first, began = time.perf_counter() - began, time.perf_counter()
    for _ in range(steps):
        step()
    sync()
    seconds = (time.perf_counter() - began) / steps
    emit(args, part="speed", name=name, tokens_per_second=round(args.step_tokens / seconds),
         warm_up_seconds=round(first, 1), peak_gb=peak())  # fmt: skip
    if args.profile and CUDA:
        profile(name, step)


def profile(name, step, rows=25):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        step()
        sync()
    events = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
    print(f"{name}: {sum(event.self_device_time_total for event in events) / 1e3:.1f} ms of kernels in a step")
    for event in events[:rows]:
        print(f"  {event.self_device_time_total / 1e3:8.2f} ms {event.count:5d}x {event.key[:110]}", flush=True)


def plain(args, batch):
    student = load_model(find_model(args.converted[0]), torch.float32, DEVICE).requires_grad_(True).train()
    teacher = load_model(find_model(args.teacher), FROZEN, DEVICE)
    # A rate that leaves the weights all but unchanged: speed does not depend on it, and the loss stays finite.
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

    timed(args, "plain transformers loop, KL", step)


def ours(args, batch, name, own, capture):
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

    def forward_backward(ids, labels, positions, counted, share):
        loss = model(ids, labels, positions, counted)[0] * share
        engine.backward(loss)
        return loss.detach()

    run = GraphedStep(forward_backward, parameters, capture and CUDA)

    def step():
        run(batch, 1.0, first=True)
        engine.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=not run.capture)

    timed(args, name, step, warm=3 + capture * EAGER_PASSES)
    engine.free_memory(model, optimizer)


def main(args):
    corpus = corpus_of(args, 20 * args.step_tokens, False)
    begins = [index * args.length for index in range(args.step_tokens // args.length)]
    batch = windows.cut(corpus, begins, args.length).to(DEVICE)
    batch = windows.Batch(batch.ids, batch.labels, None)  # nobody sees another document's tokens: there is one
    for name, *how in (("plain",), *(QUICK if args.quick else VARIANTS)):
        try:
            ours(args, batch, name, *how) if how else plain(args, batch)
        except Exception as error:
            emit(args, part="speed", name=name, error=repr(error)[:500])
        free()
    signal(args, "speed")
