"""The tiny Llama that tests/data/converted-0.1.0 was converted from.

The folder was made once, by version 0.1.0 (commit d55b0cf) with transformers 5.17.0 and torch 2.13.0:

    python tests/data/source_model.py source
    mla-convert source --rank 12 --rope-dim 8 --planes table --calib text.txt --eval text.txt --calib-samples 8 --calib-length 48 \
        --eval-windows 2 --eval-length 48 --refine-steps 4 --uniform --out converted-0.1.0
"""

import gzip
import sys
from importlib import resources
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def save(folder: Path) -> Path:
    """Write the checkpoint, and text.txt beside its folder; returns the folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        initializer_range=0.3, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    packed = resources.files("mla_demo") / "evaluation.txt.gz"
    (folder.parent / "text.txt").write_text(gzip.decompress(packed.read_bytes()).decode("utf-8")[:20000])
    return folder


if __name__ == "__main__":
    save(Path(sys.argv[1]))
