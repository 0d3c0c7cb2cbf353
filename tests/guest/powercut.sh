#!/usr/bin/env bash
# Power cuts on a real disk: dm-log-writes records what reaches the disk that
# holds the image, while the device is written to, discarded and flushed. Then
# the disk is put together again as a power cut would have left it after each
# flush of it, and in between, and the image there is judged: by our check, by
# QEMU's, and by content.
#
# POWERCUT_POINTS (default 20) flushes of each recording, POWERCUT_ROUNDS (40)
# flushes of the device, POWERCUT_SEED (1).
# vm: --add target/release/examples/powercut
. /job/lib.sh
points=${POWERCUT_POINTS:-20} rounds=${POWERCUT_ROUNDS:-40} seed=${POWERCUT_SEED:-1}

# Makes /dev/mapper/cut, which records what is written to the file `disk`.
begin_recording() {
    truncate -s 1G log
    cp --sparse=always disk start
    below=$(losetup -f --show disk)
    into=$(losetup -f --show log)
    dmsetup create --noudevsync cut --table "0 $(blockdev --getsz "$below") log-writes $below $into"
    dmsetup mknodes cut
}

end_recording() {
    dmsetup remove cut
    losetup -d "$below" "$into"
}

# The image on the disk itself.
on_the_disk() {
    local options=$1 device loop
    shift
    truncate -s 64M disk
    loop=$(losetup -f --show disk)
    qcow2-ublk create -o "$options" "$loop" 24M
    losetup -d "$loop"
    begin_recording
    device=$(qcow2-ublk add "$@" /dev/mapper/cut)
    powercut record "$device" cut journal "$rounds" "$seed"
    qcow2-ublk del "$device"
    end_recording
    powercut replay log journal start . "$points" "$seed"
}

# The image in a file system on the disk, which is mounted as after a crash.
in_a_file_system() {
    local device count at n
    truncate -s 128M disk
    mkfs.ext4 -q disk
    mkdir mnt
    mount -o loop disk mnt
    qcow2-ublk create mnt/disk.qcow2 24M
    umount mnt
    begin_recording
    mount /dev/mapper/cut mnt
    device=$(qcow2-ublk add "$@" mnt/disk.qcow2)
    powercut record "$device" cut journal "$rounds" "$seed"
    qcow2-ublk del "$device"
    umount mnt
    end_recording
    count=$(powercut count log)
    for ((n = 1; n <= points; n++)); do
        at=$((count * n / points))
        powercut extract log start cut.img "$at"
        mount -o loop cut.img mnt
        powercut judge mnt/disk.qcow2 log journal "$at"
        umount mnt
    done
}

begin "$@"
modprobe dm-log-writes
try "power cuts, image on a disk, page cache" on_the_disk cluster_size=64k --cache writeback
try "power cuts, image on a disk, direct I/O, 2 queues" on_the_disk cluster_size=4k --cache none --queues 2
try "power cuts, subclusters on a disk" on_the_disk extended_l2=on,cluster_size=64k --cache none
try "power cuts, image in ext4" in_a_file_system --cache none
try "power cuts, image in ext4, page cache" in_a_file_system --cache writeback --queues 2
finish
