#!/usr/bin/env bash
# Makes .venv, installs the package and what its tests need, and runs them; arguments go to pytest.
# With `-m interop` these are the tests beside other libraries (transformers, Lightning, ...), which it installs first.
#
#   UBN_TEST_PROCESSES  how many processes share the tests, by default 2 (about 2 GB of memory each)
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
case " $* " in
*" -m interop "*) use_venv interop ;;
*) use_venv test ;;
esac
# Tests of one file mostly stay in one process, which makes what they share only once.
exec "$UBN_VENV/bin/python" -m pytest --numprocesses "${UBN_TEST_PROCESSES:-2}" --dist worksteal "$@"
