#!/usr/bin/env bash
# Makes or repairs .venv in this clone, with the exact versions of constraints.txt.
#
#   tools/setup.sh base    what `make demo` needs
#   tools/setup.sh all     also DeepSpeed, the loaders, SLURM, the tests, the pages, and FFCV where it can be built
#
# PYTHON=/path/to/python3.12 chooses the interpreter. This is a shell script because it runs before any package exists.
#
# Two files in .venv make it safe to stop and to run again. `alignscale-setup`, written last, says what is installed, so
# that a finished set-up is recognised without asking pip. `alignscale-unfinished` is there while packages change: a run
# that finds it starts from an empty .venv.
set -euo pipefail

venv=.venv
stamp=$venv/alignscale-setup
unfinished=$venv/alignscale-unfinished
log=.cache/setup.log

say() { printf 'setup: %s\n' "$*"; }

fail() { # what is wrong, then lines that say what to do
    printf 'setup: error: %s\n' "$1" >&2
    shift
    [ $# -eq 0 ] || printf '  %s\n' "$@" >&2
    exit 1
}

# ---- Python ----------------------------------------------------------------------------------------------------------

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }

supported() { [ "$1" = 3.11 ] || [ "$1" = 3.12 ]; }

find_python() { # sets python and version
    local candidate tried="" candidates=(python3.12 python3.11 python3)
    [ -z "${PYTHON-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        version=$(version_of "$candidate")
        if supported "$version"; then
            python=$candidate
            return
        fi
        tried="$tried${tried:+, }$candidate (${version:-does not run})"
    done
    fail "no Python 3.11 or 3.12; tried $tried" \
        "Install one (Debian 12: apt-get install python3.11-venv; elsewhere pyenv, uv and conda have both)," \
        "then run again, with PYTHON=/path/to/python3.12 if it is not on your PATH."
}

why_make_anew() { # why the .venv that is here cannot be kept; silent if it can
    if [ -e "$unfinished" ]; then
        echo "an earlier set-up stopped half way"
    elif [ -z "$have_version" ]; then
        echo "its Python does not run"
    elif ! supported "$have_version"; then
        echo "it has Python $have_version"
    elif [ -n "${PYTHON-}" ] && [ "$have_version" != "$version" ]; then
        echo "it has Python $have_version and $PYTHON is $version"
    elif [ -n "$have_clone" ] && [ "$have_clone" != "$PWD" ]; then
        echo "it was made in $have_clone"
    fi
}

make_venv() {
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python cannot make virtual environments: its venv module is missing" \
            "Debian and Ubuntu: apt-get install python$version-venv; then run again."
    say "making $venv with Python $version ($(command -v "$python"))"
    mkdir "$venv"
    : >"$unfinished"
    "$python" -m venv "$venv" >"$log" 2>&1 || explain "could not make $venv"
    rm "$unfinished"
}

# ---- what can be built here ------------------------------------------------------------------------------------------

choose_ffcv() { # adds ffcv to what is wanted, or says what it lacks
    local missing=""
    command -v c++ >/dev/null || missing="$missing g++"
    [ -e "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] ||
        missing="$missing python$version-dev"
    command -v pkg-config >/dev/null || missing="$missing pkg-config"
    pkg-config --exists opencv4 2>/dev/null || missing="$missing libopencv-dev"
    pkg-config --exists libturbojpeg 2>/dev/null || missing="$missing libturbojpeg0-dev"
    if [ -z "$missing" ]; then
        wanted="$wanted ffcv"
    else
        say "note: FFCV is left out: it is built from source, which needs$missing"
        say "      to add it: apt-get install$missing (Debian's names), then run this again"
    fi
}

# ---- what it costs ---------------------------------------------------------------------------------------------------

torch_build() { # cpu, default or installed
    local pin builds have
    pin=$(sed -n 's/^torch==//p' constraints.txt)
    have=$("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null) || true
    if [ "${have%+*}" = "$pin" ]; then
        echo installed
        return
    fi
    builds=$("$venv/bin/python" -m pip index versions torch 2>"$log" | grep -oE '[^ ,()]+') || true
    if grep -qxF "$pin+cpu" <<<"$builds"; then
        echo cpu
    elif grep -qF "$pin" <<<"$builds"; then
        echo default
    else
        explain "pip finds no torch $pin for Python $version"
    fi
}

free_mb() { df -Pk -- "$1" | awk 'NR == 2 { print int($4 / 1024) }'; }

check_cost() { # says what will be downloaded and installed, in MB, and stops if there is no room for it
    local build download installed temporary=${TMPDIR:-/tmp}
    build=$(torch_build)
    case $build in
        cpu) download=310 installed=1400 build="torch's CPU build" ;;
        default) download=2850 installed=5300 build="torch's default build, with CUDA" ;;
        installed) download=0 installed=0 build="torch is here already" ;;
    esac
    [ -z "$extras" ] || { download=$((download + 425)) installed=$((installed + 1560)); }
    say "installing alignscale${extras:+ with the extras$extras}, versions from constraints.txt"
    say "about $download MB to download, less what pip has cached, and $installed MB on disk ($build)"
    [ "$(free_mb .)" -ge "$installed" ] ||
        fail "$PWD has $(free_mb .) MB free and needs $installed MB" "Make room, or move the clone; then run again."
    [ "$(free_mb "$temporary")" -ge "$download" ] ||
        fail "$temporary has $(free_mb "$temporary") MB free, and pip needs up to $download MB there" \
            "Make room, or run again with TMPDIR=/a/roomier/folder."
}

# ---- pip -------------------------------------------------------------------------------------------------------------

