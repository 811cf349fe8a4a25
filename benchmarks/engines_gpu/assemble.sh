#!/usr/bin/env bash
# On the GPU machine, beside the parts that prepare.sh wrote: `assemble.sh SITE` unpacks them; then PYTHONPATH=SITE.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
site=$1
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
mkdir -p "$site"
cat "$here"/site.tar.zst.? > "$work/site.tar.zst"
echo "$(cat "$here/site.sha256")  $work/site.tar.zst" | sha256sum -c --quiet -
python3 -m zipfile -e "$here"/zstandard-*.whl "$work"
PYTHONPATH=$work python3 - "$work/site.tar.zst" "$site" <<'P'
import sys
import tarfile

import zstandard

with open(sys.argv[1], "rb") as file, zstandard.ZstdDecompressor(max_window_size=1 << 31).stream_reader(file) as stream:
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        tar.extractall(sys.argv[2], filter="fully_trusted")
P
for engine in vllm sglang; do [ ! -d "$site/$engine" ] || python3 -m compileall -q -j 0 "$site/$engine" || true; done
