#!/usr/bin/env bash
# Disks that fail under the image: errors reach the requests they belong to and
# no others, the device survives, and when the disk is well again so is the
# image. What a failed flush has left is not trusted any more.
. /job/lib.sh

# Makes /dev/mapper/bad, a disk of 128 MiB that is well so far.
make_disk() {
    # A case that failed leaves its own.
    dmsetup remove --force bad 2>/dev/null || true
    truncate -s 128M disk
    below=$(losetup -f --show disk)
    sectors=$(blockdev --getsz "$below")
    dmsetup create --noudevsync bad --table "0 $sectors linear $below 0"
    dmsetup mknodes bad
}

remove_disk() {
    dmsetup remove bad
    losetup -d "$below"
}

# table LINE...: what the disk is from now on. Nothing is lost meanwhile.
table() {
    printf '%s\n' "$@" | dmsetup reload bad
    dmsetup suspend --noflush --nolockfs bad
    dmsetup resume bad
}

well() { table "0 $sectors linear $below 0"; }

# Bytes FIRST to END of the disk give errors.
broken_from() {
    local first=$(($1 / 512)) end=$(($2 / 512))
    table "0 $first linear $below 0" "$first $((end - first)) error" \
        "$end $((sectors - end)) linear $below $end"
}

# Where in the file the image has the cluster at a guest offset.
host_offset() {
    qcow2-ublk map --force-share "$1" | tail -n +2 | while read -r offset length mapped _; do
        if (($2 >= offset && $2 < offset + length)); then
            echo $((mapped + $2 - offset))
        fi
    done
}

# put OPTION...: writes to the device, and what dd says goes to `error`.
put() { LC_ALL=C dd of="$device" oflag=direct status=none "$@" 2>error; }
get() { LC_ALL=C dd if="$device" iflag=direct status=none "$@" 2>error; }

says() { grep -q "$1" error || { cat error; return 1; }; }

leaks_at_most() {
    local status=0
    qemu-img check "$1" || status=$?
    ((status == 0 || status == 3))
}

# A part of the disk is bad: requests there fail, others do not.
bad_sectors() {
    local device at
    make_disk
    dd if=/dev/urandom of=data bs=1M count=16 status=none
    qcow2-ublk create /dev/mapper/bad 64M
    device=$(qcow2-ublk add --cache none "$@" /dev/mapper/bad)
    put if=data bs=1M
    qcow2-ublk del "$device"
    at=$(host_offset /dev/mapper/bad $((8 << 20)))
    device=$(qcow2-ublk add --cache none "$@" /dev/mapper/bad)
    broken_from "$at" $((at + 65536))
    # Reading, before it, in it, after it.
    get bs=1M count=8 | cmp -n $((8 << 20)) - data
    fails get bs=64k count=1 skip=128 >/dev/null
    says 'Input/output error'
    get bs=64k count=1 skip=129 | cmp -n 65536 -i 0:$((129 << 16)) - data
    # Writing.
    fails put if=data bs=64k count=1 seek=128
    says 'Input/output error'
    put if=data bs=64k count=1 seek=129 skip=3
    fails put if=data bs=4k count=1 seek=$((128 * 16 + 5))
    # New clusters are somewhere else, and a flush has nothing to do with it.
    put if=data bs=1M count=4 seek=32 conv=fsync
    # Many at once: each gets its own answer.
    fio --name=some --filename="$device" --direct=1 --ioengine=libaio --iodepth=16 --rw=randread \
        --bs=64k --size=16M --continue_on_error=read --output=fio.log --output-format=json || true
    grep -q '"total_err" : 1,' fio.log
    grep -q '"first_error" : 5,' fio.log
    well
    get bs=64k count=1 skip=128 | cmp -n 65536 -i 0:$((128 << 16)) - data
    put if=data bs=64k count=1 seek=128 skip=7 conv=fsync
    get bs=64k count=1 skip=128 | cmp -n 65536 -i 0:$((7 << 16)) - data
    qcow2-ublk del "$device"
    qemu-img check /dev/mapper/bad
    qemu-img convert -f qcow2 -O raw /dev/mapper/bad all
    cmp -n $((4 << 20)) -i $((32 << 20)):0 all data
    cmp -n 65536 -i $((129 << 16)):$((3 << 16)) all data
    remove_disk
}

# The whole disk is away for a while, and no flush happens meanwhile: nothing
# that was acknowledged is lost.
away_for_a_while() {
    local device
    make_disk
    dd if=/dev/urandom of=data bs=1M count=8 status=none
    qcow2-ublk create /dev/mapper/bad 64M
    device=$(qcow2-ublk add --cache none "$@" /dev/mapper/bad)
    # The new clusters' metadata is in memory alone.
    put if=data bs=1M
    table "0 $sectors error"
    fails put if=data bs=1M seek=16 count=1
    says 'Input/output error'
    fails get bs=1M count=1 >/dev/null
    says 'Input/output error'
    well
    get bs=1M count=8 | cmp -n $((8 << 20)) - data
    put if=data bs=1M seek=16 conv=fsync
    qcow2-ublk del "$device"
    leaks_at_most /dev/mapper/bad
    qemu-img convert -f qcow2 -O raw /dev/mapper/bad all
    cmp -n $((8 << 20)) all data
    cmp -n $((8 << 20)) -i $((16 << 20)):0 all data
    remove_disk
}

