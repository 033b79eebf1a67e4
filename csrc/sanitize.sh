#!/bin/sh
# Build the extension with AddressSanitizer and UndefinedBehaviorSanitizer in a scratch folder, and
# run the bandit's tests on it. Needs g++ and the packages of the dev extra: PYTHON=... sh sanitize.sh
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

(cd "$root" && tar cf - --exclude='*.so' --exclude=__pycache__ \
    csrc kernels optima_fast tests setup.py pyproject.toml README.md LICENSE) | tar xf - -C "$scratch"
cd "$scratch"

checks=address,undefined,float-cast-overflow,float-divide-by-zero
flags="-fsanitize=$checks -fno-sanitize-recover=all -fno-wrapv -fno-omit-frame-pointer -g"
# setuptools takes CXXFLAGS for C++ since 75, CFLAGS before
OPTIMA_FAST_EXT=1 CC=g++ CXX=g++ CFLAGS="$flags" CXXFLAGS="$flags" LDFLAGS="$flags" \
    "$python" setup.py -q build_ext --inplace

nm -D optima_fast/_bandit.*.so | grep -q __asan  # a compiler that took no flags finds nothing
nm -D optima_fast/_bandit.*.so | grep -q __ubsan

preload=
for library in libasan.so libubsan.so libstdc++.so; do
    preload="$preload $(g++ -print-file-name=$library)"
done
# Python keeps memory at exit: leaks are not reported
# an abort loses what pytest has captured, so it captures only what Python writes
export LD_PRELOAD="${preload# }" ASAN_OPTIONS=detect_leaks=0 PYTHONPATH="$scratch"
"$python" -c "import sys
from optima_fast import _bandit, bandit
sys.exit(bandit.BACKEND != 'c++' or '$scratch' not in _bandit.__file__)"
"$python" -m pytest -q --capture=sys -p no:cacheprovider tests/bandit
