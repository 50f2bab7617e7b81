#!/usr/bin/env python3
"""`ubn-zoo analyze`, from a clone."""

import sys

from ubn_zoo.cli import main

if __name__ == "__main__":
    sys.exit(main(["analyze", *sys.argv[1:]]))
