"""Where the ranks of a group meet: a store on one of their machines."""

from __future__ import annotations

import socket
from datetime import timedelta

from torch.distributed import TCPStore


def open_rendezvous(host: str, world_size: int, timeout: timedelta) -> tuple[TCPStore, int]:
    """Open a store for others to join, on a port that the system picks.

    Args:
        host: this machine's address; no other one is listened on.
        world_size: ranks that will join, this one included.
        timeout: of a wait for one of them.

    Returns:
        The store, which lasts as long as it is held, and its port.
    """
    # Our own listening socket: TCPStore's would listen on every interface of the machine.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.bind((host, 0))
    listener.listen()
    port = int(listener.getsockname()[1])
    store = TCPStore(
        host,
        port,
        world_size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, port


def join_rendezvous(host: str, port: int, world_size: int, timeout: timedelta) -> TCPStore:
    """Join the store that another rank has opened.

    Args:
        host: of ``open_rendezvous``.
        port: which it returned.
        world_size: ranks in all.
        timeout: of a wait for one of them.
    """
    return TCPStore(host, port, world_size, is_master=False, timeout=timeout)
