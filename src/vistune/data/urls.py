"""Images fetched from addresses that rows name, where a recipe allows that; each once.

Only http and https; only hosts all of whose addresses are public, resolved before connecting and
connected to by that very address, so that a name cannot change its meaning in between; every
redirect is checked anew; length, content type and time are limited. Proxies and passwords in
addresses are not used. What was fetched lies in a cache folder under the hash of its address.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, urljoin, urlsplit

from vistune._version import __version__
from vistune.data.cache import cache_folder, write_once
from vistune.errors import ImageError
from vistune.recipe import UrlConfig

_BLOCK_BYTES = 1 << 16
_REDIRECTS = (301, 302, 303, 307, 308)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_PORTS = {"http": 80, "https": 443}


class UrlImages:
    """Fetches images.

    Args:
        config: What is allowed.

    Raises:
        DataError: The cache folder cannot be made.
    """

    def __init__(self, config: UrlConfig) -> None:
        self._config = config
        self._folder = cache_folder("images", given=config.cache)

    def fetch(self, url: str) -> Path:
        """Returns the file of an address, from the cache when it is there.

        Raises:
            ImageError: The address is not allowed, or cannot be fetched.
            DataError: The cache cannot be written.
        """
        name = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
        path = self._folder / name[:2] / name
        if path.is_file():
            return path
        path.parent.mkdir(exist_ok=True)

        try:
            content = _Download(self._config, url).read()
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            raise _refused(
                f"it cannot be fetched: {error or type(error).__name__}",
                reason="url_unreachable",
                url=url,
            ) from error
        return write_once(path, lambda file: file.write(content))


@dataclass(frozen=True)
class _Target:
    """Where an address leads: a checked place."""

    parts: SplitResult
    host: str
    port: int
    address: str


class _Download:
    """One address, its redirects and its deadline."""

    def __init__(self, config: UrlConfig, url: str) -> None:
        self._config, self._url = config, url
        self._deadline = time.monotonic() + config.timeout_s

    def read(self) -> bytes:
        url = self._url
        for _ in range(self._config.max_redirects + 1):
            target = self._resolve(url)
            connection = _connect(target, timeout_s=self._left_s())
            # A time-out of the socket starts anew with every byte; this one does not.
            alarm = threading.Timer(self._left_s(), _cut, (connection.sock,))
            alarm.start()
            try:
                connection.request("GET", _path(target.parts), headers=_headers(target))
                answer = connection.getresponse()
                if answer.status not in _REDIRECTS:
                    return self._body(answer)
                url = urljoin(url, answer.getheader("Location", ""))
            finally:
                alarm.cancel()
                connection.close()
        raise self._refusal(
            f"it redirects more than {self._config.max_redirects} times", "url_redirects"
        )

    def _left_s(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise self._refusal(
                f"it takes longer than {self._config.timeout_s} s", "url_unreachable"
            )
        return left

    def _refusal(self, why: str, reason: str) -> ImageError:
        return _refused(why, reason=reason, url=self._url)

    def _resolve(self, url: str) -> _Target:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port or _PORTS.get(parts.scheme, 0)
        except ValueError as error:
            raise self._refusal(f"it is no address: {error}", "url_not_allowed") from error
        plain = url.isascii() and url.isprintable() and " " not in url
        if parts.scheme not in _PORTS or not host or "@" in parts.netloc or not plain:
            raise self._refusal(
                f"{url[:80]!r} is no plain http or https address", "url_not_allowed"
            )
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [str(entry[4][0]) for entry in found]
        if f"{host}:{port}" not in self._config.private_hosts:
            private = [address for address in addresses if not is_public(address)]
            if private:
                raise self._refusal(
                    f"{host} has the address {private[0]}, which is not public", "url_not_allowed"
                )
        return _Target(parts, host, port, addresses[0])

    def _body(self, answer: http.client.HTTPResponse) -> bytes:
        if answer.status != 200:
            raise self._refusal(
                f"the server answers {answer.status} {answer.reason}", "url_unreachable"
            )
        kind = answer.getheader("Content-Type", "").partition(";")[0].strip().lower()
        if kind not in self._config.types or answer.getheader("Content-Encoding"):
            raise self._refusal(
                f"its content type is {kind or 'not said'}, not one of"
                f" {', '.join(self._config.types)}",
                "url_wrong_type",
            )
        announced, content = answer.length or 0, bytearray()
        while max(len(content), announced) <= self._config.max_bytes:
            block = answer.read1(_BLOCK_BYTES)
            if not block:
                self._left_s()
                if len(content) < announced:
                    raise self._refusal("the answer is cut off", "url_unreachable")
                return bytes(content)
            content += block
        raise self._refusal(
            f"it has more than {self._config.max_bytes} bytes (urls.max_bytes)", "url_too_large"
        )


def is_public(address: str) -> bool:
    """Returns whether an IP address is one of the public internet.

    Args:
        address: An IPv4 or IPv6 address as text; an IPv6 address that stands for an IPv4 address is
            judged by that.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return inner.is_global and not inner.is_multicast
    return ip.is_global and not ip.is_multicast


def _connect(target: _Target, *, timeout_s: float) -> http.client.HTTPConnection:
    """Returns a connection to the address that was checked, under the host's name."""
    connection = http.client.HTTPConnection(target.host, target.port, timeout=timeout_s)
    sock = socket.create_connection((target.address, target.port), timeout=timeout_s)
    if target.parts.scheme == "https":
        try:
            context = ssl.create_default_context()
            sock = context.wrap_socket(sock, server_hostname=target.host)
        except BaseException:
            sock.close()
            raise
    connection.sock = sock
    return connection


def _cut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _headers(target: _Target) -> dict[str, str]:
    return {
        "User-Agent": f"vistune/{__version__}",
        "Accept": "image/*",
        "Accept-Encoding": "identity",
        "Connection": "close",
        "Host": target.parts.netloc,
    }


def _path(parts: SplitResult) -> str:
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _refused(why: str, *, reason: str, url: str) -> ImageError:
    return ImageError(
        f"the image at this address is not used: {why}",
        reason=reason,
        where=url[:200],
        fix="save the image as a file and name it, or check data.train[].urls",
    )
