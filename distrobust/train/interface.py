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
_OUTSIDE = "198.51.100.1"  # nobody's (RFC 5737), so that the default route leads there


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


def own_address(head: str) -> str | None:
    """Where other hosts reach this one: the address towards `head`; None if there is no telling.

    On the head itself its name may lead to loopback (Debian has 127.0.1.1 for it): there that of the default route, if
    it has one.
    """
    address = address_towards(head)
    if address is None or not _is_loopback(address):
        return address
    return address_towards(_OUTSIDE) or address


def towards(head: str) -> str | None:
    """The interface with that address; None if there is no telling."""
    address = own_address(head)
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
    """Whether `host` is this machine: packets to it would leave from the very address they go to, or from loopback."""
    address = address_towards(host)
    try:
        return address is not None and (_is_loopback(address) or address == socket.gethostbyname(host))
    except OSError:
        return False


def _is_loopback(address: str) -> bool:
    return address.startswith("127.")


if __name__ == "__main__":  # for scripts: python -m distrobust.train.interface HEAD HOSTS -> "ADDRESS true", if here
    head, hosts = sys.argv[1:3]
    own = (address_towards if hosts == "1" else own_address)(head) or sys.exit(
        f"{head}: no route to it, or no such host"
    )
    print(own, str(is_here(head)).lower())
