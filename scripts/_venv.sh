# Sourced by the scripts beside it. Goes to the repository's root and defines
#
#   use_venv EXTRA
#
# which makes the virtual environment and installs this package into it, editable, with that extra of setup.cfg. What is
# there already is used again, as long as setup.cfg, pyproject.toml and this folder have not changed.
#
#   UBN_VENV  the environment's folder, by default .venv
#   PYTHON    the interpreter that makes it, by default python3

cd "$(dirname "${BASH_SOURCE[0]}")/.."
UBN_VENV=${UBN_VENV:-$PWD/.venv}
export UBN_VENV

use_venv() {
    local python=${PYTHON:-python3} extra=$1 mark state
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "needs Python 3.10 or newer, found: $("$python" --version 2>&1); set PYTHON to a newer one" >&2
        return 1
    fi
    if ! "$UBN_VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        echo "making the virtual environment $UBN_VENV"
        "$python" -m venv "$UBN_VENV"
    fi
    mark=$UBN_VENV/.installed-$extra
    state=$(pwd && cat setup.cfg pyproject.toml | cksum)
    if [ ! -f "$mark" ] || [ "$(cat "$mark")" != "$state" ]; then
        echo "installing ubn-zoo[$extra]; the first time takes minutes and, with torch's CUDA packages, several GB"
        # In one call, so that pip chooses a torch and a torchvision that fit each other.
        "$UBN_VENV/bin/python" -m pip install --disable-pip-version-check --editable ".[$extra]"
        printf '%s\n' "$state" >"$mark"
    fi
}
