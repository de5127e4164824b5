"""Which network interface leads to another host: gloo guesses wrong where the host name resolves to 127.0.0.1."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import sys

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")

_SIOCGIFADDR = 0x8915  # linux/sockios.h


def address_towards(host: str) -> str | None:
    """This host's address that packets to `host` (name or address) leave from; None if there is no telling."""
    try:
        family, _, _, _, place = socket.getaddrinfo(host, 9, socket.AF_INET, socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(place)  # sends nothing: only asks for the route
            address: str = probe.getsockname()[0]
            return address
    except OSError:
        return None


def towards(host: str) -> str | None:
    """The interface with that address; None if there is no telling."""
    address = address_towards(host)
    return None if address is None else _holding(address)


def use(interface: str | None, head: str | None) -> None:
    """Sets it for gloo and nccl in this process: `interface`, or the one towards `head`; what was set already stays."""
    chosen = interface or (towards(head) if head else None)
    for name in VARIABLES:
        if interface is not None:
            os.environ[name] = interface
        elif chosen is not None:
            os.environ.setdefault(name, chosen)


def _holding(address: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no address
                request = struct.pack("256s", name.encode()[:15])
                if socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24]) == address:
                    return name
    return None


def is_here(host: str) -> bool:
    """Whether `host` is this machine: packets to it would leave from the very address they go to."""
    try:
        return address_towards(host) == socket.gethostbyname(host)
    except OSError:
        return False


if __name__ == "__main__":  # for scripts: python -m distrobust.train.interface HOST -> "ADDRESS true", if it is here
    own = address_towards(sys.argv[1]) or sys.exit(f"{sys.argv[1]}: no route to it, or no such host")
    print(own, str(is_here(sys.argv[1])).lower())
