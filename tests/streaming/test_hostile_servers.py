"""Servers that are slow, send more or other bytes than asked for, or redirect to where a list could not lead."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time

import pytest
from confined import confined
from shard_files import listed, tar_members, write_tar
from streams import number_of, stream_of

from datasets_lib.streaming import http_connection, http_file
from datasets_lib.streaming.http_connection import is_public
from datasets_lib.streaming.http_file import HttpFile, open_url


@pytest.fixture
def serve():
    """serve(answer, host) -> a URL; answer(connection, first, last, path) writes what each request gets."""
    with contextlib.ExitStack() as open_ones:

        def start(answer, host="127.0.0.1"):
            listening = open_ones.enter_context(socket.create_server((host, 0)))
            open_ones.callback(listening.shutdown, socket.SHUT_RDWR)  # wakes accept(), which closing does not
            threading.Thread(target=accept, args=(listening, answer), daemon=True).start()
            return f"http://{host}:{listening.getsockname()[1]}/a.tar"

        yield start


def accept(listening, answer):
    while True:
        try:
            connection, _ = listening.accept()
        except OSError:
            return
        threading.Thread(target=handle, args=(connection, answer), daemon=True).start()


def handle(connection, answer):
    with connection, contextlib.suppress(OSError):
        asked = b""
        while b"\r\n\r\n" not in asked:
            asked += (received := connection.recv(65536))
            if not received:  # the client has gone
                return
        first, last = map(int, re.search(rb"bytes=(\d+)-(\d+)", asked).groups())
        answer(connection, first, last, asked.split()[1].decode())


def head(first, last, code="206 Partial Content", size=1_000_000, **headers):
    fields = {"Content-Range": f"bytes {first}-{last}/{size}", "Content-Length": last - first + 1}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"HTTP/1.1 {code}", *(f"{name}: {value}" for name, value in fields.items() if value is not None)]
    return ("\r\n".join(lines) + "\r\nConnection: close\r\n\r\n").encode()


def good(connection, first, last, path):
    connection.sendall(head(first, last) + bytes(last - first + 1))


def later(answer):
    """The first request, for the size, is answered well."""

    def chosen(connection, first, last, path):
        (good if last == 0 else answer)(connection, first, last, path)

    return chosen


def chunked_without_end(connection, first, last, path):
    connection.sendall(head(first, last, Content_Length=None, Transfer_Encoding="chunked"))
    while True:
        connection.sendall(b"100000\r\n" + bytes(1 << 20) + b"\r\n")


def more(connection, first, last, path):
    connection.sendall(head(first, last, Content_Length=None))
    while True:
        connection.sendall(bytes(1 << 20))


def headers_without_end(connection, first, last, path):
    connection.sendall(b"HTTP/1.1 206 Partial Content\r\n")
    while True:
        connection.sendall(b"X-a: b\r\n" * 1000)


def line_without_end(connection, first, last, path):
    connection.sendall(b"HTTP/1.1 206 Partial Content\r\nX-a: ")
    while True:
        connection.sendall(b"b" * 65536)


def sends(**changed):
    def answer(connection, first, last, path):
        body = changed.get("body", bytes(last - first + 1))
        connection.sendall(
            head(first, last, **{name: value for name, value in changed.items() if name != "body"}) + body
        )

    return answer


ANSWERS = {
    "chunks": (chunked_without_end, "the server sent 101 of 100 bytes and more"),
    "more": (more, "the server sent 101 of 100 bytes and more"),
    "headers": (headers_without_end, "the server's answer cannot be read .HTTPException: got more than 100 headers"),
    "line": (line_without_end, "the server's answer cannot be read .LineTooLong"),
    "short": (sends(body=b"x" * 40), "the server sent 40 of 100 bytes"),
    "nothing": (lambda connection, first, last, path: None, "Remote end closed connection|Connection reset"),
    "no http": (lambda connection, *rest: connection.sendall(b"hello\r\n\r\n"), "the server's answer cannot be read .BadStatusLine"),
    "negative": (sends(Content_Length=-5), "fine"),
    "length": (sends(Content_Length="9" * 5000), "fine|the server|Exceeds"),
    "text": (sends(Content_Length="abc"), "fine"),
    "another part": (sends(Content_Range="bytes 500-599/1000000"), "the server sent the part 'bytes 500-599/1000000' and was asked for"),
    "no part": (sends(Content_Range=None), "the server sent the part ''"),
    "whole": (sends(code="200 OK", Content_Range=None), "the server sent the part ''"),
    "escape": (sends(Content_Range="\x1b[2J"), "the server sent the part '.*x1b"),
    "packed": (sends(Content_Encoding="gzip", body=b"\x1f\x8b" + bytes(28), Content_Length=30), "the server sent 30 of 100 bytes"),
    "chunk sizes": (sends(Content_Length=None, Transfer_Encoding="chunked", body=b"zzz\r\n"), "the server's answer cannot be read"),
    "code": (sends(code="999 \x1b[2J"), "the server answers 999"),
}  # fmt: skip


@pytest.mark.parametrize("case", ANSWERS)
def test_answers(serve, case):
    answer, message = ANSWERS[case]
    url = serve(later(answer))

    def read():
        file = HttpFile(url)
        file.seek(1000)
        return "fine" if file.read(100) == bytes(100) else "other bytes"

    found = confined(read, more_bytes=512 << 20)
    assert re.search(message, found.removeprefix("TRACEBACK ")), found


SIZES = {
    "*": "does not serve parts",
    "9" * 19: "does not serve parts",
    "9" * 5000: "does not serve parts",
    "-5": "does not serve parts",
}


@pytest.mark.parametrize("size", SIZES)
def test_sizes_that_cannot_be(serve, size):
    with pytest.raises(OSError, match=SIZES[size]):
        HttpFile(serve(sends(size=size)))


def test_a_read_of_more_than_a_part_is_several_requests(serve, monkeypatch):
    monkeypatch.setattr(http_file, "PART_BYTES", 1000)
    asked = []

    def noting(connection, first, last, path):
        asked.append(last - first + 1)
        good(connection, first, last, path)

    with open_url(serve(noting)) as file:
        assert file.read(3500) == bytes(3500)
    assert asked == [1, 1000, 1000, 1000, 1000]


# --- slow servers


def drip(before):
    """Sends the answer's first bytes at once, then one each 20 ms."""

    def answer(connection, first, last, path):
        data = head(first, last) + bytes(last - first + 1)
        connection.sendall(data[:before])
        for number in range(before, len(data)):
            time.sleep(0.02)
            connection.sendall(data[number : number + 1])

    return answer


