"""Which devices this process uses, in order of preference, and why not the others.

What is named goes first: ``device``, then ``nics`` by ``gpu_index``. Otherwise all
that can be used are ranked: by the distance to the GPU, by NUMA node, by rate. The
software device is always there and comes last, unless ``require_rdma`` excludes it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvxfer import _verbs, gids
from kvxfer.errors import DeviceUnavailableError, OptionError
from kvxfer.gids import GID
from kvxfer.inventory import Inventory, take
from kvxfer.options import Options
from kvxfer.sysfs import GPU, Port, RDMADevice, Sysfs
from kvxfer.topology import Distance, Place, distance

_log = logging.getLogger("kvxfer.devices")

SOFTWARE_DEVICE = "soft0"
NULL_DEVICE = "null0"
#: What peers are told; devices of different kinds cannot reach each other.
KINDS = {"libibverbs": "rdma", "soft": "soft", "null": "null"}

_PORT = Port(1, "ACTIVE", "LinkUp")


@dataclass(frozen=True)
class DeviceSpec:
    """A device and port to open."""

    name: str
    provider: _verbs.Provider
    port_num: int = 1

    @property
    def label(self) -> str:
        """Its name for people and peers: with the port, unless that is the first."""
        return self.name if self.port_num == 1 else f"{self.name}:{self.port_num}"


@dataclass(frozen=True)
class Verdict:
    """What was decided about one port of one device.

    Attributes:
      spec: What would be opened.
      device: The device as it was found.
      port: The port as it was found.
      usable: Whether connections may go by it.
      chosen: It is the first that they go by.
      reason: Why, or why not.
      gid: The GID that connections leave from; None where there is none.
      distance: To the GPU; None where no GPU is known.
    """

    spec: DeviceSpec
    device: RDMADevice
    port: Port
    usable: bool
    reason: str
    chosen: bool = False
    gid: GID | None = None
    distance: Distance | None = None

    @property
    def is_software(self) -> bool:
        """Whether no NIC is behind it."""
        return self.spec.provider != "libibverbs"


def survey(options: Options) -> list[Verdict]:
    """Look at this machine and judge every port, those that are used first.

    Raises:
      DeviceUnavailableError: Nothing is left, or the device named by an option
        is not there or cannot be used; the message says why of each.
      OptionError: Options contradict each other.
    """
    verdicts = look(options)
    check(options, verdicts)
    named = options.gpu_index is not None or options.gpu_pci is not None
    if named and not verdicts[0].is_software:
        why = absent_gpu(Sysfs.at(options.sysfs).gpus(), options)
        if why:
            _log.warning("%s; %s is used", why, verdicts[0].spec.label)
    return verdicts


def look(options: Options, *, open_devices: bool = True) -> list[Verdict]:
    """Judge every port of this machine; as :func:`survey`, but nothing need be left.

    Args:
      open_devices: False reads sysfs only, as for a copy of another machine's.

    Raises:
      OptionError: Options contradict each other.
    """
    if options.device in ("soft", SOFTWARE_DEVICE):
        if options.require_rdma:
            raise OptionError(
                "device names the software device, but require_rdma refuses it"
            )
        return [_built_in(SOFTWARE_DEVICE, "named by the option device", chosen=True)]
    if options.device in ("null", NULL_DEVICE):
        # Only ever by name: it throws away what is written.
        if options.require_rdma:
            raise OptionError("device names the null device, which is no RDMA device")
        return [_built_in(NULL_DEVICE, "named by the option device", chosen=True)]
    return judge(take(options, open_devices=open_devices), options, _local(options))


def check(options: Options, verdicts: Sequence[Verdict]) -> None:
    """Raise if no device is left.

    Raises:
      DeviceUnavailableError: Names all that were rejected, and why.
    """
    if not any(verdict.usable for verdict in verdicts):
        raise DeviceUnavailableError(_nothing(options, verdicts))


def usable(options: Options) -> list[DeviceSpec]:
    """List what ``options`` permit this process to use, best first.

    Raises: as :func:`survey`.
    """
    verdicts = survey(options)
    for verdict in verdicts:
        log = _log.debug if verdict.usable else _log.info
        log("%s: %s", verdict.spec.label, verdict.reason)
    return [verdict.spec for verdict in verdicts if verdict.usable]


def _local(options: Options) -> Place:
    """Say where this process runs: on one NUMA node, or anywhere."""
    nodes = Sysfs.at(options.sysfs).cpu_nodes(set(os.sched_getaffinity(0)))
    return Place(numa_node=nodes.pop() if len(nodes) == 1 else None)


# -- the rules: no input or output from here on -----------------------------------


def judge(
    inventory: Inventory,
    options: Options,
    local: Place | None = None,
    visible: str | None = None,
) -> list[Verdict]:
    """Judge every port of an inventory, those that are used first.

    Args:
      local: Where the process runs.
      visible: What ``CUDA_VISIBLE_DEVICES`` says; None: as the environment has it.
    """
    visible = _visible(visible)
    gpu = find_gpu(inventory, options, visible)
    absent = absent_gpu(inventory.gpus, options, visible)
    found = [
        _examine(device, port, inventory, options, gpu)
        for device in inventory.devices
        for port in device.ports or (Port(1),)
    ]
    wanted = _named(options)
    if wanted:
        return _explicit(found, wanted, options)
    ranked = _ranked([v for v in found if v.usable], gpu, local or Place(), options)
    if ranked and absent:
        ranked[0] = replace(ranked[0], reason=f"{ranked[0].reason}; {absent}")
    verdicts = ranked + [v for v in found if not v.usable]
    n_used = sum(v.usable for v in verdicts)
    if n_used:
        reason = "for peers that no NIC reaches"
    elif verdicts:
        reason = "no NIC can be used"
    else:
        reason = "this machine has no RDMA device"
    software = _built_in(SOFTWARE_DEVICE, reason, chosen=not n_used)
    if refusal := _refuses_software(inventory, options, found):
        software = replace(software, usable=False, chosen=False, reason=refusal)
    return [*verdicts[:n_used], software, *verdicts[n_used:]]


def _refuses_software(
    inventory: Inventory, options: Options, nics: list[Verdict]
) -> str:
    """Say what keeps the software device out; empty if nothing does."""
    if options.require_rdma:
        return "require_rdma refuses it"
    if options.gid_index is None or any(nic.usable for nic in nics):
        return ""
    free = replace(options, gid_index=None)
    if any(_examine(v.device, v.port, inventory, free, None).usable for v in nics):
        # What is named and cannot be used is replaced by nothing else.
        return f"gid_index is {options.gid_index}, an entry that no NIC here can use"
    return ""


def find_gpu(inventory: Inventory, options: Options, visible: str = "") -> Place | None:
    """Return where the GPU of the options is; None if they name none that is here.

    ``gpu_index`` counts as CUDA does with ``CUDA_DEVICE_ORDER=PCI_BUS_ID``: among
    the GPUs that ``CUDA_VISIBLE_DEVICES`` (``visible``) names, if those are numbers.
    """
    if options.gpu_pci is not None:
        wanted = options.gpu_pci.lower()
        wanted = wanted if wanted.count(":") == 2 else f"0000:{wanted}"
        # CUDA writes domains of eight digits, sysfs of four.
        domain, _, rest = wanted.partition(":")
        wanted = f"{int(domain, 16):04x}:{rest}"
        return next(
            (g.place for g in inventory.gpus if g.place.address == wanted), None
        )
    if options.gpu_index is None:
        return None
    index = options.gpu_index
    shown = _shown(visible)
    if shown:
        if not all(word.isdecimal() for word in shown) or index >= len(shown):
            return None
        index = int(shown[index])
    return next((gpu.place for gpu in inventory.gpus if gpu.index == index), None)


def absent_gpu(
    gpus: Sequence[GPU], options: Options, visible: str | None = None
) -> str:
    """Say that the GPU which the options name is not among those that are here.

    Empty if it is, or they name none, or it cannot be told: no GPU is listed, or
    CUDA's are not named by numbers. All the same a device is chosen.
    """
    shown = _shown(_visible(visible))
    here = find_gpu(Inventory(gpus=tuple(gpus)), options, ",".join(shown))
    if not gpus or here is not None:
        return ""
    if options.gpu_pci is not None:
        there = ", ".join(gpu.place.address for gpu in gpus)
        return f"GPU {options.gpu_pci} is not here: there are {there}"
    index = options.gpu_index
    if index is None or not all(word.isdecimal() for word in shown):
        return ""
    if shown and index >= len(shown):
        names = ",".join(shown)
        return f"GPU {index} is not here: CUDA_VISIBLE_DEVICES={names} is {len(shown)}"
    which = f"{shown[index]}, by CUDA_VISIBLE_DEVICES," if shown else f"{index}"
    return f"GPU {which} is not here: there are {len(gpus)}"


def _visible(given: str | None) -> str:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "") if given is None else given


def _shown(visible: str) -> list[str]:
    return [word.strip() for word in visible.split(",") if word.strip()]


def _named(options: Options) -> str:
    """Return the device that the options name, with its port if they name one."""
    if options.device != "auto":
        return options.device
    names = options.nic_names
    return names[(options.gpu_index or 0) % len(names)] if names else ""


def _examine(
    device: RDMADevice,
    port: Port,
    inventory: Inventory,
    options: Options,
    gpu: Place | None,
) -> Verdict:
    """Say whether a port can be used at all, and with which GID."""
    spec = DeviceSpec(device.name, "libibverbs", port.port_num)
    near = [options.socket_ifname] if options.socket_ifname else []
    why = inventory.problem or device.problem
    gid: GID | None = None
    if not why and port.state != "ACTIVE":
        why = f"the port is {port.state}" + (
            f" ({port.phys_state})" if port.phys_state else ""
        )
    if not why and port.link_layer == "infiniband" and not port.lid:
        why = "it has no LID: no subnet manager has seen it"
    if not why:
        try:
            gid = gids.choose(
                port.gids, port.link_layer, spec.label, options.gid_index, near
            )
        except DeviceUnavailableError as error:
            why = str(error)
    return Verdict(
        spec,
        device,
        port,
        usable=not why,
        reason=why,
        gid=gid,
        distance=None if gpu is None else distance(device.place, gpu),
    )


def _explicit(found: list[Verdict], wanted: str, options: Options) -> list[Verdict]:
    """Take the device that is named, and that one only."""
    name, _, port = wanted.partition(":")
    by = "device" if options.device != "auto" else "nics"
    verdicts: list[Verdict] = []
    for verdict in found:
        fits = verdict.spec.name == name and port in ("", str(verdict.spec.port_num))
        if fits and verdict.usable:
            fits = not any(v.chosen for v in verdicts)
            verdict = replace(
                verdict,
                usable=fits,
                chosen=fits,
                reason=f"named by the option {by}"
                if fits
                else f"the option {by} names no port, and an earlier one is active",
            )
        elif not fits:
            verdict = replace(
                verdict, usable=False, reason=f"the option {by} names {wanted}"
            )
        verdicts.append(verdict)
    return sorted(verdicts, key=lambda v: not v.usable)


@dataclass(frozen=True)
class _Merit:
    """What two usable ports are compared by, best first."""

    slow: bool
    distance: Distance
    other_node: bool
    rate_gbps: float

    @property
    def key(self) -> tuple[float, ...]:
        return (self.slow, self.distance, self.other_node, -self.rate_gbps)


def _ranked(
    found: list[Verdict], gpu: Place | None, local: Place, options: Options
) -> list[Verdict]:
    """Put usable ports in order, and say of each what decided."""
    best_rate = max((v.port.rate_gbps for v in found), default=0.0)
    home = local.numa_node if gpu is None else gpu.numa_node
    merits = {
        v.spec: _Merit(
            # A port for management, which must not carry a cache.
            slow=v.port.rate_gbps < best_rate / 2,
            distance=Distance.SYS if v.distance is None else v.distance,
            other_node=home is not None
            and v.device.place.numa_node not in (home, None),
            rate_gbps=v.port.rate_gbps,
        )
        for v in found
    }
    ordered = sorted(found, key=lambda v: merits[v.spec].key)
    if not ordered:
        return []
    first = merits[ordered[0].spec]
    equals = [v for v in ordered if merits[v.spec].key == first.key]
    turn = (options.gpu_index or 0) % len(equals)
    equals = [equals[turn], *equals[:turn], *equals[turn + 1 :]]
    ordered = equals + ordered[len(equals) :]
    winner = ordered[0]
    return [
        replace(
            winner,
            chosen=True,
            reason=_praise(winner, len(found), gpu is not None, len(equals), options),
        ),
        *(
            replace(
                v, usable=not merits[v.spec].slow, reason=_behind(v, winner, merits)
            )
            for v in ordered[1:]
        ),
    ]


def _praise(
    winner: Verdict, n_usable: int, has_gpu: bool, n_equals: int, options: Options
) -> str:
    words = []
    if has_gpu and winner.distance is not None:
        words.append(f"{winner.distance.name} from the GPU")
    if n_usable == 1:
        words.append("the only one that can be used")
    elif n_equals == 1:
        words.append("the best by distance, NUMA node and rate")
    elif options.gpu_index is None:
        words.append(f"the first of {n_equals} that are as good")
    else:
        words.append(f"one of {n_equals} that are as good, by gpu_index")
    return ", ".join(words)


def _behind(loser: Verdict, winner: Verdict, merits: dict[DeviceSpec, _Merit]) -> str:
    """Say what a usable port lost by."""
    ours, best, name = merits[loser.spec], merits[winner.spec], winner.spec.label
    if ours.slow:
        return (
            f"{ours.rate_gbps:g} Gb/s, {name} has {best.rate_gbps:g}: taken for a "
            "port for management; name it to use it"
        )
    if ours.distance != best.distance:
        return f"{ours.distance.name} from the GPU, {name} is {best.distance.name}"
    if ours.other_node != best.other_node:
        return f"on NUMA node {loser.device.place.numa_node}, unlike {name}"
    if ours.rate_gbps != best.rate_gbps:
        return f"{ours.rate_gbps:g} Gb/s, {name} has {best.rate_gbps:g}"
    return f"as good as {name}, which was taken"


def _built_in(name: str, reason: str, *, chosen: bool) -> Verdict:
    spec = DeviceSpec(name, "soft" if name == SOFTWARE_DEVICE else "null")
    device = RDMADevice(name, ports=(_PORT,))
    return Verdict(spec, device, _PORT, True, reason, chosen)


def _nothing(options: Options, verdicts: Sequence[Verdict]) -> str:
    """Say why no device is left."""
    wanted = _named(options)
    nics = [v for v in verdicts if not v.is_software]
    if not wanted:
        rows = "; ".join(f"{v.spec.label}: {v.reason}" for v in nics)
        if not options.require_rdma:
            return (
                f"gid_index is {options.gid_index} and no RDMA device can use that "
                f"entry: {rows}; without gid_index one is chosen, and device = soft "
                "takes the software device"
            )
        return "require_rdma is set and no RDMA device can be used: " + (
            rows or "there is none"
        )
    name, _, port = wanted.partition(":")
    by = "device" if options.device != "auto" else "nics"
    own = [v for v in nics if v.spec.name == name]
    if port:
        own = [v for v in own if v.spec.port_num == int(port)]
    if own:
        rows = "; ".join(f"{v.spec.label}: {v.reason}" for v in own)
        return f"{wanted}, which the option {by} names, cannot be used: {rows}"
    there = ", ".join(v.spec.label for v in nics) or "none"
    return f"no device {wanted!r}, which the option {by} names; there are: {there}"
