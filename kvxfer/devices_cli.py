"""``kvxfer devices``: what there is, what is chosen, and why not the others."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from kvxfer import command, devices, gids
from kvxfer.devices import Verdict
from kvxfer.errors import DeviceUnavailableError, OptionError
from kvxfer.options import Options

HEADERS = (
    *("", "device", "state", "link", "Gb/s", "MTU", "NUMA", "PCI"),
    *("netdev", "GID", "why"),
)
GID_HEADERS = ("device", "index", "GID", "type", "netdev", "why")


def row(verdict: Verdict) -> list[str]:
    """Put a verdict into a row of the table."""
    port, place = verdict.port, verdict.device.place
    if verdict.gid is None:
        gid = f"LID {port.lid}" if port.lid else ""
    elif port.link_layer == "infiniband":
        gid = f"LID {port.lid}, {verdict.gid.text}"
    else:
        gid = f"{verdict.gid.index}: {verdict.gid.text} {verdict.gid.gid_type}".rstrip()
    return [
        "*" if verdict.chosen else "+" if verdict.usable else "-",
        verdict.spec.label,
        port.state,
        "software" if verdict.is_software else port.link_layer,
        f"{port.rate_gbps:g}" if port.rate_gbps else "",
        _mtu(verdict),
        "" if place.numa_node is None else str(place.numa_node),
        place.address,
        port.netdev,
        gid,
        verdict.reason,
    ]


def _mtu(verdict: Verdict) -> str:
    port = verdict.port
    if port.mtu_bytes:
        return str(port.mtu_bytes)
    return f"({port.netdev_mtu_bytes})" if port.netdev_mtu_bytes else ""


def gid_rows(verdict: Verdict) -> list[list[str]]:
    """Put a port's GID table into rows, with why each entry is not the one."""
    return [
        [
            verdict.spec.label,
            str(entry.index),
            entry.text,
            entry.gid_type,
            entry.netdev,
            why,
        ]
        for entry, why in judged_gids(verdict)
    ]


def judged_gids(verdict: Verdict) -> list[tuple[gids.GID, str]]:
    """Say of each entry of a port's GID table why it is chosen or not."""
    found = []
    for entry in verdict.port.gids:
        why = gids.problem(entry, verdict.port.link_layer)
        if not why and verdict.gid is not None:
            why = gids.explain(entry, verdict.gid)
        found.append((entry, why))
    return found


def as_json(verdict: Verdict) -> dict[str, Any]:
    """Put a verdict into an object of JSON."""
    port, device = verdict.port, verdict.device
    return {
        "device": verdict.spec.name,
        "port": verdict.spec.port_num,
        "provider": verdict.spec.provider,
        "chosen": verdict.chosen,
        "usable": verdict.usable,
        "reason": verdict.reason,
        "state": port.state,
        "phys_state": port.phys_state,
        "link_layer": port.link_layer,
        "rate_gbps": port.rate_gbps,
        "mtu_bytes": port.mtu_bytes,
        "netdev": port.netdev,
        "netdev_mtu_bytes": port.netdev_mtu_bytes,
        "lid": port.lid,
        "numa_node": device.place.numa_node,
        "pci_path": list(device.place.path),
        "driver": device.driver,
        "distance": None if verdict.distance is None else verdict.distance.name,
        "gid_index": None if verdict.gid is None else verdict.gid.index,
        "gids": [
            {
                "index": entry.index,
                "gid": entry.text,
                "type": entry.gid_type,
                "netdev": entry.netdev,
                "why": why,
            }
            for entry, why in judged_gids(verdict)
        ],
    }


@click.command()
@click.option("--device", help="auto, soft, or a NIC as NAME[:PORT].  [auto]")
@click.option("--nics", help="NICs to take in turn by --gpu-index, by commas.")
@click.option("--gpu-index", type=int, help="GPU that the cache is on.")
@click.option("--gpu-pci", help="PCI address of that GPU, such as 0000:1a:00.0.")
@click.option("--gid-index", type=int, help="Index in the port's GID table.")
@click.option("--require-rdma", is_flag=True, default=None, help="Refuse software.")
@click.option(
    "--sysfs",
    type=click.Path(exists=True, file_okay=False),
    help="Read this copy of a machine's /sys, and open no device.",
)
@click.option("--gids", "with_gids", is_flag=True, help="Show the GID tables too.")
@click.option("--json", "machine", is_flag=True, help="One JSON object a port.")
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="TOML file with a table [kvxfer].",
)
@click.option("-v", "--verbose", is_flag=True, help="Log everything to stderr.")
def main(
    config: Path | None,
    with_gids: bool,
    machine: bool,
    verbose: bool,
    **overrides: Any,
) -> None:
    """List the RDMA devices, which one is chosen, and why not the others.

    In front of each line: * this one is taken, + it may serve a peer that the first
    does not reach, - it is not used. An MTU in brackets is the netdev's, where the
    device itself was not asked. Exits with 1 if no device can be used.
    """
    options = command.load_options(config, **overrides)
    command.log(options, verbose=verbose)
    open_devices = overrides["sysfs"] is None
    sys.exit(
        show(options, open_devices=open_devices, with_gids=with_gids, machine=machine)
    )


def show(
    options: Options, *, open_devices: bool, with_gids: bool, machine: bool
) -> int:
    """Print the table; return the exit code.

    Args:
      open_devices: False where sysfs is another machine's. A sysfs that is merely
        somewhere else, as the option of that name says, is no reason not to.

    Raises:
      click.UsageError: Options contradict each other.
    """
    try:
        verdicts = devices.look(options, open_devices=open_devices)
    except OptionError as error:
        raise click.UsageError(str(error)) from error
    if machine:
        for verdict in verdicts:
            click.echo(json.dumps(as_json(verdict)))
    else:
        command.show_table(HEADERS, [row(verdict) for verdict in verdicts])
        if with_gids:
            click.echo()
            rows = [line for verdict in verdicts for line in gid_rows(verdict)]
            command.show_table(GID_HEADERS, rows)
    try:
        devices.check(options, verdicts)
    except DeviceUnavailableError as error:
        click.echo(f"kvxfer: {error}", err=True)
        return command.EXIT_FAILED
    return 0


if __name__ == "__main__":
    main(prog_name="kvxfer devices")
