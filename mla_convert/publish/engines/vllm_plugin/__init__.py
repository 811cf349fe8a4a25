"""vLLM's plugin: `vllm serve` of a converted folder, with its own sizes in each layer and the kernels of mla_attention.

`entry` is the only module that runs without vLLM; vLLM calls it in each of its processes.
"""
