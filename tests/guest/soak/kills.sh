#!/usr/bin/env bash
# The daemon is killed again and again in the middle of I/O: what was flushed is
# there every time, the image has leaks at most, and what a run that nobody
# killed wrote is verified by fio. `SOAK_SECONDS` says how long (default 120).
. /job/lib.sh

readonly BLOCKS=4096 # of 4 KiB each, per writer
readonly WRITERS=3

# stamp WRITER BLOCK NUMBER: the block's content.
stamp() {
    printf '%-64s' "$1 $2 $3" | head -c 64
    head -c $((4096 - 64)) /dev/zero | tr '\0' "$(printf '\\%o' $(($3 % 94 + 33)))"
}

# writer DEVICE WRITER START: stamped blocks, each flushed, until one fails;
# each is noted when it is begun and when it is durable. (`nocreat`: a device that
# is gone must not become a file.)
writer() {
    local device=$1 writer=$2 n=$3 block
    while :; do
        block=$((writer * BLOCKS + RANDOM % BLOCKS))
        echo "begin $block $n" >>"notes.$writer"
        stamp "$writer" "$block" "$n" |
            dd of="$device" bs=4096 iflag=fullblock seek="$block" count=1 oflag=direct conv=nocreat,notrunc,fsync status=none \
                2>/dev/null || return 0
        echo "done $block $n" >>"notes.$writer"
        n=$((n + 1))
    done
}

# Every block holds what was last flushed, or what was under way after it.
judge() {
    local device=$1 writer block durable later
    for ((writer = 0; writer < WRITERS; writer++)); do
        awk '$1 == "done" {durable[$2] = $3; later[$2] = ""}
             $1 == "begin" {later[$2] = later[$2] " " $3; if (!($2 in durable)) durable[$2] = 0}
             END {for (b in durable) print b, durable[b], later[b]}' "notes.$writer" >expected
        while read -r block durable later; do
            dd if="$device" of=found bs=4096 skip="$block" count=1 iflag=direct status=none
            holds "$writer" "$block" "$durable" "$later" || {
                echo "block $block: $(head -c 64 found), not $durable or one of $later"
                return 1
            }
        done <expected
    done
}

# holds WRITER BLOCK DURABLE LATER: whether `found` is one of these numbers.
holds() {
    local n
    for n in $3 $4; do
        if ((n == 0)); then
            cmp -s -n 4096 found /dev/zero && return
        else
            stamp "$1" "$2" "$n" | cmp -s found - && return
        fi
    done
    return 1
}

kills() {
    local device pid fio round=0 writer end=$((SECONDS + ${SOAK_SECONDS:-120}))
    local clusters=(4k 64k 2M) paths=(auto-buf user-copy copy)
    while ((SECONDS < end)); do
        rm -f disk.qcow2 notes.*
        qcow2-ublk create -o "cluster_size=${clusters[round % 3]}" disk.qcow2 256M
        for ((writer = 0; writer < WRITERS; writer++)); do : >"notes.$writer"; done
        for life in 1 2 3; do
            device=$(qcow2-ublk add --queues $((1 + round % 2)) disk.qcow2)
            pid=$(qcow2-ublk list --json | sed -n 's/.*"pid": \([0-9]*\).*/\1/p')
            judge "$device"
            fio --name=load --filename="$device" --allow_file_create=0 --direct=1 --ioengine=libaio --iodepth=8 --offset=64M \
                --size=128M --rw=randrw --bsrange=4k-64k --time_based --runtime=60 >fio.log 2>&1 &
            fio=$!
            for ((writer = 0; writer < WRITERS; writer++)); do
                writer "$device" "$writer" $((life * 100000)) &
            done
            sleep "$((1 + RANDOM % 3)).$((RANDOM % 10))"
            kill -KILL "$pid"
            wait "$fio" || true
            wait
            eventually test ! -e "$device"
            qcow2-ublk del --all --force >/dev/null 2>&1 || true
            # Leaks (3) at most.
            qemu-img check -q disk.qcow2 || [[ $? -eq 3 ]]
        done
        # One that nobody kills.
        device=$(qcow2-ublk add disk.qcow2)
        judge "$device"
        fio --name=verified --filename="$device" --direct=1 --ioengine=libaio --iodepth=16 --offset=64M \
            --size=128M --io_size=8M --rw=randwrite --bsrange=512-64k --bs_unaligned=0 --verify=crc32c \
            --verify_fatal=1 --fsync=64 --output=fio.log || { cat fio.log; return 1; }
        qcow2-ublk del "$device"
        qcow2-ublk check --repair leaks disk.qcow2 >/dev/null
        qemu-img check -q disk.qcow2
        round=$((round + 1))
    done
    ((round > 0))
    echo "$round rounds, $((round * 3)) kills, $(cat notes.* | grep -c done) flushed writes in the last" >&3
}

begin "$@"
exec 3>&1
try "killed again and again" kills
finish
