"""``python -m ubn_zoo`` is ``ubn-zoo``."""

import sys

from ubn_zoo.cli import main

sys.exit(main())
