#!/bin/sh
# make_venv.sh PYTHON DIRECTORY: a virtual environment, also where Debian left out python3-venv.
set -eu
python=$1 directory=$2
"$python" -m venv "$directory" >/dev/null 2>&1 && exit 0
rm -rf "$directory"
if [ "$(uname)" = Linux ] && command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" = 0 ]; then
    apt-get update -qq >/dev/null 2>&1 || true
    apt-get install -y -qq python3-venv >/dev/null 2>&1 || true
    "$python" -m venv "$directory" && exit 0
fi
echo "mlx-pare: $python cannot make a virtual environment: install python3-venv (Debian, Ubuntu) or another Python" >&2
exit 1
