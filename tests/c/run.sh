#!/bin/sh
# Build and run the C tests of the software device under the sanitizers.
#
# Usage: tests/c/run.sh [directory for the programs]
# Takes about three minutes on two cores. CC chooses the compiler, ROUNDS the
# length of the parser's fuzzing.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
device=$here/../../kvxfer/softdev
include=${KVXFER_VERBS_INCLUDE:+-I$KVXFER_VERBS_INCLUDE}
out=${1:-$(mktemp -d)}
[ $# -gt 0 ] || trap 'rm -rf "$out"' EXIT
mkdir -p "$out"

tests="basic binds copier cq datagrams errors faults shm strict stress windows"

# build NAME SANITIZERS SOURCE...: the program of one test
build() {
	name=$1 sanitizers=$2
	shift 2
	rm -f "$out/$name" # one that is not built must not be run
	# shellcheck disable=SC2086
	"${CC:-cc}" -std=gnu11 -g -O1 -Wall -Wextra -Werror -pthread $include \
		-fno-omit-frame-pointer "-fsanitize=$sanitizers" \
		"$@" -o "$out/$name"
}

# library DIRECTORY SANITIZERS: the device and the harness, compiled once
library() {
	mkdir -p "$out/$1"
	for source in "$device"/*.c "$here/harness.c" "$here/binding.c"; do
		# shellcheck disable=SC2086
		"${CC:-cc}" -std=gnu11 -g -O1 -Wall -Wextra -Werror -pthread \
			$include -fno-omit-frame-pointer "-fsanitize=$2" -c \
			"$source" -o "$out/$1/$(basename "$source" .c).o"
	done
}

library asan address,undefined &
library tsan thread &
wait
for test in $tests process; do
	build "$test" address,undefined "$here/test_$test.c" "$out"/asan/*.o &
done
build fuzz address,undefined "$here/fuzz_frame.c" "$out/asan/frame.o" &
# Not process: its children would be what races, and TSan by its default ends
# a child that was forked while there were threads.
for test in $tests; do
	build "race_$test" thread "$here/test_$test.c" "$out"/tsan/*.o &
done
wait

export ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=halt_on_error=1
export TSAN_OPTIONS=halt_on_error=1
"$out/fuzz" "${ROUNDS:-200000}"
for wire in tcp cma shm; do
	echo "wire $wire:"
	for test in $tests process; do
		KVXFER_SOFT_WIRE=$wire timeout 120 "$out/$test"
	done
	for test in $tests; do
		KVXFER_SOFT_WIRE=$wire timeout 120 "$out/race_$test"
	done
done
