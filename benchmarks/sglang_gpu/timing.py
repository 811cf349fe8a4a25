"""One engine in one process: start it, time prompts and decodes, print one JSON line each. Called by speed.py."""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path

CHUNK = 8192  # tokens of a step
SHORT = 4  # tokens of the shorter of two runs, whose difference is decode steps alone


def start(asked: dict):
    """The engine for a folder, with CUDA graphs for the batches that are timed."""
    import sglang

    batches = sorted({batch for batch, _ in asked["points"]})
    longest = max(context for _, context in asked["points"]) + asked["steps"] + 64
    tokens = max(batch * (context + asked["steps"] + 128) for batch, context in asked["points"])
    backend = {"attention_backend": asked["backend"]} if asked["backend"] and "-plugin" not in asked["folder"] else {}
    return sglang.Engine(
        model_path=asked["folder"], dtype="bfloat16", load_format="dummy", skip_tokenizer_init=True, context_length=longest,
        max_running_requests=max(batches), max_total_tokens=-(-tokens // 64) * 64, chunked_prefill_size=CHUNK, random_seed=0,
        kv_cache_dtype=asked["cache"], cuda_graph_bs_decode=batches, cuda_graph_backend_prefill="disabled",
        log_level=asked.get("log", "warning"), **backend, **asked.get("options", {}),
    )  # fmt: skip


def generate(engine, prompts: list[list[int]], tokens: int) -> float:
    """Seconds of an answer of so many tokens to every prompt."""
    sampling = {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True}
    begin = time.perf_counter()
    answers = engine.generate(input_ids=prompts, sampling_params=sampling)
    seconds = time.perf_counter() - begin
    if any(len(answer["output_ids"]) != tokens for answer in answers):
        raise RuntimeError(f"SGLang made fewer than {tokens} tokens")
    return seconds


def time_point(engine, vocabulary: int, batch: int, context: int, steps: int, salt: int) -> dict:
    """Seconds of a prompt, and of a decode step with every sequence in its decode.

    The first prompt is timed alone. Then all prompts lie in the prefix cache, and two runs over them differ by `steps` steps.
    """
    draw = random.Random(salt)
    prompts = [[draw.randrange(3, vocabulary) for _ in range(context)] for _ in range(batch)]
    prompt = generate(engine, prompts[:1], 1)
    generate(engine, prompts, SHORT)
    times = [[generate(engine, prompts, tokens) for tokens in (SHORT, SHORT + steps)] for _ in range(3)]
    short, long = (min(column) for column in zip(*times, strict=True))
    seconds = long - short
    return {"batch": batch, "context": context, "prompt_tokens_s": context / prompt,
            "decode_tokens_s": batch * steps / seconds, "step_ms": 1e3 * seconds / steps, "whole": True,
            "kernels": []}  # fmt: skip


def main() -> None:
    """Time the points of the JSON argument."""
    asked = json.loads(sys.argv[1])
    begin = time.perf_counter()
    engine = start(asked)
    try:
        sys.path.insert(0, asked["root"])
        from mla_convert.publish.engines.ask_engine import sglang_setting

        info = engine.get_server_info()
        head = sglang_setting(info) | {"start_s": time.perf_counter() - begin}
        head["cache_tokens"] = info["max_total_num_tokens"]
        print("HEAD", json.dumps(head), flush=True)
        vocabulary = json.loads(Path(asked["folder"], "config.json").read_text())["vocab_size"]
        generate(engine, [[3] * min(context for _, context in asked["points"])], SHORT)  # warms up
        for salt, (batch, context) in enumerate(asked["points"]):
            if batch * (context + asked["steps"]) > head["cache_tokens"]:
                print("SKIP", batch, context, flush=True)
                continue
            engine.flush_cache()
            point = time_point(engine, vocabulary, batch, context, asked["steps"], salt)
            print("POINT", json.dumps(point), flush=True)
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main()
