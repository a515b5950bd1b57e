"""Images behind addresses: only where allowed, and then within stated limits."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from data_helpers import make_images, make_plan, talk

from vistune.data.formats import open_source
from vistune.data.image import load
from vistune.data.urls import UrlImages, is_public
from vistune.errors import ImageError, RowError
from vistune.recipe import SourceConfig, UrlConfig

PHOTO: list[bytes] = []


class Handler(BaseHTTPRequestHandler):
    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        content, kind, status, extra = PHOTO[0], "image/jpeg; q=1", 200, {}
        match self.path.partition("?")[0]:
            case "/page":
                kind = "text/html"
            case "/gone":
                status = 404
            case "/loop":
                status, extra = 302, {"Location": "/loop"}
            case "/once":
                status, extra = 307, {"Location": "a.jpg"}
            case "/inside":
                status, extra = 302, {"Location": "http://127.0.0.1:1/a.jpg"}
            case "/file":
                status, extra = 302, {"Location": "file:///etc/passwd"}
            case "/zip":
                extra = {"Content-Encoding": "gzip"}
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in extra.items():
            self.send_header(name, value)
        if self.path == "/endless":  # announces no length
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b"x" * 5000)
            return
        if self.path == "/short":
            self.send_header("Content-Length", str(len(content) + 50))
            self.end_headers()
            self.wfile.write(content)
            return
        if self.path == "/drip":
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.02)
            return
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the client hangs up, as it should
            super().handle()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("photos")
    PHOTO[:] = [(folder / make_images(folder, 1)[0]).read_bytes()]
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.daemon_threads = True
    threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"127.0.0.1:{made.server_port}"
    made.shutdown()
    made.server_close()


def config(folder: Path, server: str, **change: Any) -> UrlConfig:
    values = {"private_hosts": (server,), "cache": str(folder / "cache"), **change}
    return UrlConfig(**values)


def test_an_allowed_address_is_fetched_once(tmp_path: Path, server: str) -> None:
    row = {"image": f"http://{server}/a.jpg?x=1", "conversations": talk("<image>\nWho?", "A cat.")}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    source = SourceConfig(path=str(tmp_path / "t.jsonl"), urls=config(tmp_path, server))
    Handler.asked.clear()
    for _ in range(2):
        image = open_source(source).read(0).images[0]
        assert image.name == row["image"]
        assert image.path.read_bytes() == PHOTO[0]
        assert load(image, make_plan()).size == (40, 30)
    assert Handler.asked == ["/a.jpg?x=1"]
    assert UrlImages(config(tmp_path, server)).fetch(f"http://{server}/once").is_file()
    # Without `urls`, nothing is asked of anyone.
    with pytest.raises(RowError) as caught:
        open_source(source.model_copy(update={"urls": None})).read(0)
    assert caught.value.reason == "image_is_url"
    assert "data.train[].urls" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("path", "reason", "said"),
    [
        ("/page", "url_wrong_type", "text/html"),
        ("/zip", "url_wrong_type", "image/jpeg"),
        ("/gone", "url_unreachable", "404"),
        ("/loop", "url_redirects", "more than 3"),
        ("/inside", "url_not_allowed", "127.0.0.1"),
        ("/file", "url_not_allowed", "file:"),
        ("/endless", "url_too_large", "20000 bytes"),
        ("/short", "url_unreachable", ""),
        ("/drip", "url_unreachable", "0.5 s"),
    ],
)
def test_what_a_server_may_not_do(
    tmp_path: Path, server: str, path: str, reason: str, said: str
) -> None:
    images = UrlImages(config(tmp_path, server, max_bytes=20_000, timeout_s=0.5))
    began = time.monotonic()
    with pytest.raises(ImageError) as caught:
        images.fetch(f"http://{server}{path}")
    assert caught.value.reason == reason
    assert said in caught.value.what
    assert time.monotonic() - began < 2
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]


def test_an_announced_length_is_enough(tmp_path: Path, server: str) -> None:
    with pytest.raises(ImageError) as caught:
        UrlImages(config(tmp_path, server, max_bytes=10)).fetch(f"http://{server}/a.jpg")
    assert caught.value.reason == "url_too_large"


def test_private_addresses_are_refused_whatever_they_are_called(
    tmp_path: Path, server: str
) -> None:
    port = server.partition(":")[2]
    images = UrlImages(UrlConfig(cache=str(tmp_path)))
    Handler.asked.clear()
    for host in ("127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "2130706433"):
        with pytest.raises(ImageError) as caught:
            images.fetch(f"http://{host}:{port}/a.jpg")
        assert caught.value.reason == "url_not_allowed", host
    assert Handler.asked == []


@pytest.mark.parametrize(
    "url",
    ["ftp://x/a.jpg", "http://", "http://u:p@x/a.jpg", "http://x:99999/a", "http://x/a b", "//x/a"],
)
def test_other_addresses_are_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(ImageError) as caught:
        UrlImages(UrlConfig(cache=str(tmp_path))).fetch(url)
    assert caught.value.reason == "url_not_allowed"


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("1.1.1.1", True),
        ("2606:4700:4700::1111", True),
        ("10.0.0.1", False),
        ("172.16.3.4", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("127.1.2.3", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::a00:1", False),
        ("64:ff9b::101:101", True),
        ("2002:a00:1::", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_an_unreachable_host_is_a_rows_error(tmp_path: Path) -> None:
    images = UrlImages(UrlConfig(cache=str(tmp_path), private_hosts=("127.0.0.1:9",), timeout_s=1))
    for url in ("http://127.0.0.1:9/a.jpg", "http://" + "a" * 70 + ".invalid/a.jpg"):
        with pytest.raises(ImageError) as caught:
            images.fetch(url)
        assert caught.value.reason == "url_unreachable"
