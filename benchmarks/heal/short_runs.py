"""Short runs of equal length from the same start, evaluated on --eval and --other."""

import shutil
from pathlib import Path

import torch
from harness import (
    DEVICE,
    corpus_folder,
    corpus_of,
    emit,
    free,
    judge,
    judged,
    make_pair,
    settings_of,
    trainer_of,
    words,
)

TRIES = ("", "lr=0.0005", "lr=0.002", "self_share=0", "noise=0.3", "ce_weight=0.1")
# Settings that the models and their loss know nothing of: tries that differ in these alone share a pair.
OF_THE_RUN = {"tokens", "step_tokens", "micro_tokens", "evaluations", "patience", "lr", "noise", "self_share", "seed"}


def main(args):
    tokens, sets, pair, known = args.steps * args.step_tokens, judged(args), None, None
    # what was prepared for longer runs will do
    drawn = args.tokens if corpus_folder(args, args.tokens).exists() else tokens
    for number, text in enumerate(args.tries):
        own = words(text)
        settings = settings_of(args, **{"tokens": tokens, "evaluations": 1, **own})
        needed = settings.model_dump(exclude=OF_THE_RUN)
        if needed != known:
            known, pair, start = needed, None, None
            free()
            pair = make_pair(args.converted[0], args.teacher, settings).place(DEVICE)
            start = [(p, p.detach().clone()) for p in pair.parameters() if p.requires_grad]
        with torch.no_grad():
            for parameter, value in start:
                parameter.copy_(value)
        name = f"race-{Path(args.converted[0]).name}-{number}"
        engine, trainer = trainer_of(args, pair, corpus_of(args, drawn), settings, name)
        before = judge(trainer.model, sets)
        run = trainer.train()
        emit(args, part="race", **own, before=before, after=judge(trainer.model, sets),
             held_out=[entry["kl"] for entry in run.curve], tokens=run.tokens, seconds=run.seconds)  # fmt: skip
        engine.free_memory(trainer.model, trainer.optimizer)
        shutil.rmtree(Path(args.work) / name, ignore_errors=True)
        del trainer
        free()
