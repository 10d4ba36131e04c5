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

# Tests of the ledger on PostgreSQL start a server of their own. As root of a Debian machine it is installed.
ensure_postgresql() {
    command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 && return
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing PostgreSQL for the tests ..."
        # No server of the system's own is wanted.
        mkdir -p /etc/postgresql-common
        [ -e /etc/postgresql-common/createcluster.conf ] ||
            echo "create_main_cluster = false" >/etc/postgresql-common/createcluster.conf
        { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
            postgresql; } >/dev/null || echo "PostgreSQL could not be installed: its tests are skipped" >&2
    else
        echo "PostgreSQL is not installed: its tests are skipped (Debian: apt-get install postgresql)" >&2
    fi
}
