# Sourced by the other scripts: where things are, how they speak, how they stop.
# Plain POSIX shell. The caller has done `set -eu` and set ROOT.
# shellcheck shell=sh

CACHE=$ROOT/.cache
VENV=$ROOT/.venv

# Tracing in CI only: a person wants to read what is done, not how.
if [ "${CI:-}" = true ] && [ "${KVXFER_TRACE:-}" = 1 ]; then set -x; fi

say() {
	printf 'kvxfer: %s\n' "$*"
}

die() {
	printf 'kvxfer: %s\n' "$*" >&2
	exit 1
}

# need EXTRA...: make .venv hold kvxfer and these extras, then use it.
need() {
	"$ROOT/scripts/setup" "$@" || exit 1
	# Where the verbs headers are, if they had to be unpacked privately.
	if [ -f "$CACHE/env.sh" ]; then . "$CACHE/env.sh"; fi
	PATH=$VENV/bin:$PATH
	export PATH
}
