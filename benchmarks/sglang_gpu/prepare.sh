#!/usr/bin/env bash
# Packs SGLang 0.5.17, the newest release for torch 2.11 and CUDA 13, for a Hopper machine without network: Python 3.12,
# torch 2.11, transformers 5.17, nvcc (SGLang compiles small kernels). `prepare.sh FOLDER` writes FOLDER/1, under 50 MB; copy its
# content to a folder there and run its assemble.sh. Not packed: FlashAttention 3 (1.1 GB, so the backend is Triton's), FlashMLA,
# FlashInfer, diffusion, structured output, speech and quantisation (stand-ins in their place). A machine with network needs
# `pip install sglang==0.5.17`.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$(mkdir -p "$1" && cd "$1" && pwd)
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"

. "$here/../engines_gpu/pack.sh"
fetch wheels sglang==0.5.17 sglang-kernel==0.4.5 annotated-types apache-tvm-ffi==0.1.11 compressed-tensors==0.17.0 \
  dill distro fastapi==0.136.3 gguf jiter jsonschema==4.26.0 jsonschema-specifications loguru msgspec==0.23.0 \
  openai==2.6.1 orjson partial-json-parser pybase64 pydantic==2.14.4 pydantic-core==2.50.5 python-multipart pyzmq \
  referencing rpds-py setproctitle sniffio starlette==1.10.0 typing-inspection uvicorn watchfiles zstandard==0.25.0
unpack wheels site
cd site
rm -rf -- *.data sglang/multimodal_gen sglang/test sglang/srt/grpc/_core* sglang/srt/multimodal/_core* sglang/srt/server/_core* \
  sgl_kernel/flash_ops* sgl_kernel/infllm_ops* sgl_kernel/flashmla_ops* sgl_kernel/sm100 zstandard/*.c
# Its import is not guarded everywhere, so that there is a stand-in, which must not be used.
sed -i 's/"SGLANG_IS_FLASHINFER_AVAILABLE", default="true"/"SGLANG_IS_FLASHINFER_AVAILABLE", default="false"/' \
  sglang/srt/utils/common.py
# Its norms would take the stand-in's.
grep -q "^    import flashinfer.norm" sgl_kernel/elementwise.py
sed -i 's/^    import flashinfer.norm as _flashinfer_norm/    raise ImportError/' sgl_kernel/elementwise.py
cd ..
python3 "$here/stand_ins.py" site IPython flashinfer interegular llguidance mistral_common openai_harmony outlines soundfile \
  torchao xgrammar
pack site "$out" 1
