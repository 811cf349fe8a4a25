#!/usr/bin/env bash
# Packs vLLM 0.26.0, the newest release for torch 2.11 and CUDA 13, for a GPU machine without network: Python 3.12,
# torch 2.11, transformers >= 5.5.3. `prepare.sh FOLDER` writes FOLDER/1 and FOLDER/2, under 50 MB each; copy the content
# of both to one folder there and run its assemble.sh. Not packed: FlashAttention 2 (3 loads without it), MoE kernels,
# structured output (empty modules stand in), the Rust front end. A machine with network needs `pip install vllm==0.26.*`.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$(mkdir -p "$1" && cd "$1" && pwd)
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"

. "$here/../engines_gpu/pack.sh"
fetch wheels vllm==0.26.0 annotated-types apache-tvm-ffi==0.1.10 astor blake3 cachetools cbor2 compressed-tensors==0.17.0 \
  depyf==0.20.0 diskcache distro fastapi==0.136.3 gguf ijson interegular jiter jsonschema==4.26.0 jsonschema-specifications \
  lark==1.2.2 loguru mistral-common==1.13.1 model-hosting-container-standards msgspec==0.23.0 nvtx==0.2.15 openai==2.54.0 \
  openai-harmony==0.0.8 partial-json-parser prometheus-fastapi-instrumentator pybase64 pycountry pydantic==2.14.4 \
  pydantic-core==2.50.5 pydantic-extra-types python-json-logger pyzmq referencing rpds-py semantic-version setproctitle \
  sniffio starlette==1.10.0 typing-inspection watchfiles
unpack wheels site

cd site
rm -rf -- *.data pycountry/locales vllm/_moe_C_stable_libtorch.abi3.so vllm/_qutlass_C.abi3.so vllm/vllm-rs \
  vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so vllm/third_party/deep_gemm/_C.cpython-31[0134]*.so \
  vllm/third_party/deep_gemm/include vllm/third_party/fmha_sm100/cutlass \
  vllm/entrypoints/serve/instrumentator/static/swagger-ui*
for module in lmformatenforcer llguidance outlines_core xgrammar; do
  mkdir -p "$module"
  printf '%s\n' '"""Stands in for a package that only structured output needs."""' '__version__ = "0.2.1"' '__path__ = []' \
    '' '' 'def __getattr__(name):' '    if name.startswith("__"):' '        raise AttributeError(name)' \
    '    return type(name, (), {})' > "$module/__init__.py"
done
cd ..

pack site "$out" 2
