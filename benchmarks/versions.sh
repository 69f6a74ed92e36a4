#!/usr/bin/env bash
# Try the library with other versions: benchmarks/versions.sh PYTHON TORCH DIFFUSERS [PYTHON TORCH DIFFUSERS ...]
# One line a combination, for docs/versions.md. A venv for each in $VERSIONS (a few GB where torch
# comes with CUDA; removed afterwards); $TORCH_ARGS: options of pip for torch alone. "-": the newest.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=${VERSIONS:-$(mktemp -d)}
# Loads, quantizes, packs, saves and runs on every engine of a CPU, tiny models alone.
tests=(tests/checkpoint tests/pipeline/test_main_line.py tests/engines/test_backends.py)
pinned() { [ "$2" = - ] && echo "$1" || echo "$1==$2"; }
while [ $# -ge 3 ]; do
  python=$1 torch=$2 diffusers=$3; shift 3
  env=$work/py-$torch-$diffusers log=$work/py-$torch-$diffusers.log
  pip=("$env/bin/python" -m pip install -q)
  if ! "$python" -m venv "$env" >"$log" 2>&1; then result="no such interpreter here"
  elif ! "${pip[@]}" ${TORCH_ARGS:-} "$(pinned torch "$torch")" >>"$log" 2>&1; then result="torch does not install"
  elif ! "${pip[@]}" "$(pinned diffusers "$diffusers")" "$root[openvino,eval,report]" "transformers>=5" \
    "pytest>=8" "hypothesis>=6.100" scipy >>"$log" 2>&1; then result="does not install"
  else
    found=$(cd "$root" && HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$env/bin/python" -m pytest -q -p no:cacheprovider \
      "${tests[@]}" 2>>"$log" | tee -a "$log" | tail -1)
    result=$(sed 's/,* *[0-9]* warnings*//; s/ in .*//' <<<"$found")
  fi
  of() { "$env/bin/python" -c "from importlib.metadata import version; print(version('$1'))" 2>/dev/null || echo -; }
  echo "| $("$env/bin/python" -c 'import platform; print(platform.python_version())' 2>/dev/null || echo "$python") | $(of torch) | $(of diffusers) | $(of transformers) | $(of openvino) | $result |"
  rm -rf "$env"
done
