# Debian cloud kernels, unpacked into the cache. Sourced by scripts/vm; needs
# common.sh and apt.sh, and $cache.
# shellcheck shell=bash disable=SC2154

# newest: the highest version among all backports suites. 6.12: the long-term
# kernel of trixie. The archive also answers to names not yet released.
kernel_suites() {
    case $1 in
        newest) echo bookworm-backports trixie-backports forky-backports duke-backports stable-backports ;;
        6.12) echo trixie bookworm-backports ;;
    esac
}

apt_show() { apt-cache show --no-all-versions "$1" | sed -n "s/^$2: //p"; }

# The packages with the kernel image and its modules: linux-image-*, and where
# that is split, the linux-binary-*, -modules-* and -base-* that it depends on.
kernel_packages() {
    local package version name
    local -A seen=()
    local -a queue=("linux-image-cloud-amd64=$1")
    while [[ ${#queue[@]} -gt 0 ]]; do
        package=${queue[0]}
        queue=("${queue[@]:1}")
        [[ -z ${seen[$package]:-} ]] || continue
        seen[$package]=1
        # A meta package holds nothing but documentation.
        [[ $package == *-cloud-amd64=* && ! ${package%%=*} =~ -[0-9] ]] || printf '%s\n' "$package"
        while read -r name version; do
            queue+=("$name=$version")
        done < <(apt_show "$package" Depends | tr ',' '\n' |
            sed -nE 's/^ *(linux-(image|binary|modules|base)-[^ ]+) \(= ([^)]+)\).*/\1 \3/p')
    done
}

# fetch_kernel NAME: download and unpack, then point $cache/kernel-NAME at it.
fetch_kernel() {
    local name=$1 apt=$cache/apt-$1 pattern='' version packages tree release suites
    [[ $name == newest ]] || pattern=^${name//./\\.}\\.
    read -ra suites <<<"$(kernel_suites "$name")"
    say "looking for kernel '$name' in ${suites[*]}"
    private_apt "$apt" "${suites[@]}"
    local -x APT_CONFIG=$apt/apt.conf
    version=$(apt-cache madison linux-image-cloud-amd64 | awk '{print $3}' |
        grep -E "$pattern" | newest_version)
    [[ -n $version ]] || die 125 "no linux-image-cloud-amd64 for kernel '$name' in ${suites[*]}"
    mapfile -t packages < <(kernel_packages "$version")
    tree=$(mktemp -d "$cache/unpack.XXXXXX")
    say "downloading ${packages[*]}"
    (cd "$tree" && apt-get -qq download "${packages[@]}" >"$tree/log" 2>&1) ||
        die 125 "download failed: $(tail -n 3 "$tree/log")"
    for package in "$tree"/*.deb; do
        dpkg-deb -x "$package" "$tree/tree"
        rm "$package"
    done
    release=$(tidy_kernel "$tree/tree")
    # Another run may be using the same one already.
    if [[ ! -e $cache/linux-$release/kernel ]]; then
        rm -rf "$cache/linux-$release"
        mv "$tree/tree" "$cache/linux-$release"
    fi
    rm -rf "$tree" "$apt"
    ln -sfn "linux-$release" "$cache/link-$name"
    mv -T "$cache/link-$name" "$cache/kernel-$name"
}

newest_version() {
    local best='' version
    while read -r version; do
        if [[ -z $best ]] || dpkg --compare-versions "$version" gt "$best"; then
            best=$version
        fi
    done
    printf '%s\n' "$best"
}

# Bring the layouts of different releases into one: the kernel at the top,
# lib/modules/RELEASE below; prints RELEASE.
tidy_kernel() {
    local tree=$1 release image
    if [[ -d $tree/usr/lib/modules ]]; then
        mkdir -p "$tree/lib"
        cp -al "$tree/usr/lib/modules" "$tree/lib/"
    fi
    release=$(basename "$tree"/lib/modules/*)
    image=$(compgen -G "$tree/boot/vmlinuz-*" || compgen -G "$tree/lib/modules/$release/vmlinuz*") ||
        die 125 "no vmlinuz in the kernel packages"
    if ! grep -qs '^CONFIG_PVH=y' "$tree"/boot/config-* "$tree/lib/modules/$release/config" ||
        ! unpack_vmlinuz "$image" "$tree/kernel"; then
        mv "$image" "$tree/kernel"
    fi
    rm -rf "${tree:?}"/{usr,boot} "$tree/lib/modules/$release"/{vmlinuz*,System.map}
    depmod -b "$tree" "$release"
    printf '%s\n' "$release"
}

# unpack_vmlinuz IMAGE FILE: the ELF kernel inside, which QEMU can start
# directly: to unpack it in the guest costs more than a second of every boot.
unpack_vmlinuz() {
    local magic offset tool
    local -A tools=(['\x28\xb5\x2f\xfd']='zstd -qdc' ['\xfd7zXZ\x00']='xz -qdc' ['\x1f\x8b\x08']='gzip -qdc')
    for magic in "${!tools[@]}"; do
        read -ra tool <<<"${tools[$magic]}"
        for offset in $(LC_ALL=C grep -aobP "$magic" "$1" | cut -d : -f 1 | head -n 4); do
            # What follows the archive makes the tools fail after all is done.
            tail -c +$((offset + 1)) "$1" | "${tool[@]}" >"$2" 2>/dev/null || true
            [[ $(head -c 4 "$2" | tail -c 3) != ELF ]] || return 0
        done
    done
    rm -f "$2"
    return 1
}

# kernel_tree NAME [UPDATE]: the unpacked kernel's directory, fetched if need be,
# or if UPDATE is not empty.
kernel_tree() {
    local link=$cache/kernel-$1 update=${2:-}
    if [[ -n $update || ! -e $link/kernel ]]; then
        (
            flock 9
            [[ -z $update && -e $link/kernel ]] || fetch_kernel "$1"
        ) 9>"$cache/kernel.lock"
    fi
    readlink -f "$link"
}
