#!/usr/bin/env bash
# The .deb packages and the relocatable archive of a release, from binaries that are built already:
#
#   integration/packages/build.sh deb        target/dist/baton-{common,router,workerd,tools}_*.deb
#   integration/packages/build.sh tarball    target/dist/baton-VERSION-x86_64-linux.tar.zst
#
#   PROFILE=dist     which binaries: target/PROFILE
#   REVISION=1       of the packages, after the version's dash
#   QUICK=1          little compression, for a try
#   MAINTAINER=...   of the packages
#   OUT=target/dist  where they go
#
# Not cargo-deb, nor debhelper: what they would do here is one `dpkg-deb --build` a package, and what is left (NIXL's
# libraries, units that are started by the operator and restarted one at a time) they would have to be talked out of.
# The same trees make the archive, and nothing has to be installed for it but zstd.
#
# baton-common holds what a host has once, however many daemons: the user, /etc/baton and baton.target.
set -euo pipefail

what=${1:-}
root=$(cd "$(dirname "$0")/../.." && pwd)
packages=$root/integration/packages
profile=${PROFILE:-dist}
compression=(-Zxz -z9) level=19
[ -z "${QUICK:-}" ] || compression=(-Zgzip -z1) level=1
out=${OUT:-$root/target/dist}
version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' "$root/Cargo.toml")
revision=${REVISION:-1}
maintainer=${MAINTAINER:-Baton developers <baton@example.org>}
# The same sources make the same bytes.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git -C "$root" log -1 --format=%ct 2>/dev/null || date +%s)}
export SOURCE_DATE_EPOCH

fail() {
    echo "packages: $*" >&2
    exit 1
}

need() {
    for tool in "$@"; do
        command -v "$tool" >/dev/null || fail "\`$tool\` is needed and not installed"
    done
}

[ "$(uname -sm)" = "Linux x86_64" ] || fail "only for x86-64 Linux, as NIXL's libraries are"
for program in baton-router baton-workerd baton-up baton-client; do
    [ -x "$root/target/$profile/$program" ] || fail "target/$profile/$program was not built"
done
[ -x "$root/target/release/manuals" ] || fail "target/release/manuals was not built"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
umask 022
"$root/target/release/manuals" "$work/manuals"
python3 "$packages/notices.py" "$root" >"$work/notices"

# program TREE NAME: with its manual page and completions.
program() {
    install -d "$1/bin" "$1/share"
    strip --strip-unneeded -o "$1/bin/$2" "$root/target/$profile/$2"
    chmod 755 "$1/bin/$2"
    cp -r "$work/manuals/$2/share/." "$1/share"
}

# nixl TREE: NIXL as `make setup` keeps it, in the place where a worker looks by itself, ../lib/baton/nixl.
nixl() {
    install -d "$1/lib/baton"
    cp -rL "$root/.deps/nixl" "$1/lib/baton/nixl"
    rm -f "$1/lib/baton/nixl/.complete"
    if find "$1/lib/baton/nixl" -name 'libuct_ib_mlx5*' | grep -q .; then
        fail "NIXL's libuct_ib_mlx5* may not be passed on (docs/src/reference/packages.md)"
    fi
    find "$1/lib/baton/nixl" -type f -exec chmod 644 {} +
    find "$1/lib/baton/nixl" -name '*.so*' -exec strip --strip-unneeded {} +
}

# The sample that a package's user finds as /etc/baton/router.toml takes the unit's socket.
router_file() {
    sed 's,^listen = "127.0.0.1:8000"  *#.*,listen = "systemd:http"              # the port of baton-router.socket; or HOST:PORT\, unix:/PATH,' \
        "$root/config/router.toml" >"$1"
    grep -q '^listen = "systemd:http"' "$1" || fail "config/router.toml has no \`listen\` to replace"
}

# The sample cluster, with a model that stands beside it.
cluster_file() {
    sed 's,"\.deps/models/,",' "$root/config/cluster.toml" >"$1"
}

# units TREE PATTERN: of those in config/systemd.
units() {
    install -d "$1/lib/systemd/system"
    # The pattern is to be expanded.
    # shellcheck disable=SC2086
    install -m 644 "$root"/config/systemd/$2 "$1/lib/systemd/system"
}

# finish PACKAGE TREE DEPENDS: documents, control files, the package.
finish() {
    local package=$1 tree=$2 depends=$3 doc=$2/usr/share/doc/$1 source=$packages/$1 name
    install -d "$doc" "$tree/DEBIAN"
    cp "$packages/copyright" "$doc/copyright"
    [ "$package" != baton-workerd ] || cat "$packages/nixl.copyright" >>"$doc/copyright"
    case $package in baton-common) ;; *) gzip -9nc "$work/notices" >"$doc/third-party-licences.gz" ;; esac
    gzip -9nc "$root/CHANGELOG.md" >"$doc/changelog.gz"
    printf 'baton (%s-%s) unstable; urgency=medium\n\n  * Packages of Baton %s; its changes are in changelog.gz.\n\n -- %s  %s\n' \
        "$version" "$revision" "$version" "$maintainer" "$(date -uR -d "@$SOURCE_DATE_EPOCH")" |
        gzip -9nc >"$doc/changelog.Debian.gz"
    find "$tree/usr/share/man" -type f -exec gzip -9n {} + 2>/dev/null || true
    if [ -e "$source/lintian-overrides" ]; then
        install -Dm 644 "$source/lintian-overrides" "$tree/usr/share/lintian/overrides/$package"
    fi
    for name in preinst postinst prerm postrm; do
        [ ! -e "$source/$name" ] || install -m 755 "$source/$name" "$tree/DEBIAN/$name"
    done
    (cd "$tree" && find etc -type f -printf '/%p\n' 2>/dev/null | sort) >"$tree/DEBIAN/conffiles" || true
    [ -s "$tree/DEBIAN/conffiles" ] || rm "$tree/DEBIAN/conffiles"
    (cd "$tree" && find . -path ./DEBIAN -prune -o -path ./etc -prune -o -type f -printf '%P\0' |
        sort -z | xargs -0 md5sum) >"$tree/DEBIAN/md5sums"
    sed -e "s/@VERSION@/$version-$revision/g" -e "s/@UPSTREAM@/$version/" -e "s/@DEPENDS@/$depends/" \
        -e "s/@SIZE@/$(du -sk --exclude=DEBIAN "$tree" | cut -f1)/" -e "s/@MAINTAINER@/$maintainer/" \
        "$source/control" >"$tree/DEBIAN/control"
    find "$tree" -type d -exec chmod 755 {} +
    dpkg-deb --root-owner-group "${compression[@]}" --build "$tree" "$out" >/dev/null
}

