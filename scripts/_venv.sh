# Sourced by the other scripts: makes .venv with the tested versions, once.
# $1: extras of pyproject.toml to install ("" or "test").

cd "$(dirname "${BASH_SOURCE[0]}")/.."

ensure_venv() {
    local extras=$1 python=${PYTHON:-python3} stamp wanted
    "$python" - <<'PY' || exit 2
import sys
if not (3, 10) <= sys.version_info[:2] <= (3, 12):
    sys.exit(f"hiertune needs Python 3.10 to 3.12, and this is {sys.version.split()[0]}: set PYTHON to another")
PY
    wanted=$(cat pyproject.toml constraints.txt | cksum)
    stamp=.venv/.installed-${extras:-run}
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        [ -x .venv/bin/python ] || "$python" -m venv .venv
        echo "installing into .venv (some minutes the first time) ..."
        .venv/bin/python -m pip install --quiet --disable-pip-version-check \
            -c constraints.txt -e ".${extras:+[$extras]}"
        echo "$wanted" >"$stamp"
    fi
}
