"""Tiny random checkpoints of every family, saved as real folders with a real tokenizer."""

from __future__ import annotations

import gzip
from importlib import resources
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, MistralConfig, PreTrainedTokenizerFast, Qwen2Config

VOCAB = 264
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
# One row a variant: name -> configuration. Tests run over all of them.
CONFIGS = {
    "llama": lambda: LlamaConfig(**COMMON, head_dim=8),
    "llama3-rope": lambda: LlamaConfig(**COMMON, head_dim=8, rope_parameters=LLAMA3_ROPE),
    "llama-yarn": lambda: LlamaConfig(**COMMON, head_dim=8, rope_parameters=YARN_ROPE),
    "llama-bias-wide-heads": lambda: LlamaConfig(**COMMON, head_dim=16, attention_bias=True),
    "llama-mha-tied": lambda: LlamaConfig(
        **{**COMMON, "num_key_value_heads": 6, "tie_word_embeddings": True}, head_dim=16
    ),
    "mistral": lambda: MistralConfig(**COMMON, head_dim=8, sliding_window=None),
    "mistral-window": lambda: MistralConfig(**COMMON, head_dim=8, sliding_window=12),
    "qwen2": lambda: Qwen2Config(**COMMON),
}
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def text(characters: int = 20000) -> str:
    """Real English, from the packaged demo."""
    packed = resources.files("mla_demo") / "evaluation.txt.gz"
    return gzip.decompress(packed.read_bytes()).decode("utf-8")[:characters]


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: it reads any text, and every family's own tokenizer class takes it."""
    vocab = {token: index for index, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def model(name: str) -> torch.nn.Module:
    """A random model with random biases and norms, so that no term is invisible to a test."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    built = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()
    with torch.no_grad():
        for key, parameter in built.named_parameters():
            if key.endswith("bias") or "norm" in key:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return built


def save(name: str, folder: Path, **kwargs) -> Path:
    """Write the variant's checkpoint and a text to calibrate on; returns the checkpoint's folder."""
    model(name).save_pretrained(folder, **kwargs)
    tokenizer().save_pretrained(folder)
    (folder.parent / "text.txt").write_text(text())
    return folder
