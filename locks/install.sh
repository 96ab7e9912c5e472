#!/bin/sh
# Make a virtual environment that holds exactly what a lock names.
#
#     locks/install.sh VENV PLATFORM [PYTHON]
#
# PLATFORM is cpu or cuda (locks/PLATFORM.txt). An environment at VENV is replaced. pip's own output goes to VENV/install.log.
set -eu

venv=$1
platform=$2
python=${3:-}
lock=$(dirname "$0")/$platform.txt
log=$venv/install.log
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PYTHONUNBUFFERED=1

refuse() {
    printf 'error: %s\n' "$@" >&2
    exit 1
}

supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

[ -f "$lock" ] || refuse "PLATFORM=$platform: no such lock; choose cpu or cuda."
[ "$(uname -sm)" = "Linux x86_64" ] || refuse "the locks are for Linux x86_64, this is $(uname -sm)." \
    "With an environment of your own: pip install -e '.[cpu]' (no vLLM; set engine.kind: transformers)."
if [ -z "$python" ]; then
    for python in python3.11 python3.12 python3.13 python3 python ''; do
        [ -z "$python" ] || ! supported "$python" || break
    done
    [ -n "$python" ] || refuse "no Python 3.11, 3.12 or 3.13 found; name one: make PYTHON=/path/to/python3.11"
fi
command -v "$python" >/dev/null 2>&1 || refuse "PYTHON=$python: there is no such Python here."
"$python" -c '' 2>/dev/null || refuse "PYTHON=$python does not start: $("$python" -c '' 2>&1 | head -n 1)"
supported "$python" || refuse "PYTHON=$python: the locks are for Python 3.11, 3.12 and 3.13."
[ "$platform" != cpu ] || "$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || refuse \
    "vLLM on a CPU needs the system library libnuma.so.1, which this machine lacks." \
    "Install it (Debian, Ubuntu: apt-get install libnuma1; Fedora: dnf install numactl-libs) and run the command again."

if [ -d "$venv" ]; then # what runs from it would lose its packages
    used=$(grep -ls " $(cd "$venv" && pwd -P)/" /proc/[0-9]*/maps 2>/dev/null | head -n 1 | tr -dc '0-9') || true
    [ -z "$used" ] || refuse "$venv has to be made anew, and process $used runs from it: $(tr '\0' ' ' <"/proc/$used/cmdline" | cut -c1-120)" \
        "Let it end, or install elsewhere: make VENV=.venv-new ..."
fi

packages=$(grep -c '==' "$lock")
started=$(date +%s)
printf 'Installing %s packages of %s into %s with %s; minutes, several GB. Details: %s\n' \
    "$packages" "$lock" "$venv" "$("$python" --version)" "$log"
# Where Python comes without ensurepip, the pip beside it puts one in.
"$python" -m venv --clear "$venv" >/dev/null 2>&1 || {
    "$python" -m venv --clear --without-pip "$venv"
    "$python" -m pip --python "$venv/bin/python" install --quiet pip
}

install() {
    "$venv/bin/python" -m pip install --no-deps --progress-bar off "$@" >>"$log" 2>&1 &
    pip=$!
    trap 'kill "$pip" 2>/dev/null; exit 130' INT TERM
    reported=0
    while kill -0 "$pip" 2>/dev/null; do
        sleep 1
        found=$(grep -c '^Collecting ' "$log" || true)
        [ "$((found / 20))" = "$reported" ] || printf '  %s of %s packages fetched, %s s\n' \
            "$found" "$packages" "$(($(date +%s) - started))"
        reported=$((found / 20))
        if [ "$stage" = fetch ] && [ "$(grep -c '^Installing collected packages' "$log")" = 2 ]; then
            stage=unpack
            printf '  all fetched, unpacking, %s s\n' "$(($(date +%s) - started))"
        fi
    done
    trap - INT TERM
    wait "$pip"
}

fail() {
    tail -n 15 "$log" >&2
    refuse "$1 All of pip's output: $log"
}

# torch first: it is the one package that may need another place than pip's default, and pip should say so at once.
stage=torch
torch=$(grep '^torch==' "$lock")
install "$torch" || case $torch in
    *+cpu) fail "pip found no $torch. Set PIP_EXTRA_INDEX_URL (or PIP_FIND_LINKS) to the address that PyTorch's install page \
shows for pip and CPU, and run the command again." ;;
    *) fail "pip could not install $torch." ;;
esac
stage=fetch
install -r "$lock" || fail "pip could not install $lock."
printf '  done, %s s\n' "$(($(date +%s) - started))"
