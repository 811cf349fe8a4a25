"""Llama and everything that shares its architecture."""

from mla_convert.families.base import Family

FAMILY = Family(
    model_type="llama",
    examples="Llama 1 to 3.3, SmolLM, SmolLM2, TinyLlama, DeepSeek-LLM, Yi",
    special="every RoPE scaling; optional biases",
)
