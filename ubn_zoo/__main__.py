"""``python -m ubn_zoo`` is ``ubn-zoo``."""

import sys

from ubn_zoo.cli import main

if __name__ == "__main__":
    sys.argv[0] = "ubn-zoo"  # runs record the command that started them
    sys.exit(main())
