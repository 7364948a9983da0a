"""TLS for native code, against itself and against Python's `ssl`: who gets in, what arrives, and how it fails."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from authority import Authority, Issued

from asyncxfer import BackendError, ClosedError, PreSharedKey
from asyncxfer._fast import tls
from asyncxfer._fast.tls import DONE, WANT_READ, WANT_WRITE, Connection, Context

AUTHORITY = Authority()
OURS, THEIRS = AUTHORITY.issue("prefill-0"), AUTHORITY.issue("decode-0")
MIB = 1 << 20


def context(issued: Issued = OURS, authority: Authority = AUTHORITY) -> Context:
    return Context(issued.certificate, issued.key, authority.pem)


@dataclass
class Ends:
    """Two connected sockets, and a TLS connection over each where the test has made one."""

    left: socket.socket
    right: socket.socket
    made: list[Connection]

    def server(self, given: Context, **options: int) -> Connection:
        return self._make(given, self.left, server=True, **options)

    def client(self, given: Context, **options: int) -> Connection:
        return self._make(given, self.right, server=False, **options)

    def _make(self, given: Context, sock: socket.socket, *, server: bool, **options: int) -> Connection:
        self.made.append(Connection(given, sock.fileno(), server=server, **options))
        return self.made[-1]

    def python(self, given: ssl.SSLContext, *, server: bool = False) -> ssl.SSLSocket:
        """Put Python's own TLS on one end."""
        sock = self.left if server else self.right
        wrapped = given.wrap_socket(sock, server_side=server, do_handshake_on_connect=False)
        if server:
            self.left = wrapped
        else:
            self.right = wrapped
        return wrapped


@pytest.fixture
def ends() -> Iterator[Ends]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    near.setblocking(False)
    far.setblocking(False)
    made = Ends(near, far, [])
    yield made
    for connection in made.made:
        connection.close()
    made.left.close()
    made.right.close()


End = Connection | ssl.SSLSocket


def done(end: End) -> bool:
    """Go on with one side's handshake; whether it is through."""
    if isinstance(end, Connection):
        return end.handshake() == DONE
    try:
        end.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True


def shake_hands(*both: End) -> None:
    rounds = 0
    while any([not done(side) for side in both]):  # noqa: C419 (each of them goes on, also when the first is not done)
        select.select([side for side in both if isinstance(side, ssl.SSLSocket)], [], [], 0.01)
        rounds += 1
        assert rounds < 500, "the handshake does not end"


def read(end: Connection, nbytes: int) -> bytes:
    """Read exactly so many bytes, or fewer at the end."""
    return b"".join(iter_read(end, nbytes))


def iter_read(end: Connection, nbytes: int) -> Iterator[bytes]:
    while nbytes:
        try:
            piece = end.read(nbytes)
        except BlockingIOError:
            os.sched_yield()
            continue
        if not piece:
            return
        nbytes -= len(piece)
        yield piece


def connected(ends: Ends, **options: int) -> tuple[Connection, Connection]:
    both = ends.server(context(), **options), ends.client(context(THEIRS), **options)
    shake_hands(*both)
    return both


# ---- who gets in ----------------------------------------------------------------------------------------------------


def test_it_is_the_library_that_python_uses() -> None:
    assert tls.available().startswith("OpenSSL ")
    if "/libssl.so" in Path("/proc/self/maps").read_text():
        assert tls.available() == ssl.OPENSSL_VERSION


WITHOUT_SSL = """
import sys
sys.modules["_ssl"] = sys.modules["ssl"] = None
from asyncxfer import BackendError
from asyncxfer._fast import tls
try:
    print(tls.available())
except BackendError as error:
    print(error)
"""


