"""``python -m kvxfer.kvbench`` is ``kvxfer kvbench``."""

import sys

from kvxfer.kvbench.cli import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m kvxfer.kvbench"))
