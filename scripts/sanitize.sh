#!/bin/sh
# Builds the allocator's C++ and its stress test under AddressSanitizer + UBSan and under ThreadSanitizer, and runs both.
# Needs a C++ compiler with the sanitizers' libraries; no Python. Any report or broken invariant ends with status 1.
#   scripts/sanitize.sh [rounds]      (CXX and BUILD choose the compiler and the folder)
set -eu
cd "$(dirname "$0")/.."
cxx=${CXX:-c++}
build=${BUILD:-build/sanitize}
rounds=${1:-3000}
mkdir -p "$build"
sources=$(ls vattention_ext/csrc/*.cpp | grep -v bindings.cpp)
flags="-std=c++17 -O1 -g -fno-omit-frame-pointer -Wall -Wextra -Wshadow -Werror -pthread -Ivattention_ext/csrc"

# shellcheck disable=SC2086  # lists of words are meant
"$cxx" $flags -fsanitize=address,undefined -fno-sanitize-recover=all $sources tests/ext/stress.cpp -o "$build/stress_address"
# shellcheck disable=SC2086
"$cxx" $flags -fsanitize=thread $sources tests/ext/stress.cpp -o "$build/stress_thread"

"$cxx" -std=c++17 -O1 -g -fPIC -shared -pthread tests/ext/fake_cuda/fake_cuda.cpp -o "$build/libcuda_fake.so"
fake=$(cd "$build" && pwd)/libcuda_fake.so

echo "AddressSanitizer + UndefinedBehaviorSanitizer"
ASAN_OPTIONS=detect_leaks=1:halt_on_error=1 "$build/stress_address" "$rounds" "$fake"
echo "ThreadSanitizer"
# Address randomisation of some kernels is wider than older ThreadSanitizers expect; setarch switches it off.
runner=""
if command -v setarch >/dev/null 2>&1 && setarch -R true 2>/dev/null; then runner="setarch -R"; fi
TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1 $runner "$build/stress_thread" "$rounds" "$fake"
echo "sanitize: clean"
