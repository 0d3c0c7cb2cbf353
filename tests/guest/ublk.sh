#!/usr/bin/env bash
# The ublk front against the real driver, with a RAM disk behind it: each data
# path, errors, and every way in which a device or its server can end.
# ONLY=REGEX runs some of the cases.
. /job/lib.sh

# await SECONDS COMMAND...: until it succeeds, quietly.
await() {
    local - tries=$(($1 * 20))
    set +x
    shift
    until "$@" >/dev/null 2>&1; do
        ((tries-- > 0)) || return 1
        sleep 0.05
    done
}

# refused CODE PATTERN COMMAND...: it fails with that exit code and message.
refused() {
    local want=$1 pattern=$2 code=0
    shift 2
    "$@" >refusal 2>&1 || code=$?
    cat refusal
    [[ $code -eq $want ]]
    grep -E -- "$pattern" refusal
}

# start NAME OPTION...: serves a RAM disk; sets dev, id and pid.
start() {
    local name=$1
    shift
    rm -f "$name.out"
    ramdisk serve "$@" >"$name.out" 2>"$name.err" &
    pid=$!
    await 20 test -s "$name.out" || { cat "$name.err"; return 1; }
    dev=$(<"$name.out") id=${dev#/dev/ublkb}
    test -b "$dev"
}

# end NAME PID [CODE]: the server ends by itself, with that exit code.
end() {
    local code=0
    await 20 gone_process "$2"
    wait "$2" || code=$?
    cat "$1.err"
    [[ $code -eq ${3:-0} ]]
}

gone_process() { ! kill -0 "$1"; }

# stop NAME: as its service manager would.
stop() {
    kill -TERM "$pid"
    end "$1" "$pid"
    absent "$id"
}

absent() { [[ ! -e /dev/ublkb$1 && ! -e /dev/ublkc$1 ]] && ! ramdisk list | grep "^$1 "; }

# seen NAME WORD: how many requests of a kind the server has counted.
seen() { sed -n "s/.* $2=\([0-9]*\).*/\1/p" "$1.err"; }

# More requests than what looks for partitions makes.
busy() { [[ $(awk '{print $5}' <"/sys/block/ublkb$1/stat") -gt 200 ]]; }
has() { ramdisk features | grep -q "^$1 "; }
bytes() { head -c "$1" /dev/urandom; }

# Random sizes and places, several jobs, every byte checked; then discards.
verify() {
    start r 64M --data-path "$1" --queues "$2"
    ramdisk list | grep "^$id live queues=$2 depth=128 size=67108864 pid=$pid path=$1"
    fio --name=mixed --allow_file_create=0 --filename="$dev" --rw=randrw --rwmixwrite=70 --bsrange=512-1m --bs_unaligned=0 \
        --direct=1 --ioengine=io_uring --iodepth=16 --numjobs=2 --size=32m --offset_increment=32m \
        --io_size=12m --verify=crc32c --verify_fatal=1 --group_reporting --minimal >fio.log || { cat fio.log; false; }
    fio --name=trim --allow_file_create=0 --filename="$dev" --rw=randtrimwrite --bs=64k --direct=1 --ioengine=io_uring \
        --iodepth=8 --size=16m --io_size=8m --group_reporting --minimal >fio.log || { cat fio.log; false; }
    fio --name=small --allow_file_create=0 --filename="$dev" --rw=randwrite --bs=4k --direct=1 --ioengine=io_uring --iodepth=64 \
        --numjobs=2 --size=8m --offset_increment=8m --io_size=4m --verify=sha1 --verify_fatal=1 \
        --group_reporting --minimal >fio.log || { cat fio.log; false; }
    stop r
    [[ $(seen r reads) -gt 100 && $(seen r writes) -gt 100 && $(seen r discards) -gt 10 ]]
    case $1 in
        auto-buf) [[ $(seen r direct) -eq $(($(seen r reads) + $(seen r writes))) ]] ;;
        copy) [[ $(seen r direct) -gt 0 ]] ;;
        user-copy) [[ $(seen r direct) -eq 0 ]] ;;
    esac
}

