"""Parts that the plugins of vLLM and SGLang share: a layer's attention on latents, its weights, RoPE tables and kernels."""
