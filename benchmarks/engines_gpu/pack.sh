# Functions of prepare.sh in vllm_gpu and sglang_gpu, which pack an engine for a GPU machine without network: Python 3.12, Linux.

# fetch FOLDER REQUIREMENT...: wheels without their dependencies.
fetch() {
  local glibc platforms=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
  for glibc in 5 17 24 26 27 28 31 34 35; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
  python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
    -d "$1" "${@:2}"
}

# unpack WHEELS SITE
unpack() {
  local wheel
  mkdir -p "$2"
  for wheel in "$1"/*.whl; do python3 -m zipfile -e "$wheel" "$2"; done
}

# pack SITE OUT PIECES: write OUT/1 to OUT/PIECES, each of at most 49 MB; the last one also has assemble.sh and what it needs.
pack() {
  local site=$1 out=$2 pieces=$3 piece count
  fetch zstd zstandard==0.25.0
  python3 -m pip install -q --target packer zstandard==0.25.0
  PYTHONPATH=packer python3 - "$site" <<'P'
import sys
import tarfile

import zstandard

settings = zstandard.ZstdCompressionParameters.from_level(15, window_log=27, enable_ldm=True)
packer = zstandard.ZstdCompressor(compression_params=settings)
with open("site.tar.zst", "wb") as file, packer.stream_writer(file) as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
    tar.add(sys.argv[1], arcname=".")
P
  split -b 49000000 -d -a 1 site.tar.zst site.tar.zst.
  count=$(ls site.tar.zst.? | wc -l)
  [ "$count" -le "$pieces" ] || { echo "packed in $count pieces of 49 MB, and $pieces are expected" >&2; exit 1; }
  for piece in $(seq "$pieces"); do
    rm -rf "${out:?}/$piece"; mkdir "$out/$piece"
    mv "site.tar.zst.$((piece - 1))" "$out/$piece/"
  done
  sha256sum site.tar.zst | cut -d' ' -f1 > "$out/$pieces/site.sha256"
  cp zstd/*.whl "$(dirname "${BASH_SOURCE[0]}")/assemble.sh" "$out/$pieces/"
  du -sm "$out"/?
}
