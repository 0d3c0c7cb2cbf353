#!/usr/bin/env bash
# The device as its users see it: file systems, verified I/O, discard, full
# disks, deletion and signals in the middle of I/O; on every data path, with one
# queue and with several.
. /job/lib.sh

# Cases run side by side with nothing else: a tree worth copying.
tree() {
    mkdir -p tree/sub
    cp -r /bin/busybox /usr/bin/*img* tree/ 2>/dev/null || cp -r /bin/busybox tree/
    for i in 1 2 3 4 5 6 7 8; do
        dd if=/dev/urandom of=tree/sub/$i bs=4k count=$((i * i)) status=none
    done
}

# The image is sound and QEMU reads the same disk from it as the device showed.
sound() {
    qemu-img check -q "$1"
}

# file_system KIND OPTION...: partition, make a file system, copy a tree in,
# compare after remount, after another `add`, and after qemu-img convert.
file_system() {
    local kind=$1 device part
    shift
    mkdir mnt
    tree
    qcow2-ublk create disk.qcow2 1G
    device=$(qcow2-ublk add "$@" disk.qcow2)
    echo 'start=2048, type=83' | sfdisk -q "$device"
    eventually test -b "${device}p1"
    part=${device}p1
    "mkfs.$kind" -q "$part"
    mount "$part" mnt
    cp -r tree mnt/
    umount mnt
    mount "$part" mnt
    diff -r tree mnt/tree
    rm -r mnt/tree/sub
    fstrim mnt
    cp -r tree/sub mnt/tree/
    umount mnt
    qcow2-ublk del "$device"
    sound disk.qcow2

    device=$(qcow2-ublk add "$@" --read-only disk.qcow2)
    eventually test -b "${device}p1"
    mount -o ro "${device}p1" mnt
    diff -r tree mnt/tree
    umount mnt
    qcow2-ublk del "$device"

    qemu-img convert -O raw disk.qcow2 disk.raw
    rm disk.qcow2
    mount -o ro,loop,offset=1048576 disk.raw mnt
    diff -r tree mnt/tree
    umount mnt
}

# verified OPTION...: fio checks every block it wrote, with mixed sizes, many
# requests at once, and trims in between.
verified() {
    local device
    qcow2-ublk create disk.qcow2 256M
    device=$(qcow2-ublk add "$@" disk.qcow2)
    fio --name=mixed --filename="$device" --direct=1 --ioengine=libaio --iodepth=16 \
        --rw=randwrite --bsrange=512-64k --bs_unaligned=0 --size=200M --io_size=24M \
        --verify=crc32c --verify_fatal=1 --fsync=64 --output=fio.log || { cat fio.log; return 1; }
    fio --name=trim --filename="$device" --direct=1 --ioengine=libaio --iodepth=16 \
        --rw=randtrimwrite --bs=64k --size=200M --io_size=16M --output=fio.log ||
        { cat fio.log; return 1; }
    fio --name=many --filename="$device" --direct=1 --ioengine=libaio --iodepth=8 --numjobs=3 \
        --size=24M --offset_increment=32M --rw=randwrite --bs=4k --io_size=6M \
        --verify=pattern --verify_pattern=%o --verify_fatal=1 --output=fio.log ||
        { cat fio.log; return 1; }
    qcow2-ublk del "$device"
    sound disk.qcow2
}

# A discarded cluster's space goes back to the file system that holds the
# image, and the device reads zeros there.
discard_returns_space() {
    local device before after
    qcow2-ublk create disk.qcow2 256M
    device=$(qcow2-ublk add "$@" disk.qcow2)
    dd if=/dev/urandom of="$device" bs=1M count=64 oflag=direct conv=fsync status=none
    before=$(du -k disk.qcow2 | cut -f1)
    blkdiscard -o 0 -l $((48 << 20)) "$device"
    blockdev --flushbufs "$device"
    dd if=/dev/zero of="$device" bs=4k count=1 seek=$((60 << 8)) oflag=direct conv=fsync status=none
    after=$(du -k disk.qcow2 | cut -f1)
    echo "before $before KiB, after $after KiB"
    ((before >= 64 * 1024 && after <= 20 * 1024))
    cmp -n $((48 << 20)) "$device" /dev/zero
    qcow2-ublk del "$device"
    sound disk.qcow2
}

# A discard on an overlay leaves zeros: the backing file must not show.
discard_hides_backing() {
    local device
    dd if=/dev/urandom of=base.raw bs=1M count=16 status=none
    qcow2-ublk create -b base.raw -F raw disk.qcow2
    device=$(qcow2-ublk add "$@" disk.qcow2)
    cmp base.raw "$device"
    blkdiscard -o $((4 << 20)) -l $((4 << 20)) "$device"
    blkdiscard -z -o $((9 << 20)) -l $((1 << 20)) "$device"
    blockdev --flushbufs "$device"
    dd if="$device" bs=1M skip=4 count=4 iflag=direct status=none | cmp -n $((4 << 20)) - /dev/zero
    dd if="$device" bs=1M skip=9 count=1 iflag=direct status=none | cmp -n $((1 << 20)) - /dev/zero
    dd if="$device" bs=1M skip=10 count=6 iflag=direct status=none >got
    dd if=base.raw bs=1M skip=10 count=6 status=none | cmp - got
    qcow2-ublk del "$device"
    sound disk.qcow2
}

# The file system that holds the image fills up: writes fail with an error,
# what was written before stays, the image leaks at most.
no_space() {
    local device status=0
    mkdir small
    mount -t tmpfs -o size=24m none small
    qcow2-ublk create small/disk.qcow2 256M
    device=$(qcow2-ublk add --cache writeback "$@" small/disk.qcow2)
    dd if=/dev/urandom of=first bs=1M count=8 status=none
    dd if=first of="$device" bs=1M oflag=direct conv=fsync status=none
    fails dd if=/dev/zero of="$device" bs=1M seek=16 count=64 oflag=direct conv=fsync status=none
    dd if="$device" bs=1M count=8 iflag=direct status=none | cmp - first
    mount -o remount,size=200m small
    dd if=first of="$device" bs=1M seek=16 oflag=direct conv=fsync status=none
    qcow2-ublk del "$device"
    qemu-img check -q small/disk.qcow2 || status=$?
    echo "qemu-img check: $status"
    ((status == 0 || status == 3))
    qemu-img convert -O raw small/disk.qcow2 all.raw
    cmp -n $((8 << 20)) all.raw first
    cmp -n $((8 << 20)) -i $((16 << 20)):0 all.raw first
    umount small
}

# load DEVICE: I/O that goes on until the device is gone.
load() {
    fio --name=load --filename="$1" --direct=1 --ioengine=libaio --iodepth=16 --rw=randrw \
        --bs=4k --size=128M --time_based --runtime=60 --output=/dev/null >/dev/null 2>&1 &
    eventually loaded "$1"
}

# It has completed more writes than anybody but the load makes.
loaded() { [[ $(awk '{print $5}' <"/sys/block/${1#/dev/}/stat") -gt 200 ]]; }

gone() { [[ ! -e $1 ]]; }

deleted_during_io() {
    local device
    qcow2-ublk create disk.qcow2 256M
    device=$(qcow2-ublk add "$@" disk.qcow2)
    load "$device"
    fails qcow2-ublk del "$device"
    qcow2-ublk del --force "$device"
    gone "$device"
    wait
    sound disk.qcow2
}

terminated_during_io() {
    local device pid
    qcow2-ublk create disk.qcow2 256M
    device=$(qcow2-ublk add "$@" disk.qcow2)
    load "$device"
    pid=$(qcow2-ublk list --json | sed -nE 's/.*"pid": *([0-9]+).*/\1/p' | head -n1)
    kill -TERM "$pid"
    eventually gone "$device"
    wait
    eventually fails kill -0 "$pid"
    sound disk.qcow2
}

