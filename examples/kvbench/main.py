"""KVBench from a checkout, without installing it: needs PyYAML and no more."""

import os
import sys

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")

try:
    from kvxfer.kvbench.cli import main
except ModuleNotFoundError as missing:
    if missing.name != "kvxfer":
        raise
    sys.path.insert(0, os.path.abspath(ROOT))
    from kvxfer.kvbench.cli import main

if __name__ == "__main__":
    sys.exit(main(prog=os.path.basename(sys.argv[0])))