explain() { # reads the log of what failed, and says what to do
    local what=$1 text culprit
    text=$(cat "$log" 2>/dev/null) || true
    if grep -qE 'No space left on device|Disk quota exceeded' <<<"$text"; then
        fail "$what: the disk is full" "Make room, then run again. Log: $log"
    fi
    culprit=$(sed -nE 's/.*Failed building (wheel|editable) for ([^ ]+).*/\2/p' <<<"$text" | head -n 1)
    if [ -n "$culprit" ]; then
        fail "$what: $culprit did not build" "The compiler's messages are in $log."
    fi
    if grep -qE 'ConnectionError|NameResolutionError|Max retries|timed out|Timeout|ProxyError|SSLError' <<<"$text"; then
        fail "$what: no package index could be reached" \
            "Check the network, the proxy and pip's own configuration (pip config list), then run again. Log: $log"
    fi
    text=$(grep -E '^ *(ERROR|error)' <<<"$text" | tail -n 3) || true
    fail "$what" ${text:+"$text"} "The whole log: $log. Mend the cause, then run again."
}

progress() { # pip's output, reduced to what takes long
    sed -unE \
        -e 's/^ *Downloading ([^ -]+)-.* \(([0-9.]+ [MG]B)\).*/  downloading \1, \2/p' \
        -e 's/^ *Building wheel for ([^ ]+) .*started.*/  building \1/p' \
        -e 's/^Installing collected packages:.*/  unpacking/p'
}

changed_nothing() { [ -f "$log" ] && ! grep -q '^Installing collected packages' "$log"; }

stopped() { # by a failure or a signal; what was there before still works if pip had not begun to change it
    local status=$?
    if changed_nothing; then
        [ -z "$old_stamp" ] || printf '%s\n' "$old_stamp" >"$stamp"
        rm -f "$unfinished"
    else
        printf 'setup: stopped half way; the next run starts from an empty %s\n' "$venv" >&2
    fi
    exit $status
}

install() {
    local list=${extras// /,} status
    old_stamp=$(cat "$stamp" 2>/dev/null || true)
    : >"$log"
    trap stopped EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    : >"$unfinished"
    rm -f "$stamp"
    # The constraints also hold for what builds the packages that come as source; they go by environment because old and
    # new pip name them differently, and relative because pip splits the variable at spaces.
    set +e
    PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_USER=0 \
        "$venv/bin/python" -m pip install --no-input --no-compile -e ".${list:+[${list#,}]}" 2>&1 | tee "$log" | progress
    status=${PIPESTATUS[0]}
    set -e
    [ "$status" -eq 0 ] || explain "pip could not install the packages"
    # To byte code on all cores, where pip uses one; templates that are no Python, and fail, are never imported.
    "$venv/bin/python" -m compileall -q -j "$(nproc)" "$venv/lib" >>"$log" 2>&1 || true
    "$venv/bin/python" -c 'import torch' >>"$log" 2>&1 || explain "torch was installed but cannot be imported"
    case $extras in *stream*) "$venv/bin/python" -c 'import cv2' >>"$log" 2>&1 ||
        say "note: OpenCV cannot be imported; Debian: apt-get install libgl1 libglib2.0-0" ;; esac
    printf '%s\n' "$PWD" "$hash" "$extras" >"$stamp"
    rm -f "$unfinished"
    trap - EXIT INT TERM HUP
}

# ---- the run ---------------------------------------------------------------------------------------------------------

case "${1-}" in
    base) wanted="" ;;
    all) wanted="deepspeed dev docs slurm stream" ;;
    *) fail "unknown argument '${1-}'" "usage: tools/setup.sh base|all" ;;
esac
system=$(uname -s)
[ "$system" = Linux ] || fail "alignscale runs on Linux, and this is $system" \
    "Use a Linux machine, a container, or WSL 2 on Windows."
cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

have_clone="" have_hash="" have_extras=""
[ ! -f "$stamp" ] || { IFS= read -r have_clone && read -r have_hash && IFS= read -r have_extras; } <"$stamp" || true
have_version=$(version_of "$venv/bin/python")
[ -z "${PYTHON-}" ] || find_python
reason="there is none"
[ ! -e "$venv" ] && [ ! -L "$venv" ] || reason=$(why_make_anew)
if [ -n "$reason" ]; then
    find_python
    have_hash="" have_extras=""
else
    python=$venv/bin/python version=$have_version
fi

[ "$1" != all ] || choose_ffcv
# What is there already stays: `base` after `all` takes nothing away.
extras=$have_extras
for extra in $wanted; do
    case "$extras " in *" $extra "*) ;; *) extras="$extras $extra" ;; esac
done
hash=$(cat pyproject.toml constraints.txt | sha256sum | cut -d ' ' -f 1)
if [ "$have_hash" = "$hash" ] && [ "$have_extras" = "$extras" ]; then
    say "$venv is up to date"
    exit 0
fi

can_write() { mkdir -p .cache 2>/dev/null && [ -w . ] && [ -w .cache ] && { [ ! -e "$venv" ] || [ -w "$venv" ]; }; }
can_write ||
    fail "user $(id -un) cannot write in $PWD" "Use a clone of your own, or change who owns this one."
if command -v flock >/dev/null; then
    exec 9>.cache/setup.lock
    flock -n 9 || fail "another set-up of this clone is running" "Wait for it to end, then run again."
fi
if [ -n "$reason" ]; then
    [ "$reason" = "there is none" ] || say "$venv will be made anew: $reason"
    rm -rf "$venv"
    make_venv
fi
check_cost
install
say "done: $venv is ready"