# QEMU is refused while the device writes, and we while QEMU writes.
locks() {
    local device
    qcow2-ublk create disk.qcow2 64M
    device=$(qcow2-ublk add disk.qcow2)
    fails qemu-io -c 'write 0 4k' disk.qcow2
    fails qcow2-ublk add disk.qcow2
    qemu-img info -U disk.qcow2 >/dev/null
    qcow2-ublk del "$device"
    mkfifo commands
    qemu-io disk.qcow2 <commands >/dev/null &
    exec 9>commands
    sleep 2
    fails qcow2-ublk add disk.qcow2
    echo quit >&9
    exec 9>&-
    wait
    device=$(qcow2-ublk add disk.qcow2)
    qcow2-ublk del "$device"
}

# A snapshot as a read-only device, while the active disk has moved on.
snapshot_device() {
    local device
    dd if=/dev/urandom of=first bs=1M count=8 status=none
    dd if=/dev/urandom of=second bs=1M count=8 status=none
    qcow2-ublk create disk.qcow2 16M
    device=$(qcow2-ublk add disk.qcow2)
    dd if=first of="$device" bs=1M oflag=direct conv=fsync status=none
    qcow2-ublk del "$device"
    qcow2-ublk snapshot create disk.qcow2 before
    device=$(qcow2-ublk add disk.qcow2)
    dd if=second of="$device" bs=1M oflag=direct conv=fsync status=none
    qcow2-ublk del "$device"
    device=$(qcow2-ublk add --snapshot before disk.qcow2)
    [[ $(blockdev --getro "$device") == 1 ]]
    cmp -n $((8 << 20)) "$device" first
    fails dd if=second of="$device" bs=1M oflag=direct status=none
    fails qcow2-ublk snapshot delete disk.qcow2 before
    qcow2-ublk del "$device"
    qcow2-ublk snapshot apply disk.qcow2 before
    device=$(qcow2-ublk add disk.qcow2)
    cmp -n $((8 << 20)) "$device" first
    qcow2-ublk del "$device"
    sound disk.qcow2
}

