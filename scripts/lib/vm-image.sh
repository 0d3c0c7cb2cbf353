# The guest's initramfs: a base archive with tools and modules, kept in the
# cache, and a small archive per run with the job. The kernel unpacks archives
# that follow each other one after the other. Sourced by scripts/vm, which sets
# $cache.
# shellcheck shell=bash disable=SC2154

# With their dependencies; names a kernel does not have are skipped.
guest_modules=(virtio_pci virtio_blk virtio_console ublk_drv nbd loop brd null_blk xfs ext4 fuse overlay
    vfat nls_cp437 nls_ascii nls_iso8859-1 dm-mod dm-flakey dm-log-writes dm-snapshot dm-delay dm-crypt sd_mod scsi_debug)

# Without these a guest makes no sense.
guest_tools=(dash bash qemu-img qemu-io qemu-nbd fio mkfs.ext4 e2fsck mkfs.xfs xfs_repair sfdisk
    losetup blkdiscard blockdev fallocate mount umount flock tar socat)

# Welcome when the host has them; busybox does the rest.
guest_extras=(partprobe partx lsblk blkid wipefs unshare nsenter setpriv prlimit setfattr getfattr
    resize2fs dumpe2fs tune2fs xfs_io xfs_db xfs_growfs dmsetup cat chmod chown cmp comm cp cut date dd
    df diff du env expr find grep head install ln ls mkdir mkfifo mv nice od paste printf ps awk
    realpath rm sed seq sha256sum shuf sleep sort split stat stdbuf sync tail tee test timeout
    touch tr truncate uniq wc xargs gzip zstd)

# The ELF programs and libraries that FILE... load, one per line.
libraries_of() {
    { ldd "$@" 2>/dev/null || true; } | sed -nE 's/^.* => (\/[^ ]+) .*/\1/p; s/^\t(\/[^ ]+) \(.*/\1/p' | sort -u
}

# Sets the variable PLACE to where PATH really is: /lib and its like are links in
# the guest, which a directory of that name in a later archive would replace.
resolve() {
    place=$1
    case $1 in
        /bin/* | /sbin/* | /lib/* | /lib32/* | /lib64/*) place=/usr$1 ;;
        /bin | /sbin | /lib | /lib32 | /lib64) place=/usr$1 ;;
        /dev/* | /proc/* | /sys/* | /run/* | /out/* | /var/run/* | /var/lock/* | /var/tmp/*) die 64 "the guest mounts something over $1" ;;
    esac
}

# install_at ROOT FILE [PATH]: copy FILE, through links, to PATH in the tree.
install_at() {
    local root=$1 file=$2 path place
    resolve "${3:-$2}"
    path=$place
    mkdir -p "$root${path%/*}"
    cp -L --preserve=mode "$file" "$root$path"
}

install_libraries() {
    local root=$1 library place
    shift
    while read -r library; do
        resolve "$library"
        [[ -e $root$place ]] || install_at "$root" "$library"
    done < <(libraries_of "$@")
}

# The directories of a merged /usr, so that every library keeps its path.
make_skeleton() {
    local root=$1 name
    mkdir -p "$root"/{usr/{bin,sbin,lib,lib64,lib32},etc,dev,proc,sys,tmp,run,var,root,mnt,job,out,new}
    for name in bin sbin lib lib64 lib32; do ln -s "usr/$name" "$root/$name"; done
    ln -s ../run "$root/var/run"
    ln -s ../run/lock "$root/var/lock"
    ln -s ../tmp "$root/var/tmp"
    ln -s ../proc/self/mounts "$root/etc/mtab"
    printf 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n' >"$root/etc/passwd"
    printf 'root:x:0:\nnogroup:x:65534:\n' >"$root/etc/group"
    printf '127.0.0.1 localhost\n' >"$root/etc/hosts"
    printf 'passwd: files\ngroup: files\nhosts: files\n' >"$root/etc/nsswitch.conf"
}

# Where the host has TOOL: sets the variable FOUND, without a fork.
locate() {
    local dir
    for dir in /usr/local/sbin /usr/local/bin /usr/sbin /usr/bin /sbin /bin; do
        found=$dir/$1
        [[ ! -x $found ]] || return 0
    done
    return 1
}

install_tools() {
    local root=$1 tool applet found
    local -a files=()
    for tool in "${guest_tools[@]}" "${guest_extras[@]}"; do
        locate "$tool" || continue
        install_at "$root" "$found" "/usr/bin/$tool"
        files+=("$found")
    done
    install_libraries "$root" "${files[@]}"
    locate busybox
    install_at "$root" "$found" /usr/bin/busybox
    while read -r applet; do
        [[ -e $root/usr/bin/$applet ]] || ln -s busybox "$root/usr/bin/$applet"
    done < <("$found" --list)
    # Not busybox as the shell: Debian's would run its own applets instead of
    # the programs in PATH.
    ln -sf dash "$root/usr/bin/sh"
    # The kernel looks for it here when it wants a module.
    ln -sf ../bin/busybox "$root/usr/sbin/modprobe"
}

install_modules() {
    local root=$1 kernel=$2 release file module
    release=$(basename "$kernel"/lib/modules/*)
    for module in "${guest_modules[@]}"; do
        modprobe -d "$kernel" -S "$release" --show-depends "$module" 2>/dev/null || true
    done | awk '$1 == "insmod" {print $2}' | sort -u | while read -r file; do
        file=lib/modules/$release/${file#*"/lib/modules/$release/"}
        install_at "$root" "$kernel/$file" "/$file"
        case $file in
            *.xz) xz -d "$root/$file" ;;
            *.zst) zstd -q -d --rm "$root/$file" ;;
        esac
    done
    cp "$kernel/lib/modules/$release"/modules.{builtin,builtin.modinfo,order} "$root/lib/modules/$release/"
    depmod -b "$root" "$release"
    sed '/^#/d; / ublk-control /d' "$root/lib/modules/$release/modules.devname" >"$root/lib/modules/$release/devices"
}

# make_archive TREE FILE
make_archive() {
    (cd "$1" && find . -mindepth 1 -print0 |
        cpio --null --create --format=newc --owner=0:0 --quiet --reproducible) >"$2" ||
        die 125 "cannot pack $1"
}

# Changes when a tool, the kernel or the recipe does.
base_key() {
    local kernel=$1 tool found
    local -a files=()
    for tool in busybox "${guest_tools[@]}" "${guest_extras[@]}"; do
        if locate "$tool"; then files+=("$found"); fi
    done
    { echo "$kernel"; cat "${BASH_SOURCE[0]}"; stat -L -c '%n %s %Y' "${files[@]}"; } | sha256sum | cut -c 1-16
}

check_tools() {
    local tool found
    for tool in busybox cpio depmod qemu-system-x86_64 "${guest_tools[@]}"; do
        locate "$tool" || die 125 "no $tool on this machine: run scripts/setup test"
    done
}

build_base() {
    local kernel=$1 file=$2 root
    say "packing the tools and modules for ${kernel##*/linux-} (once)"
    root=$(mktemp -d "$cache/base.XXXXXX")
    make_skeleton "$root"
    install_tools "$root"
    install_modules "$root" "$kernel"
    make_archive "$root" "$file.new"
    mv "$file.new" "$file"
    rm -rf "$root"
    # What no run has used for a while.
    find "$cache" -maxdepth 1 -name 'base-*.cpio' -mmin +600 -delete
}

