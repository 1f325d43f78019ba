"""What any device must do: the contract suite.

Every check goes through the public classes of ``kvxfer._verbs`` alone, so the
same files judge the software device over each of its wires, Soft-RoCE and real
NICs. Where devices are known to differ, a check accepts each known answer and
says so. ``tests/test_device_contract.py`` runs it.
"""

from __future__ import annotations

from tests.contract_failures import DeadPeers, Errors
from tests.contract_queues import Events, States
from tests.contract_traffic import Messages, Transfers


class DeviceContract(Transfers, Messages, Errors, DeadPeers, States, Events):
    """All of it. A subclass gives the fixture ``rig``, a :class:`Rig`."""