# fio's verification, discards, and the same content after a new start, on an
# image made with OPTIONS; QEMU reads the same.
other_format() {
    local path=$1 options=$2 device sum
    local -a key=() reader=(qemu-img convert -f qcow2)
    [[ $options != *luks* ]] || key=(--key-file "$PWD/key")
    printf 'open sesame' >key
    qcow2-ublk create "${key[@]}" -o "$options" disk.qcow2 64M
    device=$(qcow2-ublk add --data-path "$path" --queues 2 "${key[@]}" disk.qcow2)
    fio --name=v --filename="$device" --rw=randrw --bsrange=512-96k --blockalign=512 --size=48M --io_size=24M \
        --direct=1 --ioengine=libaio --iodepth=16 --verify=crc32c --verify_fatal=1 --randseed=3 --output=/dev/null
    blkdiscard -o 50M -l 8M "$device"
    sum=$(sha256sum <"$device")
    qcow2-ublk del "$device"
    device=$(qcow2-ublk add --read-only --data-path "$path" "${key[@]}" disk.qcow2)
    [[ $(sha256sum <"$device") == "$sum" ]]
    qcow2-ublk del "$device"
    if [[ $options == *luks* ]]; then
        fails qcow2-ublk add --key-file /dev/null disk.qcow2
        reader=(qemu-img convert --object "secret,id=k,file=key" --image-opts)
        "${reader[@]}" -O raw "driver=qcow2,encrypt.key-secret=k,file.filename=disk.qcow2" raw
    else
        qemu-img check disk.qcow2
        "${reader[@]}" -O raw disk.qcow2 raw
    fi
    [[ $(sha256sum <raw) == "$sum" ]]
}

# Two devices over one image, each with writes of its own, that are gone when
# they are; the image stays as it was.
temporary_device() {
    local one two sum
    mkdir mnt
    qcow2-ublk create disk.qcow2 256M
    one=$(qcow2-ublk add disk.qcow2)
    mkfs.ext4 -q "$one"
    mount "$one" mnt
    tree
    cp -r tree mnt/
    umount mnt
    qcow2-ublk del "$one"
    sum=$(sha256sum <disk.qcow2)
    one=$(qcow2-ublk add --temporary disk.qcow2)
    two=$(qcow2-ublk add "--temporary=$PWD" disk.qcow2)
    mount "$one" mnt
    diff -r tree mnt/tree
    rm -r mnt/tree
    cp -r tree mnt/other
    umount mnt
    mount "$one" mnt
    diff -r tree mnt/other
    umount mnt
    mount "$two" mnt
    diff -r tree mnt/tree
    umount mnt
    qcow2-ublk del "$one"
    qcow2-ublk del "$two"
    [[ $(sha256sum <disk.qcow2) == "$sum" ]]
    one=$(qcow2-ublk add --read-only disk.qcow2)
    mount -o ro "$one" mnt
    diff -r tree mnt/tree
    umount mnt
    qcow2-ublk del "$one"
}

