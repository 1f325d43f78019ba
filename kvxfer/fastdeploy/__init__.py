"""FastDeploy's ``kvcache_transfer`` over kvxfer's public API.

The module ``rdma_comm`` of the same distribution gives it out under its usual name.
"""

from kvxfer.fastdeploy.communicator import RDMACommunicator
from kvxfer.fastdeploy.status import ConnectStatus

__all__ = ["ConnectStatus", "RDMACommunicator"]
