"""What the tests on a device of libibverbs share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def device(
    rdma_device: str, gid_index: int | None, monkeypatch: pytest.MonkeyPatch
) -> str:
    """Have every client and server of the test, and every process, use the device.

    A peer that is gone is noticed after 67 ms seven times, as far as the device
    notices it.
    """
    monkeypatch.setenv("KVXFER_DEVICE", rdma_device)
    monkeypatch.setenv("KVXFER_IB_TIMEOUT", "14")
    if gid_index is not None:
        monkeypatch.setenv("KVXFER_GID_INDEX", str(gid_index))
    return rdma_device