# The disk fails to sync: the flush is told, and from then on every flush and
# write fails, even when the disk is well again; reads go on; the end says so.
# Opened again, the image has what was flushed.
failed_sync() {
    local device status=0
    make_disk
    dd if=/dev/urandom of=data bs=1M count=8 status=none
    qcow2-ublk create /dev/mapper/bad 64M
    device=$(qcow2-ublk add "$@" /dev/mapper/bad)
    put if=data bs=1M
    put if=data bs=1M seek=16 count=1 conv=fsync
    modprobe dm-flakey
    table "0 $sectors flakey $below 0 0 1 1 error_writes"
    # In place, so that the flush has no metadata to write: that fails in
    # another way. Of the page cache nobody knows yet; a direct write fails by
    # itself.
    put if=data bs=1M seek=16 count=1 || says 'Input/output error'
    fails sync "$device"
    well
    fails put if=data bs=1M seek=24 count=1
    says 'Input/output error'
    fails put if=data bs=4k count=1 conv=fsync
    get bs=1M count=8 | cmp -n $((8 << 20)) - data
    qcow2-ublk del "$device" 2>error || status=$?
    cat error
    leaks_at_most /dev/mapper/bad
    device=$(qcow2-ublk add "$@" /dev/mapper/bad)
    get bs=1M count=8 | cmp -n $((8 << 20)) - data
    put if=data bs=1M seek=16 conv=fsync
    qcow2-ublk del "$device"
    leaks_at_most /dev/mapper/bad
    qemu-img convert -f qcow2 -O raw /dev/mapper/bad all
    cmp -n $((8 << 20)) -i $((16 << 20)):0 all data
    remove_disk
}

# The disk does not take the metadata: the flush is told. Nothing was synced, so
# nothing is lost: when the disk is well, the next flush writes all of it.
failed_metadata() {
    local device at
    make_disk
    dd if=/dev/urandom of=data bs=1M count=16 status=none
    qcow2-ublk create /dev/mapper/bad 64M
    device=$(qcow2-ublk add --cache none "$@" /dev/mapper/bad)
    put if=data bs=1M count=8 conv=fsync
    at=$(host_offset /dev/mapper/bad 0)
    # The header stays well; the tables behind it do not.
    broken_from 65536 "$at"
    put if=data bs=1M count=8 skip=8 seek=8
    fails sync "$device"
    fails sync "$device"
    get bs=1M count=16 | cmp -n $((16 << 20)) - data
    put if=data bs=1M count=4 seek=24
    well
    sync "$device"
    # What was flushed is there, before any clean end.
    qemu-img convert -U -f qcow2 -O raw /dev/mapper/bad all
    qcow2-ublk del "$device"
    qemu-img check /dev/mapper/bad
    cmp -n $((16 << 20)) all data
    cmp -n $((4 << 20)) -i $((24 << 20)):0 all data
    remove_disk
}

# The file system that holds the image is full: who writes is told so, reads go
# on; with space again, writes work.
full_file_system() {
    local device
    truncate -s 64M disk
    mkfs.ext4 -q disk
    mkdir small
    mount -o loop disk small
    dd if=/dev/urandom of=data bs=1M count=16 status=none
    qcow2-ublk create small/disk.qcow2 256M
    dd if=/dev/zero of=small/ballast bs=1M count=16 status=none
    sync
    device=$(qcow2-ublk add "$@" small/disk.qcow2)
    put if=data bs=1M conv=fsync
    fails put if=/dev/zero bs=1M seek=32 count=96
    says 'No space left on device'
    get bs=1M count=16 | cmp -n $((16 << 20)) - data
    # What is there can be written to.
    put if=data bs=1M seek=2 count=4
    put if=data bs=1M count=16
    rm small/ballast
    sync small
    put if=data bs=1M seek=200 count=8
    put if=data bs=1M seek=210 count=1 conv=fsync
    qcow2-ublk del "$device"
    leaks_at_most small/disk.qcow2
    qemu-img convert -O raw small/disk.qcow2 all
    cmp -n $((16 << 20)) all data
    cmp -n $((8 << 20)) -i $((200 << 20)):0 all data
    umount small
}

# Commands on a disk that fails leave what was there, and say why.
commands() {
    local status
    make_disk
    qcow2-ublk create /dev/mapper/bad 64M
    dd if=/dev/urandom of=data bs=1M count=8 status=none
    qcow2-ublk io -c 'write -P 7 0 8M' /dev/mapper/bad
    modprobe dm-flakey
    table "0 $sectors flakey $below 0 0 1 1 error_writes"
    fails qcow2-ublk snapshot create /dev/mapper/bad one 2>error
    says '/dev/mapper/bad'
    fails qcow2-ublk io -c 'write -P 8 0 8M' /dev/mapper/bad
    fails qcow2-ublk convert -n -f raw -O qcow2 data /dev/mapper/bad 2>error
    says '/dev/mapper/bad'
    qcow2-ublk check /dev/mapper/bad
    table "0 $sectors error"
    fails qcow2-ublk check /dev/mapper/bad 2>error
    says '/dev/mapper/bad'
    fails qcow2-ublk add /dev/mapper/bad 2>error
    says '/dev/mapper/bad'
    well
    leaks_at_most /dev/mapper/bad
    qcow2-ublk snapshot create /dev/mapper/bad one
    qcow2-ublk snapshot list /dev/mapper/bad | grep -q one
    qemu-img check /dev/mapper/bad
    remove_disk
}

begin "$@"
for queues in 1 3; do
    try "bad sectors, $queues queues" bad_sectors --queues "$queues"
done
try "a disk that is away for a while" away_for_a_while --queues 2
try "a failed sync, page cache" failed_sync --cache writeback
try "a failed sync, direct I/O" failed_sync --cache none --queues 2
for queues in 1 2; do
    try "metadata that cannot be written, $queues queues" failed_metadata --queues "$queues"
done
try "a full file system, page cache" full_file_system --cache writeback
try "a full file system, direct I/O" full_file_system --cache none --queues 2
try "commands on a disk that fails" commands
finish