# needs TREE: sets $needed to the Debian packages whose libraries its programs load, in the versions whose symbols they
# use. UCX's module for CUDA wants the driver's libraries, for which no package is asked: without them UCX does without
# the module.
needs() {
    local nixl=$1/usr/lib/baton/nixl but=()
    # Some 80 files of Abseil want what gRPC wants: for a try, these few will do.
    [ -z "${QUICK:-}" ] || but=(! -name 'libabsl_*')
    install -d "$work/debian" "$1/DEBIAN"
    printf 'Source: baton\n\nPackage: baton\nArchitecture: amd64\n' >"$work/debian/control"
    needed=$(find "$1/usr" -type f \( -path '*/bin/*' -o -name '*.so*' \) ! -name 'libuct_cuda*' "${but[@]}" -print0 |
        (cd "$work" && xargs -0 dpkg-shlibdeps -O --ignore-missing-info \
            "-l$nixl/nixl_cu12.libs" "-l$nixl/.nixl_cu12.mesonpy.libs" 2>needs.log)) || fail "$(cat "$work/needs.log")"
    needed=${needed#shlibs:Depends=}
}

deb() {
    need dpkg-deb dpkg-shlibdeps gzip strip
    local tree
    rm -f "$out"/baton-{common,router,workerd,tools}_*.deb

    tree=$work/common
    units "$tree/usr" baton.target
    install -d "$tree/etc/baton"
    finish baton-common "$tree" ''

    tree=$work/router
    program "$tree/usr" baton-router
    units "$tree/usr" 'baton-router.*'
    install -d "$tree/etc/baton" "$tree/usr/share/doc/baton-router/examples"
    router_file "$tree/etc/baton/router.toml"
    install -m 644 "$root/config/examples/disagg_config.yaml" "$tree/usr/share/doc/baton-router/examples"
    needs "$tree"
    finish baton-router "$tree" "$needed"

    tree=$work/workerd
    program "$tree/usr" baton-workerd
    units "$tree/usr" baton-workerd@.service
    nixl "$tree/usr"
    install -d "$tree/etc/baton/workerd" "$tree/usr/share/doc/baton-workerd/examples"
    install -m 644 "$root/config/workerd-context.toml" "$tree/etc/baton/workerd/example.toml"
    install -m 644 "$root"/config/{workerd-*.toml,examples/{ctx,gen}_config.yaml} "$tree/usr/share/doc/baton-workerd/examples"
    needs "$tree"
    finish baton-workerd "$tree" "$needed"

    tree=$work/tools
    program "$tree/usr" baton-up
    program "$tree/usr" baton-client
    install -d "$tree/usr/share/doc/baton-tools/examples"
    cluster_file "$tree/usr/share/doc/baton-tools/examples/cluster.toml"
    cp -r "$root"/config/{prometheus,grafana} "$tree/usr/share/doc/baton-tools/examples"
    needs "$tree"
    finish baton-tools "$tree" "$needed"
}

# One folder with bin, lib/baton/nixl, share and etc, as below a prefix: unpacked anywhere, it runs from there.
tarball() {
    need zstd tar strip
    local name=baton-$version-x86_64-linux tree program
    tree=$work/$name
    for program in baton-router baton-workerd baton-up baton-client; do
        program "$tree" "$program"
    done
    nixl "$tree"
    install -d "$tree/etc/baton" "$tree/share/doc/baton"
    cp -r "$root"/config/. "$tree/etc/baton"
    cluster_file "$tree/etc/baton/cluster.toml"
    cp "$root"/{LICENSE,README.md,CHANGELOG.md} "$packages/nixl.copyright" "$tree/share/doc/baton"
    cp "$work/notices" "$tree/share/doc/baton/third-party-licences"
    [ ! -e "$root/target/book/index.html" ] || cp -r "$root/target/book" "$tree/share/doc/baton/html"
    find "$tree" -type d -exec chmod 755 {} +
    tar -C "$work" --sort=name --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner -cf - "$name" |
        zstd -q -T0 "-$level" -f -o "$out/$name.tar.zst"
}

install -d "$out"
case $what in
deb) deb ;;
tarball) tarball ;;
*) fail "usage: build.sh deb|tarball" ;;
esac
(cd "$out" && sha256sum -- *.deb *.tar.zst 2>/dev/null >SHA256SUMS || true)
(cd "$out" && du -h -- *.deb *.tar.zst 2>/dev/null || true)