def test_a_python_without_a_shared_libssl_takes_the_systems() -> None:
    """As where Python has OpenSSL built in; and if there is none, that is said."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_SSL], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(("OpenSSL ", "TLS needs OpenSSL's libssl.so.3"))


def test_both_sides_know_each_other(ends: Ends) -> None:
    server, client = connected(ends)
    assert server.peer_certificate() == THEIRS.der
    assert client.peer_certificate() == OURS.der
    assert server.cipher() == client.cipher() == "TLS_AES_128_GCM_SHA256"
    assert client.write(b"question") == 8
    assert read(server, 8) == b"question"
    assert server.write(b"answer") == 6
    assert read(client, 6) == b"answer"


def test_a_handshake_says_what_it_waits_for(ends: Ends) -> None:
    server, client = ends.server(context()), ends.client(context())
    assert (server.handshake(), client.handshake()) == (WANT_READ, WANT_READ)
    assert {DONE, WANT_READ, WANT_WRITE} == {0, 1, 2}
    assert server.cipher() == ""
    with pytest.raises(BackendError, match="no certificate yet"):
        server.peer_certificate()


def test_a_chain_is_shown_and_a_shared_secret_serves_too(ends: Ends) -> None:
    secret = PreSharedKey(b"sixteen bytes or more").pem()
    chained = OURS.certificate + AUTHORITY.pem
    mixed = Context(chained, OURS.key, secret[2] + AUTHORITY.pem)
    server, client = ends.server(mixed), ends.client(Context(secret[0], secret[1], AUTHORITY.pem))
    shake_hands(server, client)
    assert client.peer_certificate() == OURS.der


@pytest.mark.parametrize("native_server", [True, False])
def test_python_speaks_with_it(ends: Ends, native_server: bool) -> None:
    theirs = AUTHORITY.credentials("decode-0")
    native = ends.server(context()) if native_server else None
    other = ends.python(theirs.client()) if native_server else ends.python(theirs.server(), server=True)
    native = native or ends.client(context())
    shake_hands(native, other)
    other.send(b"from Python")
    assert read(native, 11) == b"from Python"
    native.write(b"from here")
    select.select([other], [], [], 10)
    assert other.recv(100) == b"from here"
    assert native.end()
    select.select([other], [], [], 10)
    assert other.recv(100) == b""


def refused(ends: Ends, server: End, client: End) -> tuple[str, str]:
    """Expect the server to refuse; gives its reason, and what the client hears of it."""
    with pytest.raises(BackendError) as here:
        shake_hands(server, client)
    assert isinstance(client, Connection)
    with pytest.raises(BackendError) as there:
        read(client, 1)
    return str(here.value), str(there.value)


def test_a_stranger_is_refused_and_hears_it(ends: Ends) -> None:
    client = ends.client(context(Authority().issue("decode-0")))
    here, there = refused(ends, ends.server(context()), client)
    assert "certificate verify failed: unable to get local issuer certificate" in here
    assert "unknown ca" in there


def test_a_client_refuses_a_strange_server(ends: Ends) -> None:
    server, client = ends.server(context()), ends.client(context(authority=Authority()))
    with pytest.raises(BackendError, match=r"certificate verify failed|unknown ca"):
        shake_hands(server, client)


def test_an_expired_certificate_is_refused(ends: Ends) -> None:
    expired = AUTHORITY.issue("decode-0", days=(-9, -1))
    here, there = refused(ends, ends.server(context()), ends.client(context(expired)))
    assert "certificate has expired" in here
    assert "expired" in there


def test_a_client_without_a_certificate_is_refused(ends: Ends) -> None:
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname, bare.verify_mode = False, ssl.CERT_NONE
    server, client = ends.server(context()), ends.python(bare)
    with pytest.raises(BackendError, match="peer did not return a certificate"):
        shake_hands(server, client)
    select.select([client], [], [], 10)
    with pytest.raises(ssl.SSLError, match=r"(?i)certificate.required"):
        client.recv(1)


@pytest.mark.parametrize("native_server", [True, False])
def test_tls_1_2_is_refused(ends: Ends, native_server: bool) -> None:
    theirs = AUTHORITY.credentials("decode-0")
    old = theirs.client() if native_server else theirs.server()
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
    native = ends.server(context()) if native_server else ends.client(context())
    other = ends.python(old, server=not native_server)
    with pytest.raises((BackendError, ssl.SSLError)):
        shake_hands(other, native)
    with pytest.raises(BackendError, match=r"version|protocol"):
        shake_hands(native)


@pytest.mark.parametrize("text", [b"GET / HTTP/1.0\r\n\r\n", bytes(1000), b"\x16\x03\x01\xff\xff" + b"x" * 65535,
                                  b"\x17\x03\x03\x00\x05hello", b"\x15\x03\x03\x00\x02\x02\x28"])  # fmt: skip
def test_garbage_instead_of_a_handshake(ends: Ends, text: bytes) -> None:
    for native, sock in ((ends.server(context()), ends.right), (ends.client(context()), ends.left)):
        sock.send(text)
        select.select([ends.left if sock is ends.right else ends.right], [], [], 10)
        with pytest.raises(BackendError, match=r"the TLS handshake failed: ."):
            shake_hands(native)
        with pytest.raises(BackendError, match=r"the TLS handshake failed: ."):
            native.handshake()


def test_a_peer_that_closes_during_the_handshake(ends: Ends) -> None:
    server = ends.server(context())
    ends.right.close()
    with pytest.raises(BackendError, match=r"ended without|reset"):
        shake_hands(server)


# ---- what arrives ---------------------------------------------------------------------------------------------------


def carry(writer: Connection, reader: Connection, data: bytes, piece: int) -> bytearray:
    """Write all of `data` and read it at the other end, in pieces; memory moves between calls that do not finish."""
    got, sent, view = bytearray(), 0, memoryview(data)
    while len(got) < len(data):
        if sent < len(data):
            with contextlib.suppress(BlockingIOError):
                sent += writer.write(bytearray(view[sent : sent + 4 * MIB]))
        with contextlib.suppress(BlockingIOError):
            got += reader.read(piece)
    return got


def test_64_mib_arrive_both_ways(ends: Ends) -> None:
    server, client = connected(ends)
    data = os.urandom(64 * MIB)
    assert carry(client, server, data, 300_000) == data
    assert carry(server, client, data, MIB) == data


@pytest.mark.parametrize("nbytes", [1, 16383, 16384, 16385, 131072, 131073, 3 * 131072 + 5])
def test_every_size_arrives_whole(ends: Ends, nbytes: int) -> None:
    server, client = connected(ends)
    data = os.urandom(nbytes)
    assert carry(client, server, data, nbytes) == data
    assert carry(server, client, data, 1 + nbytes // 7) == data
    for end in (server, client):
        with pytest.raises(BlockingIOError):
            end.read(1)


def test_both_directions_at_once(ends: Ends) -> None:
    """One thread a side, which reads and writes."""
    server, client = connected(ends)
    data = {server: os.urandom(8 * MIB), client: os.urandom(8 * MIB)}
    got: dict[Connection, bytearray] = {server: bytearray(), client: bytearray()}

    def run(end: Connection, sock: socket.socket) -> None:
        sent, view = 0, memoryview(data[end])
        while sent < len(view) or len(got[end]) < 8 * MIB:
            moved = 0
            with contextlib.suppress(BlockingIOError):
                moved = end.write(view[sent:])
            sent += moved
            with contextlib.suppress(BlockingIOError):
                piece = end.read(MIB)
                got[end] += piece
                moved += len(piece)
            if not moved:
                select.select([sock], [sock] if sent < len(view) else [], [], 10)

    threads = [threading.Thread(target=run, args=pair) for pair in ((server, ends.left), (client, ends.right))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got[server] == data[client]
    assert got[client] == data[server]


@pytest.mark.parametrize("peer", ["native", "python"])
def test_the_key_is_replaced_under_way(ends: Ends, peer: str) -> None:
    server = ends.server(context(), rekey=100_000)
    data = os.urandom(4 * MIB)
    if peer == "native":
        client = ends.client(context(THEIRS), rekey=1 << 20)
        shake_hands(server, client)
        assert carry(server, client, data, MIB) == data
        assert carry(client, server, data, MIB) == data
        assert client.updates in (2, 3)
    else:
        other = ends.python(AUTHORITY.credentials("decode-0").client())
        shake_hands(server, other)
        got, sent = bytearray(), 0
        while len(got) < len(data):
            with contextlib.suppress(BlockingIOError):
                sent += server.write(data[sent:])
            with contextlib.suppress(ssl.SSLWantReadError):
                got += other.recv(MIB)
        assert got == data
    assert server.updates >= 20


def test_what_was_read_ahead_is_told(ends: Ends) -> None:
    server, client = connected(ends)
    client.write(b"x" * 40_000)
    assert read(server, 1) == b"x"
    assert server.pending
    assert read(server, 39_999) == b"x" * 39_999
    assert not server.pending


def test_a_write_that_is_continued_with_less_is_refused(ends: Ends) -> None:
    server, client = connected(ends)
    with contextlib.suppress(BlockingIOError):
        while True:
            client.write(bytes(MIB))
    with pytest.raises(ValueError, match="fewer bytes"):
        client.write(b"less")
    assert read(server, 1) == b"\0"


def test_writing_nothing_and_reading_nothing(ends: Ends) -> None:
    server, client = connected(ends)
    assert client.write(b"") == 0
    assert server.read(0) == b""


# ---- how it ends ----------------------------------------------------------------------------------------------------


def test_an_end_that_is_announced_reads_as_the_end(ends: Ends) -> None:
    server, client = connected(ends)
    client.write(b"last words")
    assert client.end()
    client.close()
    ends.right.close()
    assert read(server, 100) == b"last words"
    assert server.read(1) == b""
    assert server.read(1) == b""


def test_an_end_that_is_not_announced_is_an_error(ends: Ends) -> None:
    """A peer that is killed, or somebody who cuts the stream short."""
    server, client = connected(ends)
    client.write(b"half of a mes")
    ends.right.shutdown(socket.SHUT_WR)
    assert read(server, 13) == b"half of a mes"
    for _ in range(2):
        with pytest.raises(BackendError, match="ended without the end"):
            server.read(1)
    with pytest.raises(BackendError, match="ended without the end"):
        server.write(b"x")


def records(ends: Ends, client: Connection, nbytes: int) -> bytes:
    """What the client sends for so many bytes, taken off the wire."""
    client.write(bytes(nbytes))
    select.select([ends.left], [], [], 10)
    return ends.left.recv(1 << 20)


def forward(ends: Ends, change: Callable[[bytes], bytes]) -> tuple[Connection, Connection]:
    """Shake hands, then hand the server what the client sends after `change` has been at it."""
    server, client = connected(ends)
    sent = records(ends, client, 10_000)
    here, there = socket.socketpair()
    with here, there:
        there.sendall(change(sent))
        there.shutdown(socket.SHUT_WR)
        os.dup2(here.fileno(), ends.left.fileno())
    return server, client


def test_a_peer_that_goes_in_the_middle_of_a_record(ends: Ends) -> None:
    server, _ = forward(ends, lambda sent: sent[:5000])
    with pytest.raises(BackendError, match="ended without the end"):
        read(server, 1)


def test_a_changed_byte_is_noticed(ends: Ends) -> None:
    server, _ = forward(ends, lambda sent: sent[:5000] + bytes([sent[5000] ^ 1]) + sent[5001:])
    with pytest.raises(BackendError, match=r"bad record mac|decryption failed"):
        read(server, 1)


def test_a_repeated_record_is_noticed(ends: Ends) -> None:
    server, _ = forward(ends, lambda sent: sent + sent)
    assert read(server, 10_000) == bytes(10_000)
    with pytest.raises(BackendError, match=r"bad record mac|decryption failed"):
        read(server, 1)


SIGPIPE = """
import signal, socket, sys
from asyncxfer import BackendError, PreSharedKey
from asyncxfer._fast.tls import Connection, Context
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
context = Context(*PreSharedKey("sixteen bytes or more").pem())
left, right = socket.socketpair()
server, client = Connection(context, left.fileno(), server=True), Connection(context, right.fileno(), server=False)
while client.handshake() + server.handshake():
    pass
