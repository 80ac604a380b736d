"""Free TCP ports of this machine: a preferred one where nobody holds it, else the next free one."""

import errno
import socket
from collections.abc import Collection

SEARCH = 200  # how far above a preferred port the search goes
# Below the range (32768 and up) from which Linux takes ports for outgoing connections.
WORKER_BLOCKS = range(20000, 32000, 1000)


def is_free(port: int) -> bool:
    """Whether nobody listens on `port`, on any of this machine's addresses."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            return False
    return True


def choose(preferred: int, taken: Collection[int] = ()) -> int:
    """The first free port from `preferred` upwards that is not in `taken`; OSError where there is none."""
    for port in range(preferred, preferred + SEARCH):
        if port not in taken and is_free(port):
            return port
    raise OSError(errno.EADDRINUSE, f"no free port in {preferred}..{preferred + SEARCH - 1}")


def choose_block(blocks: range = WORKER_BLOCKS) -> tuple[int, int]:
    """First and last port of the first block of `blocks` in which every port is free; OSError where there is none."""
    for first in blocks:
        last = first + blocks.step - 1
        if all(is_free(port) for port in range(first, last + 1)):
            return first, last
    raise OSError(errno.EADDRINUSE, f"no {blocks.step} free ports in a row in {blocks.start}..{blocks.stop - 1}")
