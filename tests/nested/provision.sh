#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
#
# Turns a fresh Debian root file system into the nested hypervisor. mmdebstrap calls it as a customize hook, outside
# the chroot, with the root directory as $1; VMK_AUTHORIZED_KEY is the public key of the cache.
set -eu
root=$1

echo vmk-l1 >"$root/etc/hostname"
printf '127.0.0.1 localhost\n::1 localhost\n' >"$root/etc/hosts"
# There is no name server to wait for; mmdebstrap copied the one of the computer that builds.
rm -f "$root/etc/resolv.conf"
echo '/dev/vda / ext4 noatime,noinit_itable 0 0' >"$root/etc/fstab"

# The address of QEMU's user-mode network is always the same: no DHCP client to wait for.
cat >"$root/etc/systemd/network/eth0.network" <<'NETWORK'
[Match]
Name=eth0
[Network]
Address=10.0.2.15/24
Gateway=10.0.2.2
LinkLocalAddressing=no
NETWORK

# operator: may do nothing but sudo. observer: may use libvirt, but is no administrator.
# (Debian has a group of that name, without rights.)
chroot "$root" useradd --create-home --shell /bin/bash --gid operator operator
chroot "$root" useradd --create-home --shell /bin/bash --groups libvirt observer
echo 'operator ALL=(ALL:ALL) NOPASSWD: ALL' >"$root/etc/sudoers.d/operator"
chmod 0440 "$root/etc/sudoers.d/operator"
for home in root home/operator home/observer; do
    install -d -m 0700 "$root/$home/.ssh"
    echo "$VMK_AUTHORIZED_KEY" >"$root/$home/.ssh/authorized_keys"
    chmod 0600 "$root/$home/.ssh/authorized_keys"
done
chroot "$root" chown -R operator: /home/operator/.ssh
chroot "$root" chown -R observer: /home/observer/.ssh

# A manager of units for each user stays, instead of being started anew for each login: an emulated CPU needs seconds for that.
install -d "$root/var/lib/systemd/linger"
touch "$root/var/lib/systemd/linger/root" "$root/var/lib/systemd/linger/operator"

cat >"$root/etc/ssh/sshd_config.d/nested.conf" <<'SSHD'
UseDNS no
PasswordAuthentication no
SSHD

# The initramfs needs the disk and nothing else: the smaller it is, the sooner an emulated CPU has unpacked it.
sed -i 's/^MODULES=.*/MODULES=list/' "$root/etc/initramfs-tools/initramfs.conf"
printf 'virtio_pci\nvirtio_blk\n' >"$root/etc/initramfs-tools/modules"
chroot "$root" update-initramfs -u -k all

chroot "$root" systemctl enable systemd-networkd.service ssh.service libvirtd.socket apparmor.service
# Nothing in the tests uses these, and each costs seconds where the CPU is emulated.
chroot "$root" systemctl mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
    e2scrub_reap.service fstrim.timer getty@tty1.service systemd-networkd-wait-online.service \
    systemd-timesyncd.service systemd-pstore.service
