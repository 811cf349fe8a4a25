"""One engine in one process: start it, time prompts and decodes, print one JSON line each. Called by speed.py."""

from __future__ import annotations

import json
import os
import random
import sys
import time

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine runs in this process, and is stepped by hand
for name in ("VLLM_USE_FLASHINFER_SAMPLER", "VLLM_USE_DEEP_GEMM"):  # not packed
    os.environ.setdefault(name, "0")


CHUNK = 8192  # tokens of a step


def waiting(batch: int, context: int) -> int:
    """Most tokens that the first sequence makes until all others have been read."""
    return batch * (context // CHUNK + 2) + 16


def start(asked: dict):
    """The engine for a folder, with CUDA graphs for the batches that are timed."""
    from vllm import LLM

    batches = sorted({batch for batch, _ in asked["points"]})
    compilation = {"cudagraph_capture_sizes": batches}
    if not asked["compile"]:
        compilation |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    longest = max(context + waiting(batch, context) for batch, context in asked["points"]) + asked["steps"] + 64
    return LLM(
        model=asked["folder"], dtype="bfloat16", load_format="dummy", skip_tokenizer_init=True, max_model_len=longest,
        max_num_seqs=max(batches), max_num_batched_tokens=CHUNK, gpu_memory_utilization=0.9, seed=0,
        kv_cache_dtype=asked["cache"], enable_prefix_caching=False, compilation_config=compilation,
        disable_log_stats=True,
    )  # fmt: skip


def kernel_times(step, steps: int) -> list[tuple[str, float, float]]:
    """Name, launches a step and microseconds a step of the kernels that take most of the time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(steps):
            step()
    events = [event for event in seen.key_averages() if event.device_time_total]
    events.sort(key=lambda event: -event.device_time_total)
    return [(event.key[:60], event.count / steps, event.device_time_total / steps) for event in events[:14]]


def time_point(llm, batch: int, context: int, steps: int, salt: int, kernels: bool = False) -> dict:
    """Seconds of a prompt, and of a decode step with every sequence in its decode.

    The first sequence's prompt is timed alone. Decode steps are timed after all prompts have been read, over `steps` steps.
    """
    from vllm import SamplingParams

    engine, vocabulary = llm.llm_engine, llm.llm_engine.model_config.get_vocab_size()
    draw = random.Random(salt)
    most = steps + waiting(batch, context) + 16 * kernels
    sampling = SamplingParams(temperature=0.0, max_tokens=most, ignore_eos=True, detokenize=False)
    made: dict[str, int] = {}

    def step() -> None:
        for output in engine.step():
            made[output.request_id] = len(output.outputs[0].token_ids)

    def add(index: int) -> None:
        tokens = [draw.randrange(10, vocabulary) for _ in range(context)]
        engine.add_request(f"{salt}-{index}", {"prompt_token_ids": tokens}, sampling)

    add(0)
    begin = time.perf_counter()
    while not made:
        step()
    prompt = time.perf_counter() - begin
    for index in range(1, batch):
        add(index)
    while len(made) < batch:
        step()
    for _ in range(3):
        step()
    begin, before = time.perf_counter(), sum(made.values())
    for _ in range(steps):
        step()
    seconds, tokens = time.perf_counter() - begin, sum(made.values()) - before
    profiled = kernel_times(step, 8) if kernels else []
    engine.abort_request(list(made))
    while engine.has_unfinished_requests():
        engine.step()
    whole = tokens == steps * batch
    return {"batch": batch, "context": context, "prompt_tokens_s": context / prompt, "decode_tokens_s": tokens / seconds,
            "step_ms": 1e3 * seconds / steps, "whole": whole, "kernels": profiled}  # fmt: skip


def main() -> None:
    """Time the points of the JSON argument."""
    asked = json.loads(sys.argv[1])
    begin = time.perf_counter()
    llm = start(asked)
    sys.path.insert(0, asked["root"])
    from mla_convert.publish.engines.ask_engine import vllm_setting

    cache = llm.llm_engine.vllm_config.cache_config
    head = vllm_setting(llm, {}) | {"start_s": time.perf_counter() - begin}
    head["cache_tokens"] = (cache.num_gpu_blocks or 0) * cache.block_size
    print("HEAD", json.dumps(head), flush=True)
    time_point(llm, 1, min(context for _, context in asked["points"]), 4, -1)  # compiles what was not captured
    for salt, (batch, context) in enumerate(asked["points"]):
        if batch * (context + asked["steps"]) > head["cache_tokens"]:
            print("SKIP", batch, context, flush=True)
            continue
        point = time_point(llm, batch, context, asked["steps"], salt, asked["kernels"])
        print("POINT", json.dumps(point), flush=True)


if __name__ == "__main__":
    main()
