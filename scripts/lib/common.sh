# Helpers shared by the scripts. Sourced, not run.
# shellcheck shell=bash

# say WORDS...: progress, for people, on stderr.
say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

# die CODE WORDS...
die() {
    local code=$1
    shift
    say "$*"
    exit "$code"
}

# as_root COMMAND...: run with root's rights, through sudo where needed.
as_root() {
    if [[ $EUID -eq 0 ]]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die 1 "needs root (or sudo) for: $*"
    fi
}

# have TOOL: also looks where only root's PATH does.
have() { PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null; }