file_system() {
    start r 96M --data-path "$1"
    mkfs.ext4 -q "$dev"
    mkdir mnt files
    for i in $(seq 12); do bytes $((i * i * 20011)) >files/$i; done
    mount "$dev" mnt
    cp -r files mnt/
    umount mnt
    e2fsck -fn "$dev"
    mount "$dev" mnt
    diff -r files mnt/files
    rm -r mnt/files
    fstrim -v mnt
    umount mnt
    stop r
    [[ $(seen r flushes) -gt 1 && $(seen r discards) -gt 0 ]]
}

flush_and_fua() {
    start r 16M --data-path "$1"
    dd if=/dev/zero of="$dev" bs=64k count=4 oflag=direct conv=fsync
    dd if=/dev/zero of="$dev" bs=4k count=7 oflag=direct,dsync
    stop r
    # One for dd's fsync, one from stopping.
    [[ $(seen r flushes) -ge 2 && $(seen r fua) -eq 7 ]]
}

zeroes() {
    local option
    bytes 1048576 >content
    head -c 1048576 /dev/zero >zeroes
    start r 16M --data-path "$1"
    for option in discard zeroout zero punch; do
        dd if=content of="$dev" bs=1M oflag=direct conv=notrunc
        case $option in
            discard) blkdiscard "$dev" ;;
            zeroout) blkdiscard -z "$dev" ;;
            zero) fallocate -z -l 1M "$dev" ;;
            punch) fallocate -p -l 1M "$dev" ;;
        esac
        cmp -n 1048576 "$dev" zeroes
    done
    stop r
    [[ $(seen r discards) -ge 1 && $(seen r zeroes) -ge 3 && $(seen r nounmap) -ge 1 ]]
}

# A failure is that of one request, with its errno; its neighbours succeed.
failures() {
    start r 16M --data-path "$1" --fail write:2048:ENOSPC --fail read:4096:EIO --fail flush:0:EIO
    dd if=/dev/zero of="$dev" bs=512 seek=2047 count=1 oflag=direct
    dd if=/dev/zero of="$dev" bs=512 seek=2049 count=1 oflag=direct
    refused 1 "No space left on device" dd if=/dev/zero of="$dev" bs=512 seek=2048 count=1 oflag=direct
    refused 1 "No space left on device" dd if=/dev/zero of="$dev" bs=64k seek=16 count=1 oflag=direct
    dd if="$dev" of=/dev/null bs=512 skip=4095 count=1 iflag=direct
    dd if="$dev" of=/dev/null bs=512 skip=4097 count=1 iflag=direct
    refused 1 "Input/output error" dd if="$dev" of=/dev/null bs=512 skip=4096 count=1 iflag=direct
    refused 1 "Input/output error" dd if=/dev/zero of="$dev" bs=4k count=1 oflag=direct conv=fsync
    dd if="$dev" of=/dev/null bs=1M count=1 iflag=direct
    kill -TERM "$pid"
    # The flush before the stop fails, which is said; the device goes all the same.
    end r "$pid" 1
    grep "write back the page cache: Input/output error" r.err
    absent "$id"
}

read_only() {
    bytes 4194304 >content
    start r 4M --data-path "$1" --read-only --from content
    [[ $(blockdev --getro "$dev") == 1 ]]
    refused 1 "not permitted|Read-only" dd if=/dev/zero of="$dev" bs=4k count=1 oflag=direct
    cmp content "$dev"
    stop r
    [[ $(seen r writes) -eq 0 ]]
}

