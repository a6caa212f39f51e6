"""Where the processes of a run are: what started them, and the address of process 0."""

import contextlib
import glob
import ipaddress
import os
import re
import socket
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from refine_jax.base.errors import ConfigError
from refine_jax.base.files import short

MOST_PROCESSES = 1 << 16
_GOOGLE = "0x1ae0"  # PCI vendor of TPUs
_METADATA = (
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
    "worker-network-endpoints"
)
_ADDRESS = re.compile(r"(?:(?P<host>[\w.-]+)|\[(?P<ip6>[0-9A-Fa-f:.]+)\]):(?P<port>[0-9]{1,5})")


def check_address(
    mode: str, coordinator: str | None, num_processes: int | None, process_id: int | None
) -> bool:
    """Tell whether the processes are named; raises ConfigError for incomplete or wrong names."""
    named = {
        "--coordinator": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [name for name, value in named.items() if value is None]
    if len(missing) == len(named):
        return False
    got = ", ".join(f"{name}={value}" for name, value in named.items() if value is not None)
    if missing:
        raise ConfigError(
            "--coordinator=HOST:PORT, --num_processes=P and --process_id=I belong together. "
            f"Missing: {', '.join(missing)}. Got: {got}."
        )
    if mode == "off":
        raise ConfigError(f"--distributed=off excludes {', '.join(named)}. Got: {got}.")
    split_address(coordinator)
    if not (1 <= num_processes <= MOST_PROCESSES and 0 <= process_id < num_processes):
        raise ConfigError(
            "--process_id must be one of 0 .. num_processes - 1, another one for each process, and "
            f"--num_processes at most {MOST_PROCESSES:,}. Got: {got}."
        )
    return True


def split_address(address: str) -> tuple[str, int]:
    """Split HOST:PORT into (host, port), where an address of IPv6 is in brackets, [::1]:8476.

    Raises ConfigError: it is none.
    """
    match = _ADDRESS.fullmatch(address)
    if not match or not 0 < int(match["port"]) < 1 << 16:
        raise ConfigError(
            f"--coordinator must be HOST:PORT of process 0. Got: {short(address)}. Ports are 1 to "
            "65535; an IPv6 address is in brackets, as [::1]:8476."
        )
    return match["ip6"] or match["host"], int(match["port"])


def resolve(address: str) -> list[str]:
    """Look up the IP addresses of the host of HOST:PORT.

    Raises ConfigError: there is no such host.
    """
    host, port = split_address(address)
    try:
        resolved = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        said = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"--coordinator={address}: the host {host!r} of process 0 is not known here ({said}). "
            "Name it as this machine can find it, or by its IP address."
        ) from None
    return list(dict.fromkeys(entry[4][0].partition("%")[0] for entry in resolved))


def is_local(coordinator: str) -> bool:
    """Tell whether HOST:PORT names the loopback interface, whatever the machine.

    The name of a machine may mean that to the machine itself and to no other.
    """
    host, _ = split_address(coordinator)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind_address(coordinator: str, addresses: Sequence[str]) -> str | None:
    """Choose where process 0 listens: on the named address alone, if it is this machine's.

    None: jax's default, all addresses of this machine, or what JAX_COORDINATOR_BIND_ADDRESS says.
    So it must be where others know the machine by a name that is not its own (NAT), or that means
    the machine itself to it, as Debian's 127.0.1.1 does.

    Raises ConfigError: another program listens there.
    """
    if os.environ.get("JAX_COORDINATOR_BIND_ADDRESS"):
        return None
    host, port = split_address(coordinator)
    loopback = any(ipaddress.ip_address(address).is_loopback for address in addresses)
    mine = all(_can_bind(address, 0) for address in addresses)
    if mine and (is_local(coordinator) or not loopback):
        # Other processes may be told another address of the same name.
        chosen = addresses[0] if len(addresses) == 1 else host
        taken = [address for address in addresses if not _can_bind(address, port)]
    else:
        chosen = None
        taken = [] if _can_bind("0.0.0.0", port) else [host]
        print(
            f"note: {host} may mean another address to other machines: process 0 listens on port "
            f"{port} of all its addresses. Anyone who can reach that port can control the run.",
            file=sys.stderr,
            flush=True,
        )
    if taken:
        raise ConfigError(
            f"--coordinator={coordinator}: process 0 cannot listen on port {port} of {taken[0]}: "
            "another program does, or this user may not. Choose another port, on all processes."
        )
    if chosen is None:
        return None
    return f"[{chosen}]:{port}" if ":" in chosen else f"{chosen}:{port}"


def _can_bind(address: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            # A port whose last connections are being closed counts as free, as in gRPC.
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((address, port))
    except OSError:
        return False
    return True


def find_cluster(environment: Mapping[str, str]) -> str | None:
    """Find out what started several processes; None if nothing did.

    Only signs that stand for several processes count: a single task of SLURM, a TPU host alone and
    a notebook on Kubernetes are one process, and nothing is asked over a network but by a machine
    with TPUs.
    """
    if _number(environment, "OMPI_COMM_WORLD_SIZE") > 1:
        return "Open MPI"
    # The numbers are those of the step: a batch script without srun is one process of its job.
    if _number(environment, "SLURM_STEP_NUM_TASKS") > 1 and "SLURM_PROCID" in environment:
        return "SLURM"
    if "tpu" not in (environment.get("JAX_PLATFORMS") or "tpu") or not _has_tpu():
        return None
    if _number(environment, "MEGASCALE_NUM_SLICES") > 1:
        return "TPU slices"
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if environment.get(name):
            return "TPU pod" if "," in environment[name] else None
    if environment.get("TPU_PROCESS_ADDRESSES_PATH"):
        return "TPU pod"
    if "TPU_SKIP_MDS_QUERY" in environment:
        return None
    return "TPU pod" if "," in _ask_metadata() else None


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    return int(value) if value.isdigit() else 0


def _has_tpu() -> bool:
    for path in glob.glob("/sys/bus/pci/devices/*/vendor"):
        with contextlib.suppress(OSError):
            if Path(path).read_text().strip() == _GOOGLE:
                return True
    return False


def _ask_metadata() -> str:
    """Ask for the workers of this TPU VM's slice, joined by commas; empty without an answer."""
    request = urllib.request.Request(_METADATA, headers={"Metadata-Flavor": "Google"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with contextlib.suppress(OSError), opener.open(request, timeout=5) as answer:
        return answer.read().decode()
    return ""
