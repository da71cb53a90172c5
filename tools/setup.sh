#!/bin/sh
# Make the virtual environment DIR from the interpreter PYTHON, with the package (editable) and
# the tools of its developers in it.  Usage: tools/setup.sh PYTHON DIR
#
# Debian keeps `venv` and the C headers of Python in packages of their own. As root (a container,
# a fresh machine) the missing ones are installed; anybody else is told what to install.
set -eu

python=$1
venv=$2

say() { printf 'setup: %s\n' "$*" >&2; }

command -v "$python" >/dev/null || { say "no $python found; try: make PYTHON=python3.12"; exit 1; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    say "$("$python" --version) is too old: 3.11 or newer is needed; try: make PYTHON=python3.12"
    exit 1
}

missing=
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3-venv"
"$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
    missing="$missing python3-dev"
command -v gcc >/dev/null || missing="$missing gcc libc6-dev"
if [ -n "$missing" ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "installing$missing"
        # shellcheck disable=SC2086
        { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y $missing; } \
            >/dev/null || say "could not install$missing"
    else
        say "missing:$missing (Debian: apt install$missing)"
    fi
fi

if [ ! -x "$venv/bin/python" ]; then
    "$python" -m venv "$venv" || {
        rm -rf "$venv"
        say "could not make $venv (Debian: apt install python3-venv)"
        exit 1
    }
fi
"$venv/bin/python" -m pip install --quiet --editable '.[dev]'
