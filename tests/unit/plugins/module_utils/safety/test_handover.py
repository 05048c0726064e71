# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import threading

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import VmkeeperError
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety.handover import Offer, receive

CONFIDENTIAL = {"passphrase": "päss phrase" * 9000}  # more than a socket buffers


def test_it_is_given_once_and_the_socket_is_gone_afterwards(tmp_path):
    path = str(tmp_path / "handover")
    received = []
    with Offer(path, CONFIDENTIAL) as offer:
        offer.serve()  # nobody has asked yet
        worker = threading.Thread(target=lambda: received.append(receive(path)))
        worker.start()
        while worker.is_alive():
            offer.serve()
    assert received == [CONFIDENTIAL]
    assert list(tmp_path.iterdir()) == []


def test_a_worker_whose_task_is_gone_says_so(tmp_path):
    with pytest.raises(VmkeeperError, match="did not reach the worker"):
        receive(str(tmp_path / "handover"))
