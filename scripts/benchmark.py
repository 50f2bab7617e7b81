#!/usr/bin/env python3
"""`ubn-zoo benchmark`, from a clone."""

import sys

from ubn_zoo.cli import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
