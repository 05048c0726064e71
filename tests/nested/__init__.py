# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Nested hypervisors: whole Debian machines with systemd, libvirt, QEMU and AppArmor, each one QEMU process."""
