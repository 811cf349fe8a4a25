"""The same few steps on one process or several; the first one reports losses, speed and memory."""

import time

from harness import DEVICE, accelerator, corpus_of, emit, make_pair, peak, settings_of, sync, trainer_of, wait_for

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def main(args):
    tokens, steps = 2 * args.step_tokens, args.steps
    settings = settings_of(args, lr=0.001, step_tokens=tokens, tokens=tokens * steps, evaluations=1, self_share=0)
    pair = make_pair(args.converted[0], args.teacher, settings)
    wait_for(args, args.gate, 600)
    engine = accelerator()
    with engine.main_process_first():
        corpus = corpus_of(args, args.tokens if args.gate else tokens * steps, False)
    pair.place(engine.device if DEVICE.type == "cuda" else DEVICE)
    engine, trainer = trainer_of(args, pair, corpus, settings, f"state-{args.name}")
    inner, marks = trainer._step, []

    def step(number):
        found = inner(number)
        sync()
        marks.append(time.perf_counter())
        return found

    trainer._step = step
    run = trainer.train()
    if engine.is_main_process:
        # Without the first steps, in which kernels are loaded and chosen.
        steady = marks[min(4, len(marks) - 2) :]
        rate = (len(steady) - 1) * tokens / (steady[-1] - steady[0])
        emit(args, part="processes", name=args.name, processes=engine.num_processes, kind=str(engine.distributed_type),
             losses=run.losses, held_out=[entry["kl"] for entry in run.curve], tokens_per_second=round(rate),
             peak_gb=peak())  # fmt: skip
