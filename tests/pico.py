"""Tiny random checkpoints of every family, saved as complete folders with a real tokenizer, and their conversion."""

from __future__ import annotations

import contextlib
import gzip
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import gguf
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedTokenizerFast

from mla_convert.source.families import FAMILIES, is_installed

if TYPE_CHECKING:
    from mla_convert.report.report import Report

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
# Every variant of every family that the installed transformers has: name -> model type and settings. Tests run over all.
VARIANTS = {
    name: (family.model_type, settings)
    for family in FAMILIES.values()
    if is_installed(family.model_type)
    for name, settings in family.tested.items()
}
# The first variant of every family.
FIRST = {model_type: name for name, (model_type, _) in reversed(VARIANTS.items())}
# Conversions at half and at a quarter of the cache, without noise: half of the few calibration windows would be noise.
HALF = {"kv_ratio": 0.5, "calib_noise": 0, "calib_samples": 32}
QUARTER = {"kv_ratio": 0.25, "calib_noise": 0, "calib_samples": 32, "refine_steps": 4, "refine_batch": 4}


def config(name: str) -> PreTrainedConfig:
    """The variant's configuration: the common settings and its own."""
    model_type, settings = VARIANTS[name]
    config_class = CONFIG_MAPPING[model_type]
    known = {*config_class.__dataclass_fields__, *config_class.attribute_map}  # a family may lack a common setting
    return config_class(**{key: value for key, value in COMMON.items() if key in known} | settings)


SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def text(characters: int = 20000) -> str:
    """Real English, from the packaged demo."""
    packed = resources.files("mla_demo") / "evaluation.txt.gz"
    return gzip.decompress(packed.read_bytes()).decode("utf-8")[:characters]


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: it encodes any text, and works with every family's tokenizer class."""
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
    built = AutoModelForCausalLM.from_config(config(name), dtype=torch.float32).eval()
    if FAMILIES[VARIANTS[name][0]].softcap:
        built.set_attn_implementation("eager")  # the older of the supported versions of SDPA leave the cap out
    with torch.no_grad():
        for key, parameter in built.named_parameters():
            if key.endswith("bias") or "norm" in key:
                parameter.add_(0.3 * torch.randn_like(parameter))
        for key, buffer in built.named_buffers():
            if key.endswith("layer_scalar"):  # Gemma 4's factor of a layer's output
                buffer.fill_(0.8)
    return built


@torch.no_grad()
def losses(built: torch.nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Token losses (N, L-1) by the model's own forward pass over whole windows."""
    logits = torch.cat([built(ids[None], use_cache=False).logits.float() for ids in windows])
    found = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    return found.view(windows.shape[0], -1)


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32, **kwargs) -> Path:
    """Write the variant's checkpoint and a text to calibrate on; returns the checkpoint's folder."""
    model(name).to(dtype).save_pretrained(folder, **kwargs)
    tokenizer().save_pretrained(folder)
    (folder.parent / "text.txt").write_text(text())
    return folder


def convert(folder: Path, out: Path, **settings: Any) -> Report:
    """Convert the checkpoint in a folder that `save` wrote, with its small text; returns the report."""
    from mla_convert import ConvertConfig, convert
    from mla_convert.core.progress import Progress

    text = str(folder.parent / "text.txt")
    defaults = {
        "calib": text, "eval": text, "calib_samples": 16, "calib_length": 48, "eval_windows": 4, "eval_length": 48,
        "refine_steps": 0, "uniform": True, "device": "cpu", "suite_windows": 0, "out": out,
    }  # fmt: skip
    with mock.patch("os.fsync"):  # a tenth of the time, and no test depends on it
        return convert(ConvertConfig(source=str(folder), **{**defaults, **settings}), Progress(quiet=True))


@contextlib.contextmanager
def suite_tokens_kept() -> Iterator[None]:
    """Tokenise the packaged suite once for each tokenizer: it takes a second, which is most of an evaluation."""
    from mla_convert.evaluate.quality import suite

    tokenise, known = suite.tokenise, {}

    def once(tokenizer: Any, text: str, special: bool) -> list[int]:
        if not hasattr(tokenizer, "backend_tokenizer"):
            return tokenise(tokenizer, text, special)
        key = (tokenizer.backend_tokenizer.to_str(), text, special)
        if key not in known:
            known[key] = tokenise(tokenizer, text, special)
        return known[key]

    with mock.patch.object(suite, "tokenise", once):
        yield


GGUF_NAMES = {
    "model.layers.": "blk.",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    "self_attn.": "attn_",
    "mlp.": "ffn_",
    "_proj": "",
}


def save_gguf(path: Path, add_bos: bool | None = None) -> Path:
    """The llama variant as a GGUF file of F32 tensors in llama.cpp's layout; `add_bos` is its `add_bos_token`."""
    built, vocab = model("llama"), tokenizer().get_vocab()
    config = built.config
    tokens = [*sorted(vocab, key=vocab.get), "Ġt", "Ġa"]  # transformers 5.17 misreads a single merge
    tokens += [f"<extra {index}>" for index in range(VOCAB - len(tokens))]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_merges(["Ġ t", "Ġ a"])
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    for add, token in ((writer.add_bos_token_id, "<s>"), (writer.add_eos_token_id, "</s>"),
                       (writer.add_pad_token_id, "<pad>"), (writer.add_unk_token_id, "<unk>")):  # fmt: skip
        add(vocab[token])
    for name, tensor in built.state_dict().items():
        if "q_proj" in name or "k_proj" in name:  # llama.cpp interleaves the halves of a rotary head
            tensor = tensor.view(-1, 2, config.head_dim // 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        for in_transformers, in_gguf in GGUF_NAMES.items():
            name = name.replace(in_transformers, in_gguf)
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