# Every error of `add` and `del` is one clear sentence and a code of its own.
errors() {
    local device
    fails qcow2-ublk add nothing.qcow2 2>error
    grep -q 'nothing.qcow2' error
    dd if=/dev/zero of=raw bs=1M count=1 status=none
    fails qcow2-ublk add raw 2>error
    grep -qi 'qcow2' error
    qcow2-ublk create disk.qcow2 64M
    device=$(qcow2-ublk add -n 5 disk.qcow2)
    [[ $device == /dev/ublkb5 ]]
    qcow2-ublk create other.qcow2 64M
    fails qcow2-ublk add -n 5 other.qcow2 2>error
    cat error
    grep -q '5' error
    mkfs.ext4 -q "$device"
    mkdir mnt
    mount "$device" mnt
    fails qcow2-ublk del "$device"
    umount mnt
    qcow2-ublk del "$device"
    fails qcow2-ublk del "$device"
}

# A service manager is told READY when the block node exists, not before, and
# STOPPING on SIGTERM: what the systemd unit (Type=notify) relies on. Settings
# come from a file by name, as in the unit.
notifies() {
    local pid
    qcow2-ublk create disk.qcow2 64M
    mkdir -p /etc/qcow2-ublk
    printf 'image = "%s"\nnumber = 7\nqueues = 2\n' "$PWD/disk.qcow2" >/etc/qcow2-ublk/vm.toml
    socat -u "UNIX-RECV:$PWD/notify.sock" OPEN:got,creat,append &
    eventually test -S notify.sock
    NOTIFY_SOCKET=$PWD/notify.sock qcow2-ublk add --config vm >out 2>log &
    pid=$!
    eventually grep -aq READY=1 got
    test -b /dev/ublkb7
    kill -0 "$pid"
    kill -TERM "$pid"
    wait "$pid"
    eventually grep -aq STOPPING=1 got
    gone /dev/ublkb7
    sound disk.qcow2
    kill %1
}

# The image on a block device that is full of old data and has sectors of 4096
# bytes, under a device with sectors of 512.
on_block_device() {
    local loop device
    dd if=/dev/urandom of=back bs=1M count=96 status=none
    loop=$(losetup -f --show -b 4096 back)
    qcow2-ublk create "$loop" 80M
    device=$(qcow2-ublk add --cache none "$@" "$loop")
    [[ $(blockdev --getss "$device") == 512 ]]
    cmp -n $((80 << 20)) "$device" /dev/zero
    fio --name=small --filename="$device" --direct=1 --ioengine=libaio --iodepth=8 \
        --rw=randwrite --bs=512 --size=16M --io_size=2M --verify=crc32c --verify_fatal=1 \
        --output=fio.log || { cat fio.log; return 1; }
    blkdiscard "$device"
    mkfs.ext4 -q "$device"
    mkdir mnt
    tree
    mount "$device" mnt
    cp -r tree mnt/
    umount mnt
    qcow2-ublk del "$device"
    sound "$loop"
    device=$(qcow2-ublk add --read-only "$loop")
    mount -o ro "$device" mnt
    diff -r tree mnt/tree
    umount mnt
    qcow2-ublk del "$device"
    losetup -d "$loop"
}

server_of() { qcow2-ublk list --json | sed -nE 's/.*"pid": *([0-9]+).*/\1/p' | head -n1; }