right.close()
try:
    while True:
        server.write(bytes(100000))
except BackendError as error:
    print(error)
"""


def test_writing_to_a_closed_socket_does_not_kill() -> None:
    done = subprocess.run([sys.executable, "-c", SIGPIPE], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Broken pipe" in done.stdout


def test_what_is_closed_says_so(ends: Ends) -> None:
    before = tls.live()
    server = ends.server(context())
    assert tls.live() == before + 1
    server.close()
    server.close()
    assert tls.live() == before
    for use in (server.handshake, server.peer_certificate, server.cipher, server.end, lambda: server.read(1)):
        with pytest.raises(ClosedError):
            use()
    os.fstat(ends.left.fileno())  # the socket is the caller's


def test_what_openssl_does_not_take_is_named() -> None:
    before = tls.live()
    good = [OURS.certificate, OURS.key, AUTHORITY.pem]
    locked = AUTHORITY.issue("a", password=b"secret").key
    bad = [(0, b""), (0, b"nonsense"), (1, b""), (1, THEIRS.key), (1, locked), (2, b""), (2, OURS.key)]
    for place, text in bad:
        what = ("certificate", "key", "authorities")[place]
        with pytest.raises(BackendError, match=f"does not take the {what}: ."):
            Context(*[text if at == place else one for at, one in enumerate(good)])
    assert tls.live() == before


# ---- connections of Python's ssl ----------------------------------------------------------------------------------

CIPHERS = ("TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256", "TLS_AES_128_GCM_SHA256")


def python_context(folder: Path) -> ssl.SSLContext:
    """Give the context of a server that takes what the client likes best."""
    (folder / "pem").write_bytes(THEIRS.key + THEIRS.certificate)
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.load_cert_chain(folder / "pem")
    made.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    return made


@pytest.fixture(name="agreed")
def agreed_fixture(tmp_path: Path, ends: Ends) -> tuple[tls.Records, ssl.SSLSocket]:
    """A connection that Python's ssl has agreed on, taken over on the client's side; and the server's."""
    return agree(ends, python_context(tmp_path), {})


