#!/bin/sh
# openblas.sh find: print the path of OpenBLAS on Linux, or nothing.
# openblas.sh install: install it when that needs no questions (Debian or Ubuntu, root); never fails, never on a Mac.
[ "$(uname)" = Linux ] || exit 0
find_it() {
    for pattern in /usr/lib/*/openblas-pthread/libopenblas.so.0 /usr/lib/*/libopenblas.so.0 /usr/lib64/libopenblas.so.0; do
        [ -e "$pattern" ] && echo "$pattern" && return 0
    done
    return 1
}
case "${1:-find}" in
find) find_it || true ;;
install)
    find_it >/dev/null && exit 0
    if command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" = 0 ]; then
        { apt-get update -qq && apt-get install -y -qq libopenblas0-pthread; } >/dev/null 2>&1 || true
    fi
    find_it >/dev/null || echo "note: OpenBLAS was not found; everything works, matrix products are slower" >&2
    ;;
esac
exit 0
