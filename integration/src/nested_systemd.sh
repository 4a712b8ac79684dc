#!/bin/sh
# A real systemd that is not PID 1 of the machine: `nested_systemd.sh FOLDER`, as root. It sees the machine's files through a layer whose
# changes stay in memory, has its own PIDs, network (loopback), /dev, /run, /tmp and enabled units, and FOLDER/shared as /mnt/shared.
# FOLDER/pid holds its PID as the caller sees it. It ends with this script, and leaves nothing.
set -e
folder=$1
case ${2:-control-group} in
control-group)
    # A control group of its own, taken away afterwards: systemd makes its own below it.
    exec unshare --mount setpriv --pdeathsig TERM sh "$0" "$folder" namespaces
    ;;
namespaces)
    mount --make-rprivate /
    mkdir -p "$folder/cgroup" "$folder/root" "$folder/shared"
    mount -t cgroup2 cgroup2 "$folder/cgroup"
    group=$folder/cgroup/baton-test-$$
    mkdir "$group"
    echo $$ >"$group/cgroup.procs"
    setpriv --pdeathsig KILL unshare --pid --kill-child --fork --mount --uts --ipc --cgroup --net sh "$0" "$folder" boot &
    trap 'kill -KILL "$(cat "$folder/pid")" || kill -KILL $!' TERM
    wait $! || wait $! || true
    echo $$ >"$folder/cgroup/cgroup.procs"
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        # What was killed may need a moment.
        find "$group" -depth -type d -exec rmdir {} + 2>/dev/null && break
        sleep 0.2
    done
    ;;
boot)
    mount -t tmpfs -o mode=755 baton-test "$folder/root"
    mkdir "$folder/root/upper" "$folder/root/work" "$folder/root/merged"
    mount -t overlay -o "lowerdir=/,upperdir=$folder/root/upper,workdir=$folder/root/work" baton-test "$folder/root/merged"
    # Still the machine's /proc: this shell, as the caller sees it.
    read -r pid rest </proc/self/stat
    echo "$pid" >"$folder/pid.new"
    mv "$folder/pid.new" "$folder/pid"
    cd "$folder/root/merged"
    mkdir -p mnt/shared
    mount --bind "$folder/shared" mnt/shared
    mount -t proc proc proc
    # The machine's settings are to be seen only.
    mount --bind proc/sys proc/sys
    mount -o remount,bind,ro proc/sys
    mount -t sysfs -o ro sysfs sys
    mountpoint -q sys/fs/cgroup || mount -t tmpfs tmpfs sys/fs/cgroup
    mount -t cgroup2 cgroup2 sys/fs/cgroup
    mount -t tmpfs -o mode=755 tmpfs dev
    for node in null zero full random urandom tty; do
        touch dev/$node
        mount --bind /dev/$node dev/$node
    done
    mkdir dev/shm dev/pts
    mount -t tmpfs tmpfs dev/shm
    mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
    ln -s pts/ptmx dev/ptmx
    ln -s /proc/self/fd dev/fd
    mount -t tmpfs tmpfs tmp
    mount -t tmpfs -o mode=755 tmpfs run
    # The machine's own services, disks and journal are none of its business.
    mount -t tmpfs -o mode=755 tmpfs etc/systemd/system
    for unit in systemd-modules-load systemd-remount-fs systemd-sysctl systemd-udevd; do
        ln -s /dev/null etc/systemd/system/$unit.service
    done
    ln -s /dev/null etc/systemd/system/systemd-journald-audit.socket
    : >etc/fstab
    : >etc/crypttab
    rm -rf var/log/journal usr/sbin/policy-rc.d
    # Nor does anybody read manual pages here: dpkg need not index all of them.
    rm -f var/lib/man-db/auto-update
    ip link set lo up
    mkdir old
    pivot_root . old
    umount -l /old
    rmdir /old
    exec env -i container=baton-test PATH=/usr/sbin:/usr/bin:/sbin:/bin \
        /lib/systemd/systemd --system --unit=basic.target --log-target=journal --show-status=no
    ;;
esac
