"""At which of its addresses other machines reach this one.

It stands alone, without torch, because launch/torchrun.sh asks it before all else. Many systems give the machine's own
name the address 127.0.1.1, which torchrun and gloo would tell the other machines.
"""

import fcntl
import ipaddress
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path

SIOCGIFADDR = 0x8915
"""Linux's request for the IPv4 address of a network interface."""
ELSEWHERE = "192.0.2.1"
"""An address that no machine has (RFC 5737): the way to it is the way to all that is not near."""


def own_address(host: str) -> str:
    """This machine's address on its way to ``host``, by the tables of the kernel, IPv4 before IPv6; nothing is sent.

    Where ``host`` is a name that this machine has for itself alone, that on the way to all that is not near. Raises
    OSError for a name that nobody knows.
    """
    addresses = addresses_of(host)
    if host not in ("localhost", *addresses):
        addresses.append(ELSEWHERE)
    found = [own for where in addresses if (own := _towards(where))]
    return next((own for own in found if not ipaddress.ip_address(own).is_loopback), found[0] if found else "")


def addresses_of(host: str) -> list[str]:
    """Those of ``host``, IPv4 first. Raises OSError for a name that nobody knows."""
    found = [str(where[4][0]) for where in socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)]
    return sorted(found, key=lambda address: ":" in address)


def _towards(address: str) -> str:
    with suppress(OSError), socket.socket(_family(address), socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        return str(probe.getsockname()[0])
    return ""


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def interface(address: str) -> str:
    """The network interface whose first address is ``address``, or one of whose IPv6 addresses; else an empty name."""
    if ":" in address:
        packed, table = ipaddress.ip_address(address).packed.hex(), Path("/proc/net/if_inet6").read_text()
        return next((line.split()[-1] for line in table.splitlines() if line.startswith(packed)), "")
    for _, name in socket.if_nameindex():
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            found = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return ""


def is_here(address: str, port: int) -> bool:
    """Whether this machine has an ``address`` that others reach, where nobody listens at ``port`` yet."""
    with suppress(OSError), socket.socket(_family(address)) as probe:
        if not ipaddress.ip_address(address).is_loopback:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that ended here a minute ago
            probe.bind((address, port))
            return True
    return False


if __name__ == "__main__":
    name, _, number = sys.argv[1].rpartition(":")
    name = name.strip("[]")
    try:
        addresses = addresses_of(name)
        mine = name not in ("localhost", *addresses) and all(ipaddress.ip_address(one).is_loopback for one in addresses)
        own = name if mine else own_address(name)  # a name that stands for another address elsewhere
        print(own, "true" if any(is_here(one, int(number)) for one in addresses) else "")
    except (OSError, ValueError, OverflowError) as problem:
        sys.exit(f"error: {sys.argv[1]}: expected HOST:PORT, a machine that this one can reach, found: {problem}")
