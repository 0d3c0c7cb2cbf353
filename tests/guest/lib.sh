# What the scripts in this folder share. Each runs inside a guest, as root, and
# prints "ok NAME" or "not ok NAME" for each of its cases. A script defines
# functions, calls `begin "$@"`, then `try NAME FUNCTION [ARG]...` for each
# case, then `finish`.
# shellcheck shell=bash
set -euo pipefail
failed=0

# A case runs in a process of its own (see try): this is where it gets there.
begin() {
    if [[ ${1:-} == --case ]]; then
        shift
        "$@"
        exit
    fi
}

# Runs a case in an empty folder; what it prints is shown only when it fails.
# In a new process, because `set -e` is off in whatever `if` or `!` looks at.
try() {
    local name=$1 dir log
    shift
    dir=$(mktemp -d) log=$(mktemp)
    if (cd "$dir" && exec timeout 600 bash "$0" --case "$@") >"$log" 2>&1; then
        echo "ok $name"
    else
        echo "not ok $name"
        tail -n 60 "$log" | sed 's/^/    /'
        dmesg | tail -n 5 | sed 's/^/    dmesg: /'
        failed=1
    fi
    # What a failed case left behind must not disturb the next.
    awk -v dir="$dir" 'index($2, dir) == 1 {print $2}' /proc/mounts | sort -r |
        xargs -r -n1 umount -l || true
    qcow2-ublk del --all --force >/dev/null 2>&1 || true
    rm -rf "$dir" "$log"
}

finish() {
    exit "$failed"
}

# The command has to fail.
fails() {
    if "$@"; then
        echo "should have failed: $*"
        return 1
    fi
}

# Waits until the command succeeds, 20 seconds at most.
eventually() {
    local end=$((SECONDS + 20))
    until "$@"; do
        if ((SECONDS > end)); then
            echo "never happened: $*"
            return 1
        fi
        sleep 0.1
    done
}