def agree(ends: Ends, server: ssl.SSLContext, options: dict[str, int]) -> tuple[tls.Records, ssl.SSLSocket]:
    client = ssl.create_default_context(cadata=AUTHORITY.pem.decode())
    client.check_hostname = False
    right, left = ends.python(client), ends.python(server, server=True)
    records = tls.records_of(right, **options)
    assert records is not None
    for side in (right, left):
        side.setblocking(True)
    thread = threading.Thread(target=left.do_handshake)
    thread.start()
    right.do_handshake()
    thread.join()
    right.setblocking(False)
    records.begin()
    return records, left


def test_of_ciphers_that_nobody_chose_the_fastest_is_asked_for(agreed: tuple[tls.Records, ssl.SSLSocket]) -> None:
    records, _ = agreed
    usual = [each["name"] for each in ssl.create_default_context().get_ciphers()][:3]
    if tuple(usual) != CIPHERS:
        pytest.skip(f"OpenSSL is configured to want {usual}")
    assert records.cipher() == "TLS_AES_128_GCM_SHA256"
    records.close()


def test_rows_are_sent_in_full_records_and_filled_from_them(agreed: tuple[tls.Records, ssl.SSLSocket]) -> None:
    records, server = agreed
    data = os.urandom(200_000)
    rows = [memoryview(data)[at : at + 1000] for at in range(0, 200_000, 1000)]
    assert records.write(rows) == 200_000
    assert not records.unsent
    found, sizes = b"", []
    while len(found) < 200_000:
        piece = server.recv(1 << 20)
        found += piece
        sizes.append(len(piece))
    assert found == data
    assert sizes == [16384] * 12 + [200_000 - 12 * 16384]
    server.sendall(data[:100_000])
    place = memoryview(bytearray(100_001))
    got = 0
    while got < 100_000:
        with contextlib.suppress(BlockingIOError):
            got += records.read_into([place[at : min(at + 777, 100_001)] for at in range(got, 100_001, 777)][:256])
    assert place[:100_000] == data[:100_000]
    assert (records.pending, records.over) == (False, False)
    records.close()


