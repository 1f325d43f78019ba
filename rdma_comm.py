"""FastDeploy's module of this name, provided by kvxfer.

``from rdma_comm import RDMACommunicator``: see docs/fastdeploy.md of kvxfer.
"""

from kvxfer import __version__
from kvxfer.fastdeploy import ConnectStatus, RDMACommunicator

__all__ = ["ConnectStatus", "RDMACommunicator", "__version__"]
