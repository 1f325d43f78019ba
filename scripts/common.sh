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
	# Images for containers often set it. Tests start hundreds of Pythons, and each
	# would compile kvxfer anew, and each process of pytest all the tests.
	unset PYTHONDONTWRITEBYTECODE
}

# pyverbs_tests DIRECTORY: put rdma-core's tests there, as Debian ships them. They are
# documentation in the package python3-pyverbs; images for containers leave that out
# when they install it, so take them from the package itself then.
pyverbs_tests() {
	if [ -f "$1/run_tests.py" ]; then return; fi
	shipped=/usr/share/doc/rdma-core/tests
	if [ ! -d "$shipped" ]; then
		say 'fetching the package python3-pyverbs for the tests in it'
		rm -rf "$1.package"
		mkdir -p "$1.package"
		(
			cd "$1.package"
			apt-get -q download python3-pyverbs || {
				apt-get -q update &&
					apt-get -q download python3-pyverbs
			}
			dpkg -x python3-pyverbs_*.deb .
		) >"$CACHE/apt.log" 2>&1 </dev/null ||
			die "could not fetch it (see $CACHE/apt.log)"
		shipped=$1.package$shipped
	fi
	rm -rf "$1.part"
	mkdir -p "$(dirname "$1")"
	cp -rL "$shipped" "$1.part"
	gunzip -q "$1.part"/*.gz
	mv "$1.part" "$1"
}