# base_archive KERNEL_TREE: the base archive's path, built if need be.
base_archive() {
    local kernel=$1 file
    file=$cache/base-$(base_key "$kernel").cpio
    if [[ ! -e $file ]]; then
        check_tools
        (
            flock 9
            [[ -e $file ]] || build_base "$kernel" "$file"
        ) 9>"$cache/base.lock"
    fi
    touch "$file"
    printf '%s\n' "$file"
}

# add_to_job TREE HOSTPATH GUESTPATH: a file or directory, with the libraries
# that its programs need.
add_to_job() {
    local root=$1 host=$2 guest place
    local -a programs=()
    resolve "$3"
    guest=$place
    [[ -e $host ]] || die 64 "--add: no such file: $host"
    mkdir -p "$root${guest%/*}"
    if [[ -d $host ]]; then
        mkdir -p "$root$guest"
        cp -a "$host/." "$root$guest/"
        mapfile -t programs < <(find -L "$host" -type f \( -perm -u+x -o -name '*.so*' \))
    else
        install_at "$root" "$host" "$guest"
        if [[ -x $host ]]; then programs=("$host"); fi
    fi
    [[ ${#programs[@]} -eq 0 ]] || install_libraries "$root" "${programs[@]}"
}

# systemd, journald and udev of the host, with their units and rules.
add_systemd() {
    local root=$1 tool found
    for tool in systemctl journalctl udevadm systemd-tmpfiles systemd-run; do
        locate "$tool" || die 125 "no $tool on this machine: run scripts/setup test"
        add_to_job "$root" "$found" "/usr/bin/$tool"
    done
    add_to_job "$root" /usr/lib/systemd /usr/lib/systemd
    add_to_job "$root" /usr/lib/udev /usr/lib/udev
    # Only what somebody asks for is started: none of the host's own services.
    rm -rf "$root"/usr/lib/udev/hwdb* "$root"/usr/lib/systemd/system/*.wants/*hwdb*
    mkdir -p "$root/etc/systemd/system"
    : >"$root/etc/fstab"
    touch "$root/vm/systemd"
}
