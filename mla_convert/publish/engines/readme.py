"""README.md of an exported folder: its content, and the engines and commands that load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mla_convert.core.files import write_file
from mla_convert.source.licence import CARD

HEAD = """\
# {name}

{source}, converted to Multi-head Latent Attention by mla_convert, in the form of a dense DeepSeek-V3 checkpoint, profile
**{profile}**: {cache_numbers} elements cached per token and layer (kv_lora_rank {kv_lora_rank}, qk_rope_head_dim
{qk_rope_head_dim}).
"""
PORTABLE = """
It needs no code of its own, and transformers, vLLM and SGLang read it alike. Do not quantise it: the rows that write the latent
are scaled by 2^-30, which 8-bit formats cannot hold. Export with `--profile engine` for that, and for llama.cpp.

```sh
vllm serve {name}
python -m sglang.launch_server --model-path {name}
```
"""
ENGINE = """
For engines that take their latent norm's epsilon from config.json: vLLM, SGLang and llama.cpp, quantised or not.
**Not for transformers**, whose DeepSeek-V3 has an epsilon of its own and would answer nonsense: config.json names a padding token
outside the vocabulary, so that it stops with `Padding_idx must be within num_embeddings` instead.
"""
CODE = """
It carries `modeling_mla_served.py`, a few lines on top of transformers' own DeepSeek-V3, and needs `trust_remote_code`. Without it
transformers stops with `Padding_idx must be within num_embeddings`, on purpose: its own class would drop what the code adds.

```sh
vllm serve {name} --trust-remote-code
```

```python
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
```
"""
TEXT = {"portable": PORTABLE, "engine": ENGINE, "hf-code": CODE}


def write_readme(folder: Path, source: str, facts: dict[str, Any]) -> None:
    """Write README.md of an exported folder.

    Args:
        folder: to write into.
        source: name of the converted model.
        facts: content of export.json.
    """
    values = {**facts, "source": source, "name": f"{source}-{facts['profile']}"}
    write_file(folder / CARD, (HEAD + TEXT[facts["profile"]]).format(**values))
