# Sourced by the scripts beside it. Goes to the repository's root and defines
#
#   use_venv EXTRA
# which creates the virtual environment and installs this package into it, editable, with that extra of setup.cfg. An
# existing installation is reused unless setup.cfg, pyproject.toml or the repository's path has changed.
#
#   UBN_VENV  folder of the environment (default: .venv)
#   PYTHON    interpreter that creates it (default: python3)
#   UBN_WITH  further requirements for pip, such as "torch==2.11.*"

cd "$(dirname "${BASH_SOURCE[0]}")/.."
UBN_VENV=${UBN_VENV:-$PWD/.venv}
export UBN_VENV

use_venv() {
    local python=${PYTHON:-python3} extra=$1 with mark state
    read -ra with <<<"${UBN_WITH:-}"
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "Python 3.10 or newer is required, found: $("$python" --version 2>&1); set PYTHON to a newer one" >&2
        return 1
    fi
    if ! "$UBN_VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        echo "creating the virtual environment $UBN_VENV"
        "$python" -m venv "$UBN_VENV"
    fi
    mark=$UBN_VENV/.installed-$extra
    state=$(pwd && echo "${UBN_WITH:-}" && cat setup.cfg pyproject.toml | cksum)
    if [ ! -f "$mark" ] || [ "$(cat "$mark")" != "$state" ]; then
        echo "installing ubn-zoo[$extra]; the first time takes minutes and, with torch's CUDA packages, several GB"
        # Install in one call, so that pip chooses compatible versions of torch and torchvision.
        "$UBN_VENV/bin/python" -m pip install --disable-pip-version-check --editable ".[$extra]" ${with[@]+"${with[@]}"}
        printf '%s\n' "$state" >"$mark"
    fi
}
