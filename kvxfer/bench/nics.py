"""Who may stand beside a NIC, and how others than kvxfer are told to use it.

A run has one device. Where that is a NIC, who moves the blocks without it is refused:
copies of memory and a NIC's figures do not belong into one table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from kvxfer import devices
from kvxfer.bench.contenders import Contender
from kvxfer.bench.labels import is_software
from kvxfer.bench.runner import Settings
from kvxfer.devices import DeviceSpec
from kvxfer.errors import UsageError
from kvxfer.options import Options

CHOOSE_DEVICE = frozenset({"device", "nics", "gpu_index", "gpu_pci", "require_rdma"})
"""Options that choose the device; no contender has one of its own."""


def on_one_device(
    contenders: list[Contender], settings: Settings
) -> tuple[list[Contender], Settings]:
    """Have all of them run on the device that the options come to.

    Where that is a NIC, it is named from here on, so that nothing is measured on the
    software device in its place, and other engines are told to use it.

    Raises:
      UsageError: It is a NIC, and somebody would move the blocks without it.
      DeviceUnavailableError: The options leave no device.
    """
    options = Options.load(**settings.options)
    if is_software(options.device):
        return contenders, settings
    if options.device != "auto":  # whether it is there or not
        _refuse(contenders, f"--device {options.device}")
    nic = devices.usable(options)[0]
    if is_software(nic.name):
        return contenders, settings
    _refuse(contenders, f"{nic.label}, which --device auto takes here,")
    named = {**settings.options, "device": nic.label}
    return (
        [_told(contender, nic, options.sysfs) for contender in contenders],
        dataclasses.replace(settings, options=named),
    )


def _refuse(contenders: Iterable[Contender], nic: str) -> None:
    for contender in contenders:
        if contender.no_nic:
            raise UsageError(
                f"{nic} is a NIC: {contender.name} {contender.no_nic}; leave it out, "
                "or compare with it on --device soft"
            )


def _told(contender: Contender, nic: DeviceSpec, sysfs: str) -> Contender:
    """Return a contender that uses a NIC; ``sysfs`` describes it."""
    if not contender.is_peer:
        return contender  # kvxfer: by its options
    named = {"name": nic.name, "port": str(nic.port_num)}
    return dataclasses.replace(
        contender,
        what=contender.nic_what,
        environ={
            key: value.format(**named) for key, value in contender.nic_environ.items()
        },
        parameters={
            **contender.parameters,
            "nic": {"name": nic.name, "label": nic.label, "sysfs": sysfs},
        },
    )
