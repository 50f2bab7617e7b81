#!/usr/bin/env python3
"""`ubn-zoo validate`, from a clone."""

import sys

from ubn_zoo.cli import main

if __name__ == "__main__":
    sys.exit(main(["validate", *sys.argv[1:]]))
