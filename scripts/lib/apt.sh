# Debian archives beside the system's own: more suites, without touching /etc/apt.
# Sourced, not run; needs common.sh.
# shellcheck shell=bash

# The Debian mirror this machine is configured for. --print-uris needs neither
# the network nor root, and understands every format of sources.
debian_mirror() {
    local uris
    if [[ -n ${DEBIAN_MIRROR:-} ]]; then
        printf '%s\n' "${DEBIAN_MIRROR%/}"
        return
    fi
    uris=$(apt-get --print-uris update 2>/dev/null) ||
        die 125 "apt cannot read this machine's package sources"
    # Others may offer a suite named like Debian's; -updates only the archive has.
    {
        sed -nE "s|^'([^']*)/dists/[a-z]+-updates/.*|\1|p" <<<"$uris"
        sed -nE "s/^'([^']*)\/dists\/(stable|testing|unstable|sid|bookworm|trixie|forky|duke)\/.*/\1/p" <<<"$uris"
    } | sed -n 1p
}

# What goes between the brackets of a source line. Signatures are always
# checked, unless the machine's own source for the mirror says not to.
mirror_options() {
    local mirror=$1 keyring=/usr/share/keyrings/debian-archive-keyring.gpg options=lang=none
    [[ ! -e $keyring ]] || options+=" signed-by=$keyring"
    if grep -rhsE '^deb .*\[[^]]*trusted=yes' /etc/apt/sources.list /etc/apt/sources.list.d |
        grep -qF "$mirror"; then
        options+=" trusted=yes"
    fi
    printf '%s\n' "$options"
}

# private_apt DIR SUITE...: make DIR an apt configuration with only these suites
# of the machine's mirror, and fetch their lists; suites that the mirror does
# not have are left out silently. Then run apt with APT_CONFIG=DIR/apt.conf.
private_apt() {
    local dir=$1 mirror options suite
    shift
    mirror=$(debian_mirror)
    [[ -n $mirror ]] ||
        die 125 "no Debian archive among this machine's package sources; set DEBIAN_MIRROR to one"
    options=$(mirror_options "$mirror")
    mkdir -p "$dir"/{lists,cache/archives}/partial "$dir/empty"
    : >"$dir/status"
    for suite; do
        printf 'deb [%s] %s %s main\n' "$options" "$mirror" "$suite"
    done >"$dir/sources.list"
    cat >"$dir/apt.conf" <<CONF
Dir::Etc::sourcelist "$dir/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::State::lists "$dir/lists";
Dir::State::status "$dir/status";
Dir::Cache "$dir/cache";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled "false";
APT::Architecture "amd64";
APT::Architectures { "amd64"; };
APT::Sandbox::User "";
#clear APT::Update::Post-Invoke-Success;
#clear APT::Update::Post-Invoke;
CONF
    # Suites that do not exist make update fail; what counts is what arrived.
    APT_CONFIG=$dir/apt.conf apt-get -qq update >"$dir/update.log" 2>&1 || true
    compgen -G "$dir/lists/*Packages*" >/dev/null ||
        die 125 "cannot fetch package lists from $mirror: $(tail -n 3 "$dir/update.log")"
}