# An odd number of sectors, and what the disk says of itself.
geometry() {
    local queue
    start r 1000448
    queue=/sys/block/ublkb$id/queue
    [[ $(blockdev --getsize64 "$dev") == 1000448 ]]
    [[ $(<"$queue/logical_block_size") == 512 && $(<"$queue/physical_block_size") == 4096 ]]
    [[ $(<"$queue/optimal_io_size") == 65536 && $(<"$queue/write_cache") == "write back" ]]
    [[ $(<"$queue/fua") == 1 && $(<"$queue/discard_granularity") == 4096 ]]
    dd if=/dev/zero of="$dev" bs=512 seek=1953 count=1 oflag=direct
    refused 1 "No space left" dd if=/dev/zero of="$dev" bs=512 seek=1954 count=1 oflag=direct
    stop r
    refused 1 "whole number of blocks.*" ramdisk serve 1000448 --logical-block 4096
    start r 4M --logical-block 4096
    [[ $(blockdev --getss "$dev") == 4096 ]]
    stop r
}

partitions() {
    start r 32M --save disk
    printf 'label: gpt\n,8M\n,8M\n' | sfdisk -q "$dev"
    await 5 test -b "${dev}p2"
    mkfs.ext4 -q "${dev}p2"
    stop r
    start r 32M --from disk --queues 2
    await 5 test -b "${dev}p2"
    mkdir mnt
    mount "${dev}p2" mnt
    refused 5 "in use: mounted on .*/mnt" ramdisk remove "$id"
    touch mnt/still-works
    umount mnt
    ramdisk remove "$id"
    end r "$pid"
    if has NO_AUTO_PART_SCAN; then
        start r 32M --from disk --no-part-scan
        sleep 0.5
        test ! -e "${dev}p1"
        stop r
    else
        refused 4 "no NO_AUTO_PART_SCAN.*" ramdisk serve 32M --no-part-scan
    fi
}

# Buffered writes nobody has flushed, while the disk is still open.
write_back() {
    bytes 8388608 >content
    start r 8M --save saved
    exec 7<>"$dev"
    cat content >&7
    [[ $1 == stop ]] || ramdisk remove --force "$id"
    [[ $1 == remove ]] || kill -TERM "$pid"
    end r "$pid"
    exec 7>&-
    cmp content saved
    absent "$id"
}

# A plain file where the disk's node belongs.
name_taken() {
    touch /dev/ublkb7
    refused 5 "/dev/ublkb7: another file has the device's name" ramdisk serve 4M --id 7 --time-limit 2
    rm /dev/ublkb7
    absent 7
}

taken() {
    start r 4M --id 5
    [[ $dev == /dev/ublkb5 ]]
    refused 5 "device id 5 is taken" ramdisk serve 4M --id 5
    stop r
}

two_devices() {
    local first
    start a 16M --queues 2
    first="$dev $id $pid"
    start b 16M
    [[ $dev != "${first%% *}" && $(ramdisk list | wc -l) == 2 ]]
    fio --direct=1 --ioengine=io_uring --iodepth=8 --bs=16k --rw=randwrite --verify=md5 --verify_fatal=1 \
        --size=8m --minimal --name=a --allow_file_create=0 --filename="${first%% *}" --name=b --allow_file_create=0 --filename="$dev" >fio.log
    stop b
    read -r dev id pid <<<"$first"
    dd if="$dev" of=/dev/null bs=1M
    stop a
}

in_use() {
    start r 4M
    exec 7<"$dev"
    sleep 100 &
    local user=$!
    exec 7<&-
    refused 5 "in use: .*sleep \(pid $user\)" ramdisk remove "$id"
    dd if="$dev" of=/dev/null bs=1M count=1 iflag=direct
    kill $user
    ramdisk remove "$id"
    absent "$id"
    end r "$pid"
    grep "stopped by somebody else" r.err
    refused 4 "there is no ublk device" ramdisk remove "$id"
}

