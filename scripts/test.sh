#!/usr/bin/env bash
# Creates .venv, installs the package with its test dependencies, and runs the tests. Arguments are passed to pytest.
# With `-m interop`, installs other libraries (transformers, Lightning, ...) and runs the tests with them.
#
#   UBN_TEST_PROCESSES  number of test processes (default: 2, about 2 GB of memory each)
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
case " $* " in
*" -m interop "*) use_venv interop ;;
*) use_venv test ;;
esac
# Worksteal mostly keeps the tests of a file in one process, so shared fixtures are created only once.
exec "$UBN_VENV/bin/python" -m pytest --numprocesses "${UBN_TEST_PROCESSES:-2}" --dist worksteal "$@"
