"""Every benchmark option once: its type, default, choices and place in the output.

Order is that of a printed command. The names and defaults are nixlbench's, as
KVBench passes them on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kvxfer.kvbench.errors import suggestion

__all__ = ["BACKENDS", "COMPUTED", "OPTIONS", "SECRETS", "Option", "choice", "truth"]

Kind = Literal["text", "count", "truth"]

GIB = 1 << 30
SEGMENT_TYPES = ("DRAM", "VRAM", "FILE", "OBJ")
# UCX_MO is gone from NIXL; scripts still name it.
BACKENDS = (
    "UCX",
    "GDS",
    "GDS_MT",
    "POSIX",
    "GPUNETIO",
    "Mooncake",
    "HF3FS",
    "OBJ",
    "UCX_MO",
)


@dataclass(frozen=True, slots=True)
class Option:
    """One option of nixlbench that plan and profile take too."""

    name: str
    default: Any
    help: str
    kind: Kind = "text"
    choices: tuple[str, ...] = ()
    least: int = 1  # of a count
    spellings: tuple[str, ...] = ()  # further names
    from_seed: bool = True  # known since the first release


def _count(name: str, default: int, help: str, **more: Any) -> Option:
    return Option(name, default, help, "count", **more)


def _truth(name: str, help: str, **more: Any) -> Option:
    return Option(name, False, help, "truth", **more)


def _new(name: str, default: str, help: str, **more: Any) -> Option:
    return Option(name, default, help, from_seed=False, **more)


OPTIONS: tuple[Option, ...] = (
    _new("benchmark_group", "default", "Name that processes of one run share"),
    Option("backend", "UCX", "Communication backend", choices=BACKENDS),
    _truth("check_consistency", "Check the bytes that arrive"),
    Option("device_list", "all", "Comma-separated device names"),
    _truth("enable_pt", "Enable the progress thread"),
    _count("progress_threads", 0, "Progress threads", least=0, from_seed=False),
    Option("etcd_endpoints", "http://localhost:2379", "etcd URL for coordination"),
    _truth("storage_enable_direct", "Direct I/O for storage backends"),
    Option("filepath", "", "Folder of the files", spellings=("gds_filepath",)),
    _truth("enable_vmm", "VMM memory where DRAM is asked for"),
    _count("gds_batch_pool_size", 32, "GDS batches in the pool", from_seed=False),
    _count("gds_batch_limit", 128, "Requests in a GDS batch", from_seed=False),
    Option("initiator_seg_type", "DRAM", "Initiator's memory", choices=SEGMENT_TYPES),
    _count("max_batch_size", 1, "Largest batch"),
    _count("max_block_size", 64 << 20, "Largest block, bytes"),
    Option("mode", "SG", "Single or multi GPU a process", choices=("SG", "MG")),
    _count("num_files", 1, "Files", from_seed=False),
    _count("num_initiator_dev", 1, "Devices of the initiator"),
    _count("num_iter", 1000, "Iterations"),
    _count("num_target_dev", 1, "Devices of the target"),
    _count("num_threads", 1, "Threads of the benchmark"),
    Option("op_type", "WRITE", "Operation", choices=("READ", "WRITE")),
    _new("posix_api_type", "AIO", "POSIX API", choices=("AIO", "URING", "POSIXAIO")),
    Option("runtime_type", "ETCD", "Coordination", choices=("ETCD", "ASIO")),
    Option(
        "scheme",
        "pairwise",
        "Communication scheme",
        choices=("pairwise", "manytoone", "onetomany", "tp"),
    ),
    _count("start_batch_size", 1, "First batch"),
    _count("start_block_size", 4096, "First block, bytes"),
    Option("target_seg_type", "DRAM", "Target's memory", choices=SEGMENT_TYPES),
    _count("total_buffer_size", 8 * GIB, "Buffer, bytes"),
    _count("warmup_iter", 100, "Iterations before counting", least=0),
    Option("worker_type", "nixl", "Worker", choices=("nixl", "nvshmem")),
    _count("gds_mt_num_threads", 1, "Threads of GDS_MT", from_seed=False),
    _new("gpunetio_device_list", "0", "GPUs of GPUNETIO"),
    _new("gpunetio_oob_list", "", "Out-of-band interfaces of GPUNETIO"),
    _count("hf3fs_iopool_size", 64, "I/O pool of HF3FS", from_seed=False),
    _new("obj_access_key", "", "S3 access key"),
    _new("obj_secret_key", "", "S3 secret key"),
    _new("obj_session_token", "", "S3 session token"),
    _new("obj_bucket_name", "", "S3 bucket"),
    _new("obj_scheme", "http", "S3 scheme", choices=("http", "https")),
    _new("obj_region", "eu-central-1", "S3 region"),
    _truth("obj_use_virtual_addressing", "S3 virtual addressing", from_seed=False),
    _new("obj_endpoint_override", "", "S3 endpoint"),
    _new(
        "obj_req_checksum",
        "supported",
        "S3 checksums",
        choices=("supported", "required"),
    ),
    _new("obj_ca_bundle", "", "S3 certificate bundle"),
    _count("large_blk_iter_ftr", 16, "Fewer iterations over 1 MiB", from_seed=False),
    _truth("recreate_xfer", "Make the request anew each time", from_seed=False),
)

# What the plan sets by itself, whatever the command line says.
COMPUTED = ("start_block_size", "max_block_size", "start_batch_size", "max_batch_size")
SECRETS = ("obj_access_key", "obj_secret_key", "obj_session_token")

_TRUE = ("true", "1", "yes", "on", "t", "y")
_FALSE = ("false", "0", "no", "off", "f", "n")


def truth(text: str) -> bool:
    """Read ``true``, ``no``, ``1`` and the like.

    Raises:
      ValueError: It is none of those; the message says what would do.
    """
    word = text.strip().lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise ValueError(f"{text!r} is neither true nor false")


def choice(text: str, choices: Sequence[str]) -> str:
    """Return the one of ``choices`` that ``text`` is, whatever its case.

    Raises:
      ValueError: It is none; the message lists them.
    """
    for one in choices:
        if text.strip().lower() == one.lower():
            return one
    raise ValueError(
        f"{text!r}{suggestion(text, choices)} (one of {', '.join(choices)})"
    )
