"""Check that this process is connected to the Ray cluster at a requested address."""

from __future__ import annotations

import ipaddress
import socket
from contextlib import suppress
from typing import Any

import ray

from gmm_dist.errors import Option, UserError

HERE = "local"
"""The address that has Ray start on this machine."""


def require_same_cluster(address: str | None) -> None:
    """Raise UserError if this process is connected to another cluster than the one at `address`."""
    if address is None or address == "auto":
        return
    client = ray.util.client.ray
    if client.is_connected():
        # The client server's port is not that of the cluster: only hosts are compared.
        here = str(client.get_context().client_worker._conn_str)
        is_same = _hosts(address) & _hosts(here) != set()
    else:
        here = str(ray.get_runtime_context().gcs_address)
        node: Any = ray._private.worker._global_node
        is_same = node.is_head() if address == HERE else _is_at(address, here)
    if not is_same:
        raise UserError(
            f"is {address}, but this process is connected to the Ray cluster at {here}",
            option="address",
            remedy="leave "
            + Option("address")
            + " out to use that one, or leave it first (ray.shutdown())",
        )


def _is_at(address: str, here: str) -> bool:
    """Say whether an address leads to the cluster whose head listens at `here`."""
    if not _hosts(address) & _hosts(here):
        return False
    is_client = address.startswith("ray://")  # another port leads to the same cluster
    return is_client or _parted(address)[1] == _parted(here)[1]


def _hosts(address: str) -> set[str]:
    """Return the IP addresses of the host that an address names, and its name."""
    host, _ = _parted(address)
    ips: set[str] = set()
    with suppress(OSError):
        ips = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    if any(ipaddress.ip_address(ip).is_loopback for ip in ips):
        ips.add(str(ray.util.get_node_ip_address()))  # the address that Ray uses for this machine
    return ips | {host}


def _parted(address: str) -> tuple[str, str]:
    host, _, port = address.removeprefix("ray://").rstrip("/").rpartition(":")
    return host.strip("[]"), port
