"""Where the environment has a say in connections: proxies and certificates, but none for this machine's addresses."""

from __future__ import annotations

import ipaddress
import os
from urllib.parse import urlsplit

from diagonal.client.errors import DiagonalError, RefusedError

_VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "WSS_PROXY", "WS_PROXY")
SOCKS = "for socks5:// the client needs: pip install socksio python-socks"


def is_this_machine(url: str) -> bool:
    """Whether the address is a loopback one, which no proxy reaches."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def environment_error(error: Exception) -> DiagonalError:
    """The error of a client that the environment's proxies or certificates do not let be made; names them."""
    names = [name for one in _VARIABLES for name in (one, one.lower()) if os.environ.get(name)]
    names = [name for name in names if name.startswith("SSL_") == isinstance(error, OSError)]
    said = ", ".join(f"{name} = {os.environ[name]!r}" for name in names) or "base_url"
    allowed = SOCKS if isinstance(error, ImportError) else str(error)
    return RefusedError(f"{said}: {allowed}", code="invalid_environment")
