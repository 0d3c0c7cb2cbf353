#!/usr/bin/env bash
# The unit file under a real systemd with udev: readiness, the sandbox, the end,
# and a file system mounted from fstab.
# vm: --systemd --add systemd/qcow2-ublk@.service:/etc/systemd/system/qcow2-ublk@.service
. /job/lib.sh

# configure NAME LINE...: its image and its settings, besides the lines.
configure() {
    local name=$1
    shift
    mkdir -p /etc/qcow2-ublk /srv/images
    rm -f "/srv/images/$name.qcow2"
    qemu-img create -q -f qcow2 "/srv/images/$name.qcow2" 256M
    {
        printf 'image = "/srv/images/%s.qcow2"\n' "$name"
        printf '%s\n' "$@"
    } >"/etc/qcow2-ublk/$name.toml"
}

# state NAME WORD: what systemd says of the unit.
state() {
    [[ $(systemctl is-active "qcow2-ublk@$1") == "$2" ]]
}

starts_and_stops() {
    configure disk 'number = 5'
    systemctl start qcow2-ublk@disk
    # Started means usable, without waiting.
    test -b /dev/ublkb5
    state disk active
    dd if=/dev/urandom of=data bs=1M count=8 status=none
    dd if=data of=/dev/ublkb5 bs=1M oflag=direct status=none
    systemctl stop qcow2-ublk@disk
    state disk inactive
    [[ ! -e /dev/ublkb5 ]]
    [[ $(systemctl show -P Result qcow2-ublk@disk) == success ]]
    qemu-img check /srv/images/disk.qcow2
    qemu-img convert -O raw /srv/images/disk.qcow2 raw
    cmp -n $((8 << 20)) data raw
    # And once more: nothing of the first run is in the way.
    systemctl start qcow2-ublk@disk
    cmp -n $((8 << 20)) data /dev/ublkb5
    systemctl restart qcow2-ublk@disk
    cmp -n $((8 << 20)) data /dev/ublkb5
    systemctl stop qcow2-ublk@disk
}

sandboxed() {
    configure box 'number = 6'
    systemctl start qcow2-ublk@box
    local pid
    pid=$(systemctl show -P MainPID qcow2-ublk@box)
    grep -x 'Seccomp:.2' "/proc/$pid/status"
    grep -x 'NoNewPrivs:.1' "/proc/$pid/status"
    # SYS_ADMIN and a few, not all of them.
    [[ $(awk '$1 == "CapBnd:" {print $2}' "/proc/$pid/status") != 000001ffffffffff ]]
    # /usr and /etc are read-only for it.
    grep -E ' /usr [^ ]+ ro,' "/proc/$pid/mounts"
    grep -E ' /etc [^ ]+ ro,' "/proc/$pid/mounts"
    [[ $(cat "/proc/$pid/oom_score_adj") == -900 ]]
    # Everything that a device does works in there.
    fio --name=v --filename=/dev/ublkb6 --rw=randrw --bs=4k --size=32M --direct=1 --ioengine=libaio \
        --iodepth=16 --verify=crc32c --verify_fatal=1 --randseed=7 --output=/dev/null
    blkdiscard -o 0 -l 16M /dev/ublkb6
    [[ $(qcow2-ublk list --json | grep -c ublkb6) -ge 1 ]]
    systemctl stop qcow2-ublk@box
    qemu-img check /srv/images/box.qcow2
}

two_at_once() {
    configure one 'number = 7'
    configure two 'number = 8'
    systemctl start qcow2-ublk@one qcow2-ublk@two
    test -b /dev/ublkb7
    test -b /dev/ublkb8
    # The end of one is not that of what both keep in /run.
    systemctl stop qcow2-ublk@one
    state two active
    qcow2-ublk list | grep ublkb8
    # And `del` from outside ends the service in good order.
    qcow2-ublk del /dev/ublkb8
    eventually state two inactive
    [[ $(systemctl show -P Result qcow2-ublk@two) == success ]]
}

says_why_not() {
    configure bad 'colour = "blue"'
    fails systemctl start qcow2-ublk@bad
    state bad failed
    journalctl -u qcow2-ublk@bad -o cat --no-pager | tee log
    grep 'colour' log
    fails systemctl start qcow2-ublk@absent
    systemctl reset-failed
}

mounted() { grep -q " $1 " /proc/mounts; }

from_fstab() {
    configure vm 'number = 9'
    systemctl start qcow2-ublk@vm
    mkfs.ext4 -q /dev/ublkb9
    systemctl stop qcow2-ublk@vm
    mkdir -p /srv/vm
    echo '/dev/ublkb9 /srv/vm ext4 nofail,_netdev,x-systemd.requires=qcow2-ublk@vm.service' >/etc/fstab
    systemctl daemon-reload
    # Mounting starts the device.
    systemctl start srv-vm.mount
    state vm active
    mounted /srv/vm
    echo hello >/srv/vm/file
    # Stopping the device unmounts first, so that nothing is lost.
    systemctl stop qcow2-ublk@vm
    fails mounted /srv/vm
    qemu-img check /srv/images/vm.qcow2
    systemctl start srv-vm.mount
    [[ $(cat /srv/vm/file) == hello ]]
    systemctl stop qcow2-ublk@vm
    : >/etc/fstab
    systemctl daemon-reload
}

# The manager is up when it answers; the job has been started beside it.
booted() { [[ $(systemctl is-system-running 2>/dev/null) =~ ^(running|degraded)$ ]]; }

begin "$@"
install -m 755 /job/qcow2-ublk /usr/sbin/qcow2-ublk
eventually booted || { systemctl list-jobs; systemctl --failed; exit 1; }
try "the unit starts and stops" starts_and_stops
try "the unit's sandbox lets a device work" sandboxed
try "two units" two_at_once
try "a unit that cannot start says why" says_why_not
try "a mount in fstab brings its device" from_fstab
finish
