"""Whether a server can be reached, known within a bounded time."""

import socket
import threading
from urllib.parse import urlsplit


def check_reachable(url: str, seconds: float) -> None:
    """Raise an OSError unless the server of ``url``, or the proxy that leads to it, takes a connection in time.

    Libraries that download bound neither the name lookup nor the sum of their tries at a server's addresses; this
    tries first, in a thread that is left behind if it hangs.
    """
    from requests.utils import get_environ_proxies, prepend_scheme_if_needed, select_proxy

    proxy = select_proxy(url, get_environ_proxies(url))
    server = urlsplit(prepend_scheme_if_needed(proxy, "http") if proxy else url)
    address = (server.hostname or "", server.port or {"http": 80, "https": 443}.get(server.scheme, 1080))  # else SOCKS
    outcome: list[OSError | None] = []

    def connect() -> None:
        try:
            socket.create_connection(address, timeout=seconds).close()
            outcome.append(None)
        except OSError as error:
            outcome.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    error = outcome[0] if outcome else TimeoutError(f"no answer from {address[0]} in {seconds:g} s")
    if error:
        raise error
