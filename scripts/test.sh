#!/usr/bin/env bash
# Makes .venv, installs the package and what its tests need, and runs them; arguments go to pytest.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
use_venv test
exec "$UBN_VENV/bin/python" -m pytest "$@"