# The device goes away under load: fio fails, nothing hangs.
under_load() {
    start r 32M --queues 2
    fio --name=load --allow_file_create=0 --filename="$dev" --rw=randrw --bs=4k --direct=1 --ioengine=io_uring --iodepth=32 \
        --numjobs=2 --size=32m --time_based --runtime=60 --minimal >fio.log 2>&1 &
    local fio=$!
    await 20 busy "$id"
    case $1 in
        remove)
            refused 5 "in use: .*fio" ramdisk remove "$id"
            ramdisk remove --force "$id"
            end r "$pid"
            ;;
        term)
            kill -TERM "$pid"
            end r "$pid"
            ;;
        kill)
            kill -KILL "$pid"
            end r "$pid" 137
            ;;
        panic)
            dd if="$dev" of=/dev/null bs=512 skip=60000 count=1 iflag=direct || true
            end r "$pid" 134
            ;;
    esac
    await 30 gone_process $fio
    ! wait $fio
    case $1 in kill | panic)
        await 10 test ! -e "$dev"
        ramdisk list | grep "^$id dead"
        ramdisk remove "$id"
        ;;
    esac
    absent "$id"
    start again 4M --id "$id"
    stop again
}

# The server dies while a file system is mounted.
dies_mounted() {
    start r 32M
    mkfs.ext4 -q "$dev"
    mkdir mnt
    mount "$dev" mnt
    bytes 100000 >mnt/file
    kill -KILL "$pid"
    end r "$pid" 137
    # What nobody can write back any more is lost; the kernel must not hang.
    umount mnt || umount -l mnt
    await 10 test ! -e "$dev"
    ramdisk remove "$id"
    absent "$id"
}

# A panic in a handler ends the server instead of leaving requests behind.
panics() {
    start r 4M --fail read:128:panic
    refused 1 "Input/output error" dd if="$dev" of=/dev/null bs=512 skip=128 count=1 iflag=direct
    end r "$pid" 134
    grep "told to panic" r.err
    await 10 test ! -e "$dev"
    ramdisk remove "$id"
    absent "$id"
}

# A request that never ends is given up by the stop, which says so.
hangs() {
    start r 4M --time-limit 4 --fail read:128:hang
    dd if="$dev" of=/dev/null bs=512 skip=128 count=1 iflag=direct &
    local reader=$!
    sleep 0.5
    kill -TERM "$pid"
    end r "$pid" 1
    grep "requests under way had to be given up" r.err
    await 20 gone_process $reader
    ! wait $reader
    absent "$id"
}

# The same while the device starts: before Linux 7.0 the kernel looks for
# partitions during the start itself.
hangs_early() {
    local code=0
    timeout -s TERM 3 ramdisk serve 4M --time-limit 4 --fail read:0:hang || code=$?
    await 20 absent 0
    start r 4M
    stop r
}

# Killed while what users have written is written back before the stop, or
# while the driver waits for a request during the stop itself: nothing of the
# server may stay in the kernel, nor the device.
killed_while_stopping() {
    start r 4M --fail "$1:128:hang"
    if [[ $1 == write ]]; then
        exec 7<>"$dev"
        dd if=/dev/zero bs=512 seek=128 count=1 conv=notrunc >&7
    else
        dd if="$dev" of=/dev/null bs=512 skip=128 count=1 iflag=direct &
    fi
    sleep 0.5
    kill -TERM "$pid"
    sleep 1
    kill -KILL "$pid"
    end r "$pid" 137
    exec 7>&-
    await 20 test ! -e "$dev"
    ramdisk remove "$id"
    absent "$id"
    start again 4M
    stop again
}

# Somebody else's stop meets a request that never ends.
remove_hangs() {
    start r 4M --fail read:128:hang
    dd if="$dev" of=/dev/null bs=512 skip=128 count=1 iflag=direct &
    local reader=$! remover
    sleep 0.5
    ramdisk remove --force "$id" 2>remove.err &
    remover=$!
    sleep 1
    if [[ $1 == kill ]]; then
        kill -KILL "$pid"
    else
        # It gives up by itself, after its time limit.
        await 60 gone_process $remover
        grep "cannot be stopped: its server (pid $pid)" remove.err
        kill -KILL "$pid"
    fi
    end r "$pid" 137
    await 20 gone_process $reader
    await 20 gone_process $remover
    [[ ! -e /dev/ublkc$id ]] || ramdisk remove "$id"
    absent "$id"
}

