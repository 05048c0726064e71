# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.images import sealing


def test_no_password_lets_anybody_in_and_what_was_locked_stays_locked() -> None:
    before = b"root:$6$hash:1:0:99999:7:::\ndaemon:*:1::::::\nbob:!$6$hash:1::::::\neve::1::::::\n# note\n\nodd\n"
    after = sealing.without_passwords(before)
    assert after == b"root:*:1:0:99999:7:::\ndaemon:*:1::::::\nbob:!:1::::::\neve:*:1::::::\n# note\n\nodd\n"
    assert sealing.without_passwords(after) == after


def test_what_was_not_sealed_is_named() -> None:
    assert "SSH host keys" in sealing.unsealed(())
    assert "SSH host keys" not in sealing.unsealed(("ssh-hostkeys",))
    assert sealing.unsealed(sealing.OPERATIONS).startswith("users' keys")


def test_a_literal_path_is_no_pattern() -> None:
    assert sealing.literal("/var/log/a*b[c]") == "/var/log/a\\*b\\[c\\]"