def test_what_the_socket_has_no_room_for_waits(agreed: tuple[tls.Records, ssl.SSLSocket]) -> None:
    records, server = agreed
    data = memoryview(os.urandom(MIB))
    sent = 0
    while took := records.write([data]):
        sent += took
    assert records.unsent
    found = 0
    while found < sent:
        found += len(server.recv(1 << 20))
        records.write([])
    assert found == sent
    assert records.write([data[:1]]) == 1
    assert server.recv(1) == data[:1]
    records.close()


def test_the_key_for_sending_is_replaced_here_too(tmp_path: Path, ends: Ends) -> None:
    records, server = agree(ends, python_context(tmp_path), {"rekey": 100_000})
    for _ in range(4):
        assert records.write([memoryview(bytes(100_000))]) == 100_000
        found = 0
        while found < 100_000:
            found += len(server.recv(1 << 20))
    assert records.updates == 3
    records.close()


def test_who_takes_no_more_may_have_said_why(agreed: tuple[tls.Records, ssl.SSLSocket]) -> None:
    records, server = agreed
    server.sendall(b"enough")
    server.shutdown(socket.SHUT_RDWR)
    refused = None
    while refused is None:
        try:
            records.write([memoryview(bytes(100_000))])
        except OSError as error:
            refused = error
    assert isinstance(refused, ConnectionError)
    assert records.read(100) == b"enough"
    with pytest.raises(OSError, match="without the end that TLS announces"):
        records.read(100)
    records.close()


def test_what_is_closed_is_not_used(agreed: tuple[tls.Records, ssl.SSLSocket]) -> None:
    records, _ = agreed
    with pytest.raises(ClosedError, match="begun before"):
        records.begin()
    records.close()
    records.close()
    with pytest.raises(ClosedError, match="was closed"):
        records.read(1)


def test_a_connection_is_left_to_the_kernel_where_a_context_says_so(ends: Ends) -> None:
    client = ssl.create_default_context()
    client.check_hostname = False
    client.options |= 1 << 3  # ssl.OP_ENABLE_KTLS, of Python 3.12
    assert tls.records_of(ends.python(client)) is None


def test_what_is_no_connection_of_python_is_not_taken_over() -> None:
    with pytest.raises(ClosedError, match="cannot be begun"):
        tls.Records(object(), 0, 1).begin()
