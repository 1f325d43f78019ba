"""Whether memory of GPUs can be reached from this machine at all, before it is used.

Read from the machine's files; no device is opened, so what is let through here may
still be refused when one is.
"""

from __future__ import annotations

from kvxfer.errors import DeviceUnavailableError
from kvxfer.options import Options
from kvxfer.sysfs import Sysfs

__all__ = ["INSTEAD", "check_gpu_memory"]

#: What to use where GPU memory cannot be reached.
INSTEAD = (
    "Use a machine with a NIC, or move blocks through a cache in host memory: "
    "KVCache.allocate and a copy on either side."
)

_SOFTWARE = ("soft", "soft0", "null", "null0")


def check_gpu_memory(options: Options | None = None) -> None:
    """Refuse GPU memory where only the software device could move it.

    Args:
      options: ``device``, ``sysfs`` and ``ibverbs_path`` are used; None: those in
        force.

    Raises:
      DeviceUnavailableError: The reason, and what to use instead.
      OptionError: What is configured cannot be.
    """
    if options is None:
        options = Options.load()
    if options.device in _SOFTWARE:
        why = f"the option device is {options.device!r}"
    elif Sysfs.at(options.sysfs).devices():
        return
    elif options.ibverbs_path != Options().ibverbs_path:
        return  # Another library may know devices that the kernel does not.
    else:
        why = "this machine has no RDMA device"
    raise DeviceUnavailableError(
        "the cache lies in GPU memory, which the software device cannot reach since it "
        f"moves bytes by the processor, and {why}",
        hint=INSTEAD,
    )