# A queue that does not come up: no device, and no waiting for one.
queue_fails() {
    local queue
    for queue in 0 1; do
        refused 1 "told to fail a start" timeout 10 ramdisk serve 4M --queues 2 --fail start:$queue:EIO
        [[ -z $(ramdisk list) ]]
    done
    # The first read is the kernel's, for partitions, while the device starts.
    start r 4M --fail read:0:EIO
    stop r
}

grows() {
    start r 4M
    kill -HUP "$pid"
    if ! has UPDATE_SIZE; then
        await 5 grep "has no UPDATE_SIZE" r.err
        [[ $(blockdev --getsize64 "$dev") == 4194304 ]]
        stop r
        return
    fi
    await 5 test "$(blockdev --getsize64 "$dev")" == 8388608 || [[ $(blockdev --getsize64 "$dev") == 8388608 ]]
    bytes 1048576 >content
    dd if=content of="$dev" bs=1M seek=7 oflag=direct
    dd if="$dev" bs=1M skip=7 iflag=direct | cmp - content
    ramdisk list | grep "^$id .* size=8388608 "
    stop r
}

limits() {
    refused 1 "1 to 4096 queues" ramdisk serve 4M --queues 0
    refused 1 "depth is 1 to 4096" ramdisk serve 4M --depth 5000
    refused 1 "longest request" ramdisk serve 4M --max-request 1000
    start r 8M --depth 4096 --data-path user-copy
    dd if=/dev/zero of="$dev" bs=1M oflag=direct || true
    stop r
    start r 8M --depth 1 --max-request 4096
    fio --name=v --allow_file_create=0 --filename="$dev" --rw=randrw --bs=16k --direct=1 --size=2m --verify=md5 --verify_fatal=1 --minimal >fio.log
    stop r
    if ! has AUTO_BUF_REG; then
        refused 4 "no AUTO_BUF_REG, which the data path auto-buf needs" ramdisk serve 4M --data-path auto-buf
    fi
}

not_root() {
    refused 2 "run as root" setpriv --reuid nobody --regid nogroup --clear-groups "$(command -v ramdisk)" serve 4M
}

no_driver() {
    modprobe -r ublk_drv
    refused 4 "modprobe ublk_drv" ramdisk serve 4M
    refused 4 "no ublk driver" ramdisk list
    modprobe ublk_drv
    await 5 test -c /dev/ublk-control
}

# What a case leaves running, whatever happens to it.
[[ ${1:-} != --case ]] || { set -x; trap 'kill -9 $(jobs -p) 2>/dev/null || true' EXIT; }
begin "$@"

paths=(copy user-copy)
if has AUTO_BUF_REG; then paths+=(auto-buf); fi
echo "Linux $(uname -r), data paths: ${paths[*]}"

only() { if [[ -z ${ONLY:-} || $1 =~ $ONLY ]]; then try "$@"; fi; }

for path in "${paths[@]}"; do
    for queues in 1 2; do only "verify $path, $queues queues" verify "$path" $queues; done
    for case in file_system flush_and_fua zeroes failures read_only; do only "$case, $path" "$case" "$path"; done
done
for case in geometry partitions taken name_taken two_devices in_use dies_mounted panics hangs \
    hangs_early queue_fails grows limits; do
    only $case $case
done
for how in stop remove; do only "write-back at a $how" write_back $how; done
for what in write read; do only "killed while stopping: $what" killed_while_stopping $what; done
for how in kill wait; do only "hanging remove: $how" remove_hangs $how; done
for how in remove term kill; do only "under load: $how" under_load $how; done
only "not root" not_root
only "no driver" no_driver
finish