# Each thread of a process has this in its status; but for the kernel's own
# workers (iou-wrk), which run no code of the process and have the rights of the
# moment when they were made.
every_thread() {
    local status
    for status in /proc/"$1"/task/*/status; do
        ! grep -q '^Name:[[:space:]]*iou-wrk' "$status" || continue
        grep -qE "$2" "$status" || { grep -E "Name|Pid|Cap|Sec|NoNew" "$status"; return 1; }
    done
}

# In every thread: no capabilities, no way to new ones, a filter for system
# calls. The process that keeps the right to command the driver ends with it.
sandboxed() {
    local device pid steward
    qcow2-ublk create disk.qcow2 64M
    device=$(qcow2-ublk add disk.qcow2)
    pid=$(server_of)
    dd if=/dev/urandom of="$device" bs=1M count=4 oflag=direct
    every_thread "$pid" '^CapPrm:[[:space:]]*0+$'
    every_thread "$pid" '^CapEff:[[:space:]]*0+$'
    every_thread "$pid" '^NoNewPrivs:[[:space:]]*1$'
    every_thread "$pid" '^Seccomp:[[:space:]]*2$'
    qcow2-ublk list
    grep -E '^VmLck:[[:space:]]*[1-9]' "/proc/$pid/status"
    steward=$(grep -lx ublk-steward /proc/[0-9]*/comm | cut -d/ -f3)
    grep -x "PPid:[[:space:]]*$pid" "/proc/$steward/status"
    ls -l "/proc/$steward/fd"
    [[ $(ls "/proc/$steward/fd" | wc -l) -eq 1 ]]
    kill -KILL "$pid"
    eventually test ! -e "/proc/$steward"
    qcow2-ublk del "$device"
    qcow2-ublk check --repair all disk.qcow2

    device=$(qcow2-ublk add --no-sandbox disk.qcow2 2>warning)
    grep -i 'no sandbox' warning
    pid=$(server_of)
    every_thread "$pid" '^Seccomp:[[:space:]]*0$'
    grep -q '^CapEff:.*[1-9a-f]' "/proc/$pid/status"
    qcow2-ublk del "$device"
    sound disk.qcow2
}

# When `del` is back, nobody has the image: its file system can be unmounted and
# QEMU takes its locks, at once and every time.
released() {
    local device n
    truncate -s 64M fs
    mkfs.ext4 -q fs
    mkdir mnt
    for n in {1..15}; do
        mount -o loop fs mnt
        [[ -e mnt/disk.qcow2 ]] || qcow2-ublk create mnt/disk.qcow2 16M
        device=$(qcow2-ublk add "$@" mnt/disk.qcow2)
        dd if=/dev/urandom of="$device" bs=64k count=8 oflag=direct status=none
        qcow2-ublk del "$device"
        if ((n % 2)); then
            qemu-io -c "write 0 4k" mnt/disk.qcow2 >qemu || { cat qemu; return 1; }
        fi
        umount mnt
    done
}

begin "$@"
paths=(copy user-copy)
[[ $(uname -r) == 6.1[0-5].* ]] || paths+=(auto-buf)
try "the server is in its sandbox" sandboxed
try "errors of add and del" errors
try "locks against QEMU" locks
try "notifies the service manager" notifies
try "a snapshot as a device" snapshot_device
try "what is written to a temporary device is lost" temporary_device
for path in "${paths[@]}"; do
    for queues in 1 3; do
        options=(--data-path "$path" --queues "$queues")
        try "ext4 ($path, $queues queues)" file_system ext4 "${options[@]}"
        try "fio verify ($path, $queues queues)" verified "${options[@]}"
    done
    try "xfs ($path)" file_system xfs --data-path "$path" --queues 2
    try "discard returns space ($path)" discard_returns_space --data-path "$path"
    try "discard hides the backing file ($path)" discard_hides_backing --data-path "$path"
    try "image on a block device ($path)" on_block_device --data-path "$path"
    try "full file system ($path)" no_space --data-path "$path"
    try "subclusters ($path)" other_format "$path" extended_l2=on,cluster_size=128k
    try "data file ($path)" other_format "$path" data_file=data,data_file_raw=on
    try "LUKS ($path)" other_format "$path" encrypt.format=luks,encrypt.iter-time=10
    try "nothing is held after del ($path)" released --data-path "$path" --queues 3
    try "del during I/O ($path)" deleted_during_io --data-path "$path" --queues 2
    try "SIGTERM during I/O ($path)" terminated_during_io --data-path "$path" --queues 2
done
finish
