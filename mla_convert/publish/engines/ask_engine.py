"""Ask a serving engine for log-probabilities and greedy tokens: `python ask_engine.py ENGINE MODEL QUESTIONS ANSWERS`.

The program runs in the engine's environment, which may lack mla_convert: it imports only the engine and the standard library.
QUESTIONS and ANSWERS are JSON files, which `serve_check` writes and reads.
"""

import json
import math
import os
import subprocess
import sys
import time
import urllib.request


def ask_transformers(model, asked):
    """Ask transformers' AutoModelForCausalLM, with one forward pass per prompt."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, asked["dtype"])
    net = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, trust_remote_code=asked["trust_remote_code"]).eval()
    net.generation_config.eos_token_id = None  # do not stop at an end-of-sequence token
    found = []
    with torch.no_grad():
        for ids in asked["prompts"]:
            logp = net(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
            top = logp.topk(asked["top"])
            entries = [dict(zip(i.tolist(), v.tolist(), strict=True)) for v, i in zip(*top, strict=True)]
            for entry, line, token in zip(entries, logp, ids[1:], strict=True):
                # The prompt's own next token is compared as well, whether or not it is among the likeliest.
                entry[token] = float(line[token])
            tokens = net.generate(torch.tensor([ids]), max_new_tokens=asked["tokens"], do_sample=False, pad_token_id=0)
            found.append({"logprobs": entries, "greedy": tokens[0, len(ids) :].tolist()})
    return {"version": transformers.__version__, "path": type(net).__name__, "prompts": found}


def ask_vllm(model, asked):
    """Ask vllm.LLM, all prompts in one batch; with prefix caching a second time, so that the answers start from the cache."""
    # The engine must live in this process: `vllm_setting` reads its configuration.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    import vllm
    from vllm.platforms import current_platform

    options = {"model_impl": asked["model_impl"]} if asked["model_impl"] else {}
    with open(os.path.join(model, "config.json"), encoding="utf-8") as file:
        converted = json.load(file)["model_type"].startswith("mla_")
    if current_platform.is_cpu() and not converted:
        # vLLM's own MLA for CPUs neither reads prompts in chunks nor starts from cached prefixes
        asked = asked | {"chunk": 0, "prefix_caching": False}
    if current_platform.is_cpu():
        # vLLM 0.32's rotary kernel for CPUs misreads the queries of MLA, also those of DeepSeek's checkpoints
        options["compilation_config"] = {"custom_ops": ["none"]}
    elif asked.get("compilation"):
        options["compilation_config"] = asked["compilation"]
    if asked.get("memory"):
        options["gpu_memory_utilization"] = asked["memory"]
    if asked.get("cache_bytes"):
        options["kv_cache_memory_bytes"] = asked["cache_bytes"]
    if asked.get("chunk"):
        # A step of vLLM has room for a token of every sequence at least.
        tokens = max(asked["chunk"], len(asked["prompts"]))
        options |= {"enable_chunked_prefill": True, "max_num_batched_tokens": tokens}
    longest = max(map(len, asked["prompts"])) + asked["tokens"] + 1
    prefixes = asked.get("prefix_caching", False)
    engine = vllm.LLM(model=model, dtype=asked["dtype"], trust_remote_code=asked["trust_remote_code"],
                      enforce_eager=asked.get("eager", True) or current_platform.is_cpu(), skip_tokenizer_init=True,
                      max_model_len=longest, max_num_seqs=len(asked["prompts"]), seed=0, max_logprobs=asked["top"],
                      enable_prefix_caching=prefixes, **options)  # fmt: skip
    common = {"temperature": 0.0, "max_tokens": asked["tokens"], "ignore_eos": True, "detokenize": False}
    prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
    sampling = vllm.SamplingParams(**common, prompt_logprobs=asked["top"])
    answers = engine.generate(prompts, sampling, use_tqdm=False)
    # Without log-probabilities of the prompt, for which vLLM computes every position and reads no cached prefix.
    again = engine.generate(prompts, vllm.SamplingParams(**common), use_tqdm=False) if prefixes else answers
    found = []
    for answer, second in zip(answers, again, strict=True):
        lines = [{token: entry.logprob for token, entry in line.items()} for line in answer.prompt_logprobs[1:]]
        greedy = list(answer.outputs[0].token_ids)
        cached = list(second.outputs[0].token_ids) if prefixes else greedy
        found.append({"logprobs": lines, "greedy": greedy, "greedy_from_cache": cached,
                      "cached_tokens": second.num_cached_tokens or 0})  # fmt: skip
    arch = engine.llm_engine.model_config.architecture
    return {"version": vllm.__version__, "path": arch, "prompts": found, "setting": vllm_setting(engine, asked)}


def vllm_setting(engine, asked):
    """The configuration that an engine in this process answered with: what it chose, not what was asked for."""
    config = engine.llm_engine.vllm_config
    known = config.compilation_config.static_forward_context.values()
    layers = [layer for layer in known if hasattr(layer, "get_attn_backend")]
    caches = [layer.kv_cache for layer in layers if getattr(layer.kv_cache, "ndim", 1) > 1]
    graphs = str(config.compilation_config.cudagraph_mode).rpartition(".")[2]
    return {
        "backend": ", ".join(sorted({layer.get_attn_backend().get_name() for layer in layers})),
        "cache_dtype": ", ".join(sorted({str(cache.dtype).removeprefix("torch.") for cache in caches})),
        "cache_widths": sorted({int(cache.shape[-1]) for cache in caches}),
        "prefix_caching": bool(config.cache_config.enable_prefix_caching),
        "chunk": config.scheduler_config.max_num_batched_tokens if asked.get("chunk") else 0,
        "graphs": "none" if graphs == "NONE" else graphs,
    }


def ask_sglang(model, asked):
    """Ask sglang.Engine, all prompts in one batch; with a prefix cache a second time, so that the answers start from it."""
    import torch

    if torch.cuda.is_available() and asked["dtype"] == "float32":
        raise SystemExit("SGLang's norms on a GPU take 16-bit numbers alone: give --dtype bfloat16")
    if not torch.cuda.is_available():
        os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
        # SGLang hands out pages of its cache by a Triton kernel, on a CPU too
        os.environ.setdefault("TRITON_INTERPRET", "1")
    import sglang

    engine = sglang.Engine(**sglang_options(model, asked, torch.cuda.is_available()))
    prompts, prefixes = asked["prompts"], asked.get("prefix_caching", False)
    sampling = {"temperature": 0.0, "max_new_tokens": asked["tokens"], "ignore_eos": True}
    try:
        answers = engine.generate(input_ids=prompts, sampling_params=sampling, return_logprob=True, logprob_start_len=0,
                                  top_logprobs_num=asked["top"])  # fmt: skip
        # Without log-probabilities of the prompt, for which SGLang computes every position and reads no cached prefix.
        again = engine.generate(input_ids=prompts, sampling_params=sampling) if prefixes else answers
        setting = sglang_setting(engine.get_server_info())
    finally:
        engine.shutdown()
    found = []
    for ids, answer, second in zip(prompts, answers, again, strict=True):
        meta, lines = answer["meta_info"], []
        own, best = meta["input_token_logprobs"][1:], meta["input_top_logprobs"][1:]
        for token, (value, *_), likeliest in zip(ids[1:], own, best, strict=True):
            # The prompt's own token by its number: SGLang calls the last of a vocabulary 0.
            lines.append({name: logprob for logprob, name, *_ in likeliest or ()} | {token: value})
        found.append({"logprobs": lines, "greedy": list(answer["output_ids"]),
                      "greedy_from_cache": list(second["output_ids"]),
                      "cached_tokens": second["meta_info"]["cached_tokens"] if prefixes else 0})  # fmt: skip
    return {"version": sglang.__version__, "path": "sglang.Engine", "prompts": found, "setting": setting}


def sglang_options(model, asked, cuda):
    """Options of sglang.Engine: what a check needs, and its own defaults else."""
    with open(os.path.join(model, "config.json"), encoding="utf-8") as file:
        converted = json.load(file)["model_type"].startswith("mla_")
    prompts, prefixes = asked["prompts"], asked.get("prefix_caching", False)
    options = {"model_path": model, "dtype": asked["dtype"], "trust_remote_code": asked["trust_remote_code"],
               "skip_tokenizer_init": True, "log_level": "error", "random_seed": 0, "disable_radix_cache": not prefixes,
               "max_running_requests": len(prompts),
               # SGLang makes no token in the last places of a context.
               "context_length": max(map(len, prompts)) + asked["tokens"] + 8}  # fmt: skip
    if asked.get("eager", True) or not cuda:
        options["disable_cuda_graph"] = True
    if asked.get("chunk"):
        # A chunk is whole pages of the cache. The plugin's have 64 tokens, and its kernels read those of 16, too.
        options["chunked_prefill_size"] = asked["chunk"]
        if converted:
            options |= {"page_size": 16, "chunked_prefill_size": -(-asked["chunk"] // 16) * 16}
    if not cuda:
        # what a check of tiny models needs: SGLang takes most of the machine's memory
        options |= {"device": "cpu", "max_total_tokens": 65536}
        if not converted:
            # SGLang's other backends for CPUs have no MLA, or need AMX; its Triton kernels are interpreted
            options["attention_backend"] = "triton"
    if asked.get("backend") and not converted:
        options["attention_backend"] = asked["backend"]
    if asked.get("memory"):
        options["mem_fraction_static"] = asked["memory"]
    return options | asked.get("options", {})


def sglang_setting(info):
    """The configuration that an engine answered with, from `get_server_info`: what it chose, not what was asked for."""
    graphs = info["cuda_graph_config"]["decode"]["backend"] if info["device"] != "cpu" else "disabled"
    dtype = info["dtype"] if info["kv_cache_dtype"] == "auto" else info["kv_cache_dtype"]
    prefill, decode = (info[f"{phase}_attention_backend"] for phase in ("prefill", "decode"))
    both = {prefill or info["attention_backend"], decode or info["attention_backend"]}
    return {
        "backend": ", ".join(sorted(both)),
        "cache_dtype": dtype,
        "cache_widths": [],
        "prefix_caching": not info["disable_radix_cache"],
        "chunk": info["chunked_prefill_size"],
        "graphs": "none" if graphs == "disabled" else graphs,
    }


def ask_llama_cpp(model, asked):
    """Ask llama-server for the most likely next tokens after each prefix of each prompt."""
    port = asked["port"]
    longest = max(map(len, asked["prompts"])) + asked["tokens"] + 8
    command = [asked["server"], "-m", model, "--port", str(port), "-c", str(longest), "-np", "1", "--no-warmup"]
    with open(asked["log"], "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait(port, server)
        found = [_ask_server(port, ids, asked) for ids in asked["prompts"]]
    finally:
        server.terminate()
        server.wait()
    version = subprocess.run([asked["server"], "--version"], capture_output=True, text=True)
    named = [line for line in (version.stdout + version.stderr).splitlines() if line.startswith("version")]
    return {"version": (named or ["unknown"])[0].removeprefix("version: "), "path": "llama-server", "prompts": found}


def _wait(port, server, seconds=600):
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if server.poll() is not None:
            raise SystemExit(f"llama-server ended with code {server.returncode} before it could be asked")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.3)
    raise SystemExit(f"llama-server did not answer within {seconds} s")


def _post(port, content):
    body = json.dumps(content).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/completion", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)


def _ask_server(port, ids, asked):
    common = {"temperature": 0.0, "cache_prompt": True, "n_probs": asked["top"], "post_sampling_probs": False,
              "return_tokens": True, "ignore_eos": False}  # fmt: skip
    lines = []
    # llama-server gives probabilities of generated tokens alone, so that each prefix is a prompt of its own; its cache
    # keeps what two of them share.
    for end in range(1, len(ids)):
        answer = _post(port, {**common, "prompt": ids[:end], "n_predict": 1})
        best = answer["completion_probabilities"][0]["top_logprobs"]
        lines.append({entry["id"]: entry["logprob"] for entry in best if math.isfinite(entry["logprob"])})
    answer = _post(port, {**common, "prompt": ids, "n_predict": asked["tokens"], "ignore_eos": True, "n_probs": 0})
    return {"logprobs": lines, "greedy": answer["tokens"]}


ENGINES = {"transformers": ask_transformers, "vllm": ask_vllm, "sglang": ask_sglang, "llama.cpp": ask_llama_cpp}


def main():
    """Read the questions, ask the engine, and write the answers."""
    engine, model, questions, answers = sys.argv[1:]
    with open(questions, encoding="utf-8") as file:
        asked = json.load(file)
    found = ENGINES[engine](model, asked)
    with open(answers, "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
