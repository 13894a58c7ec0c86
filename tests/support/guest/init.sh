#!/bin/bash
# The first process of the test guest.  $1 is the run directory, which holds `env`: bash arrays and variables that
# boot.py writes (CWD, COMMAND, ENVIRON, KEEP, RW, MODULES, MODULE_ROOT, CPUS).
# The root is the host's, read-only; only tmpfs and the directories in RW are writable.
# The control port carries lines: `up`, `beat` and `exit STATUS` to the host, `dump` from it.
# After `guest: ended` or `guest: dumped` in the kernel log, no more output of the command or the dump follows.
set -u
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
# shellcheck source=/dev/null
source "$1/env"

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
echo 7 > /proc/sys/kernel/printk
echo 1 > /proc/sys/kernel/sysrq
# On a busy host a CPU of the guest stands still for seconds, and a task waits for minutes, without a fault of the kernel.
for setting in watchdog_thresh=60 hung_task_timeout_secs=900; do
    if [ -e "/proc/sys/kernel/${setting%=*}" ]; then echo "${setting#*=}" > "/proc/sys/kernel/${setting%=*}"; fi
done
mkdir -p /dev/pts /dev/shm
mount -t devpts -o ptmxmode=0666 devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
ln -s /proc/self/fd /dev/fd
for i in 0:stdin 1:stdout 2:stderr; do ln -s "/proc/self/fd/${i%:*}" "/dev/${i#*:}"; done
echo ublkpool-guest > /proc/sys/kernel/hostname
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t debugfs debugfs /sys/kernel/debug 2>/dev/null
mount -t tracefs tracefs /sys/kernel/tracing 2>/dev/null

for port in /sys/class/virtio-ports/*; do
    case $(< "$port/name") in
        control) exec 3<> "/dev/${port##*/}" ;;
        output) exec 4> "/dev/${port##*/}" ;;
    esac
done

# /run is mounted first: the host's directories that the other tmpfs hide stay reachable in it.
mount -t tmpfs -o mode=0755 tmpfs /run
mkdir -p /run/lock /run/host-root
mount --bind / /run/host-root
for directory in /tmp /var/tmp; do mount -t tmpfs -o mode=1777 tmpfs "$directory"; done
for path in "${KEEP[@]}"; do
    if [ ! -e "$path" ]; then mkdir -p "$path"; mount --bind "/run/host-root$path" "$path"; fi
done
for i in "${!RW[@]}"; do
    mkdir -p "${RW[$i]}"
    mount -t virtiofs "rw$i" "${RW[$i]}"
done
ip link set lo up 2>/dev/null || echo "guest: lo stays down: no ip command" >&4

# The kernel, too, loads modules through this program, such as the file system of a mount.
mkdir /run/guest
printf '#!/bin/sh\nexec /sbin/modprobe -d "%s" "$@"\n' "$MODULE_ROOT" > /run/guest/modprobe
chmod 755 /run/guest/modprobe
echo /run/guest/modprobe > /proc/sys/kernel/modprobe
if [ -d /lib/modules ]; then mount --bind "$MODULE_ROOT/lib/modules" /lib/modules; fi
for module in "${MODULES[@]}"; do
    /run/guest/modprobe "$module" >&4 2>&1 || echo "guest: module $module could not be loaded" >&4
done

dump() {
    echo w > /proc/sysrq-trigger
    ps -eo pid,ppid,stat,wchan:28,args >&4
    echo "guest: dumped" > /dev/kmsg
}

agent() {
    while :; do
        line=
        if read -r -t 5 -u 3 line; then
            if [ "$line" = dump ]; then dump; fi
        elif [ $? -gt 128 ]; then
            echo beat >&3
        else
            sleep 5
            echo beat >&3
        fi
    done
}

echo "up $(uname -r) $(nproc) $(cut -d' ' -f1 /proc/uptime)" >&3
agent &

# The output port cuts long writes short, which few programs handle, so cat writes to it.
exec 5> >(exec cat >&4)
relay=$!
cd "$CWD" || echo "guest: no $CWD" >&4
env -i "${ENVIRON[@]}" "${COMMAND[@]}" < /dev/null >&5 2>&1 3>&- 4>&- 5>&-
status=$?
exec 5>&-
# A process left behind by the command may hold the relay's input open.
for _ in {1..20}; do kill -0 $relay 2>/dev/null || break; sleep 0.1; done
sync
# All output is written.  The host ends the machine once it has read both lines; 7.x writes its console late.
echo "guest: ended" > /dev/kmsg
echo "exit $status" >&3
sleep infinity
