# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""A hypervisor of a test's own: private libvirtd, tiny real guests, evidence from images at rest."""

from __future__ import annotations
