# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Nested hypervisors: whole Debian machines with libvirt, QEMU and AppArmor, each a QEMU process.

``image`` builds and caches the machine's disk, ``accelerator`` finds out whether KVM can be used, ``machine`` starts
and destroys machines, and ``python3 -m tests.nested`` does so for molecule's create and destroy playbooks.
"""