@pytest.mark.parametrize("before", [0, 5, 40, 150])
def test_a_slow_server_has_a_deadline(serve, monkeypatch, before):
    """In its status line, its headers or its content: each byte comes in time, all of them do not."""
    url = serve(later(drip(before)))
    monkeypatch.setattr(http_file, "TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(http_file, "SLOWEST", 100_000)
    file, began = HttpFile(url), time.monotonic()
    with pytest.raises(OSError, match="the server took longer than 0 s for a part|timed out"):
        file.read(1000)
    assert time.monotonic() - began < 2


def test_a_server_that_sends_chunks_slowly_has_a_deadline(serve, monkeypatch):
    def chunks(connection, first, last, path):
        connection.sendall(head(first, last, Content_Length=None, Transfer_Encoding="chunked"))
        while True:
            time.sleep(0.02)
            connection.sendall(b"1\r\n\0\r\n")

    monkeypatch.setattr(http_file, "TIMEOUT_SECONDS", 0.3)
    file, began = HttpFile(serve(later(chunks))), time.monotonic()
    with pytest.raises(OSError, match="the server took longer than|timed out"):
        file.read(1000)
    assert time.monotonic() - began < 2


def test_a_silent_server(serve, monkeypatch):
    monkeypatch.setattr(http_file, "TIMEOUT_SECONDS", 0.2)
    file = HttpFile(serve(later(lambda connection, *rest: time.sleep(5))))
    with pytest.raises(OSError, match=r"timed out|took longer"):
        file.read(10)


def test_the_time_that_a_part_gets(monkeypatch):
    given = []
    monkeypatch.setattr(
        http_file, "opener", lambda seconds: given.append(seconds) or (_ for _ in ()).throw(OSError("no"))
    )
    file = HttpFile.__new__(HttpFile)
    file.url, file.user = "http://host/a.tar", ""
    for size in (1, 4 << 20):
        with pytest.raises(OSError, match="no"):
            file._request(0, size - 1)
    assert given == [pytest.approx(60, abs=1), pytest.approx(60 + 419, abs=1)]


def test_a_slow_server_is_a_fault_of_its_shard(serve, tmp_path, monkeypatch, capsys):
    write_tar(tmp_path / "near.tar", tar_members(range(3)))
    data = (tmp_path / "near.tar").read_bytes()

    def slow(connection, first, last, path):
        connection.sendall(head(first, last, size=len(data)) + data[first : last + 1][:1])
        time.sleep(5 if last else 0)

    url = serve(slow)
    monkeypatch.setattr(http_file, "TIMEOUT_SECONDS", 0.2)
    reader = stream_of(listed(tmp_path, "near.tar", url), shard_retries=1).open_reader(0, None)
    assert sorted(number_of(reader.next(None)) for _ in range(6)) == [0, 0, 1, 1, 2, 2]
    assert re.search(r"WARNING: http://127.0.0.1:\d+/a.tar: .*: the shard is skipped", capsys.readouterr().out)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate")
def test_https_has_the_same_deadline(tmp_path, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    options = [
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
    ]
    command = ["openssl", "req", "-x509", *options, "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with context.wrap_socket(socket.create_server(("127.0.0.1", 0)), server_side=True) as listening:
        threading.Thread(target=accept, args=(listening, later(drip(40))), daemon=True).start()
        file = HttpFile(f"https://127.0.0.1:{listening.getsockname()[1]}/a.tar")
        monkeypatch.setattr(http_file, "TIMEOUT_SECONDS", 0.3)
        monkeypatch.setattr(http_file, "SLOWEST", 100_000)
        began = time.monotonic()
        with pytest.raises(OSError, match="the server took longer than 0 s for a part|timed out"):
            file.read(1000)
        assert time.monotonic() - began < 2


def test_a_proxy_is_used(serve, monkeypatch):
    asked = []

    def noting(connection, first, last, path):
        asked.append(path)
        good(connection, first, last, path)

    monkeypatch.setenv("http_proxy", serve(noting).removesuffix("/a.tar"))
    assert HttpFile("http://somewhere.invalid/a.tar").read(10) == bytes(10)
    assert asked == ["http://somewhere.invalid/a.tar"] * 2


# --- redirects


def to(location):
    def answer(connection, first, last, path):
        connection.sendall(head(first, last, code="302 Found", Location=location, Content_Length=0, Content_Range=None))

    return answer


def test_a_redirect_is_followed_to_a_server_of_the_same_kind(serve):
    assert HttpFile(serve(to(serve(good)))).read(10) == bytes(10)
    assert HttpFile(serve(lambda connection, first, last, path: (
        good if path == "/b.tar" else to("/b.tar"))(connection, first, last, path))).read(10) == bytes(10)  # fmt: skip


@pytest.mark.parametrize(
    "location", ["ftp://127.0.0.1/a.tar", "file:///etc/passwd", "data:,x", "gopher://h/a", "s3://b/a.tar"]
)
def test_a_redirect_to_another_scheme_is_not_followed(serve, location):
    with pytest.raises(
        OSError, match=r"the server redirects from http to ftp, which is not followed|the server answers 302"
    ):
        HttpFile(serve(to(location)))


def test_a_redirect_from_https_to_http_is_not_followed():
    request = http_file.urllib.request.Request("https://host/a.tar")
    with pytest.raises(OSError, match="the server redirects from https to http, which is not followed"):
        http_connection.Redirects().redirect_request(request, None, 302, "", {}, "http://host/a.tar")
    for url in ("https://other/a.tar",):
        assert http_connection.Redirects().redirect_request(request, None, 302, "", {}, url).full_url == url
    plain = http_file.urllib.request.Request("http://host/a.tar")
    assert http_connection.Redirects().redirect_request(plain, None, 302, "", {}, "https://host/a.tar").type == "https"


def test_redirects_in_a_circle(serve):
    def around(connection, first, last, path):
        to(path)(connection, first, last, path)

    with pytest.raises(OSError, match="the server answers 302"):
        HttpFile(serve(around))


@pytest.mark.parametrize("code", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_a_public_server_does_not_redirect_to_a_private_address(serve, monkeypatch, code):
    """127.0.0.1 stands for a public address; who asked is not sent on to 127.0.0.2."""
    asked = []

    def private(connection, first, last, path):
        asked.append(path)
        good(connection, first, last, path)

    target = serve(private, "127.0.0.2")
    url = serve(sends(code=code, Location=target, Content_Length=0, body=b""))
    assert HttpFile(url).read(1) == b"\0"  # from a private one it is
    monkeypatch.setattr(http_connection, "is_public", lambda address: address == "127.0.0.1")
    asked.clear()
    with pytest.raises(OSError, match="the server redirects to 127.0.0.2, an address that is not public"):
        HttpFile(url)
    assert asked == []
    assert HttpFile(target).read(1) == b"\0"  # a list may name it


ADDRESSES = {
    "8.8.8.8": True, "2606:4700::1111": True, "127.0.0.1": False, "::1": False, "10.0.0.1": False, "192.168.1.1": False,
    "172.16.0.1": False, "169.254.169.254": False, "fe80::1": False, "fd00::1": False, "0.0.0.0": False, "100.64.0.1": False,
    "::ffff:127.0.0.1": False, "::ffff:10.0.0.1": False, "::ffff:8.8.8.8": True,
}  # fmt: skip


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_that_are_public(address):
    assert is_public(address) == ADDRESSES[address]


# --- secrets


URLS = [
    "http://user:hidden@HOST/a b.tar?sig=hidden", "http://user:hidden@HOST/a\x7f.tar?sig=hidden", "http://user:hidden@HOST:99999/a.tar?sig=hidden",
    "http://user:hidden@HOST:x/a.tar?sig=hidden", "http://user:hidden@/a.tar?sig=hidden", "http://user:hid%64en@h\u00fcst.invalid/a.tar?sig=hidden",
    "http://user:hidden@" + "x" * 300 + ".invalid/a.tar?sig=hidden", "http://user:hidden@[::1]:1/a.tar?sig=hidden", "http://user:hidden@HOST/é.tar?sig=hidden",
    "http://user@x:hidden@HOST/a.tar?sig=hidden", "http://user:hidden@..invalid/a.tar?sig=hidden",
]  # fmt: skip


@pytest.mark.parametrize("url", URLS)
def test_urls_that_cannot_be_opened_show_no_secret(tmp_path, url):
    found = confined(stream_of, listed(tmp_path, url.replace("HOST", "127.0.0.1")))
    assert found.startswith("InputError: "), found
    assert "hidden" not in found
    assert found.isprintable()


def test_a_user_and_password_are_not_sent_on_by_a_redirect():
    """Each server notes what it was sent."""
    sent = {}

    def run(name, answer):
        listening = socket.create_server(("127.0.0.1", 0))

        def serve_one():
            connection, _ = listening.accept()
            with connection, listening:
                sent[name] = connection.recv(65536).decode()
                first, last = map(int, re.search(r"bytes=(\d+)-(\d+)", sent[name]).groups())
                answer(connection, first, last, "")

        threading.Thread(target=serve_one, daemon=True).start()
        return f"127.0.0.1:{listening.getsockname()[1]}"

    second = run("second", good)
    first = run("first", to(f"http://{second}/b.tar"))
    HttpFile(f"http://user:hidden@{first}/a.tar")
    assert "Authorization: Basic" in sent["first"]
    assert "Authorization" not in sent["second"]
