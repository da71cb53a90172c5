"""Links between hosts: URIs, connecting, listening, and exact vectored I/O (layer 3).

Knows nothing of frames or pages. A `Link` is a connected stream socket in blocking mode, used by
one worker thread a direction: the kernel then moves a whole batch in one call, with the GIL
released, from the guest's memory or into it. Time limits are the kernel's (SO_RCVTIMEO and
SO_SNDTIMEO); `abort` from any other thread ends a call that is under way.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import re
import socket
import stat
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from migrate.errors import HostError, MigrateError, UsageError

MAX_IOV: Final = 1024
"""UIO_MAXIOV of the kernel: the most buffers that one sendmsg or recvmsg takes."""

FAULTS_OF_THE_CALLER: Final = frozenset({
    errno.ECONNABORTED, errno.EPROTO, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.ENONET, errno.ENOPROTOOPT, errno.EPERM,
})  # fmt: skip
"""accept(2) hands on what befell the connection that it would have taken."""


class LinkLost(MigrateError):
    """The connection ended, timed out or was aborted."""

    exit_code = 6
    wire_code = 11


@dataclass(frozen=True, slots=True)
class Address:
    """A parsed URI, in QEMU's notation."""

    scheme: Literal["tcp", "unix", "fd"]
    host: str = ""
    port: int = 0
    path: str = ""
    fd: int = -1

    def __str__(self) -> str:
        if self.scheme == "tcp":
            host = f"[{self.host}]" if ":" in self.host else self.host
            return f"tcp:{host}:{self.port}"
        return f"unix:{self.path}" if self.scheme == "unix" else f"fd:{self.fd}"


def parse_uri(uri: str) -> Address:
    """`tcp:HOST:PORT` (IPv6 as `tcp:[::1]:PORT`), `unix:PATH`, `fd:N`. Raises UsageError."""
    scheme, _, rest = uri.partition(":")
    if scheme == "tcp":
        match = re.fullmatch(r"(?:\[([0-9a-fA-F:.%\w]+)\]|([^:\[\]]*)):(\d{1,5})", rest)
        if match and int(match.group(3)) < 65536:
            try:
                (match.group(2) or "").encode("idna")
            except UnicodeError as error:
                raise UsageError(f"{uri!r}: no host can have such a name ({error})") from None
            return Address("tcp", host=match.group(1) or match.group(2), port=int(match.group(3)))
        raise UsageError(f"{uri!r}: write tcp:HOST:PORT, or tcp:[ADDRESS]:PORT for IPv6")
    if scheme == "unix" and rest:
        if len(os.fsencode(rest)) > 107:
            raise UsageError(f"{uri!r}: a unix socket's path may have 107 bytes at most")
        return Address("unix", path=rest)
    if scheme == "fd" and re.fullmatch(r"\d{1,6}", rest):
        return Address("fd", fd=int(rest))
    raise UsageError(f"unknown address {uri!r}; write tcp:HOST:PORT, unix:PATH or fd:N")


class Link:
    """A connected stream. Sending and receiving may each be done by one thread at a time."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self._sock = sock
        self.peer = peer
        self.local = _is_local(sock)
        """Whether the other end is on this host."""
        self.bytes_sent = 0
        self.bytes_received = 0
        self._timeout_s: float | None = None
        sock.setblocking(True)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, option, 1 << 20)

    def set_timeout(self, seconds: float | None) -> None:
        """The longest that one kernel call may make no progress at all; None: for ever."""
        whole = int(seconds or 0)
        micro = int(((seconds or 0) - whole) * 1e6)
        value = struct.pack("@ll", whole, micro)
        self._timeout_s = seconds
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)

    def send(self, buffers: Sequence[bytes | bytearray | memoryview]) -> None:
        """All of `buffers`, in order, without copying them. Raises LinkLost."""
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        total = sum(len(view) for view in views)
        sent = self._send_some(views[:MAX_IOV])
        self.bytes_sent += total
        if sent == total:
            return
        while True:  # rare: a signal or a full buffer cut the call short
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if not views:
                return
            views[0] = views[0][sent:]
            sent = self._send_some(views[:MAX_IOV])

    def _send_some(self, views: list[memoryview]) -> int:
        try:
            return self._sock.sendmsg(views)
        except BlockingIOError:
            raise LinkLost(f"{self.peer}: the link took no data within the time limit") from None
        except OSError as error:
            raise LinkLost(f"{self.peer}: the link was lost while sending ({error})") from None

    def receive_into(self, buffers: Sequence[memoryview | bytearray]) -> None:
        """Fill all of `buffers`, in order, straight from the kernel. Raises LinkLost."""
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        while views:
            try:
                if len(views) == 1:
                    got = self._sock.recv_into(views[0], len(views[0]), socket.MSG_WAITALL)
                else:
                    got = self._sock.recvmsg_into(views[:MAX_IOV], 0, socket.MSG_WAITALL)[0]
            except OSError as error:
                raise self._lost(error) from None
            if got == 0 and any(len(view) for view in views):
                raise self._closed()
            self.bytes_received += got
            while views and got >= len(views[0]):
                got -= len(views.pop(0))
            if views and got:
                views[0] = views[0][got:]

    def receive(self, n_bytes: int) -> bytearray:
        """Exactly `n_bytes`; the caller has bounded the number. The time limit holds for all of
        them together: a peer that drips byte after byte does not stretch it.
        """
        data = bytearray(n_bytes)
        left = memoryview(data)
        started = time.monotonic()
        while left:
            try:
                got = self._sock.recv_into(left, len(left), socket.MSG_WAITALL)
            except OSError as error:
                raise self._lost(error) from None
            if got == 0:
                raise self._closed()
            self.bytes_received += got
            left = left[got:]
            if left and self._timeout_s and time.monotonic() - started >= self._timeout_s:
                raise LinkLost(
                    f"{self.peer}: no more than {n_bytes - len(left)} of {n_bytes} bytes"
                    " came within the time limit"
                )
        return data

    def _lost(self, error: OSError) -> LinkLost:
        if isinstance(error, BlockingIOError):
            return LinkLost(f"{self.peer}: nothing came within the time limit")
        return LinkLost(f"{self.peer}: the link was lost ({error})")

    def _closed(self) -> LinkLost:
        return LinkLost(f"{self.peer}: the other side closed the connection")

    def abort(self) -> None:
        """Any thread: end every call under way and all later ones with LinkLost."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close; what was sent is still delivered."""
        self._sock.close()


def _is_local(sock: socket.socket) -> bool:
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return True
    try:
        host: str = sock.getpeername()[0]
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except (OSError, ValueError):
        return False


def connect(address: Address, timeout_s: float = 10.0) -> Link:
    """Connect to a listening destination. Raises HostError; blocks for `timeout_s` at most."""
    try:
        if address.scheme == "fd":
            return Link(_socket_of_fd(address.fd), str(address))
        if address.scheme == "unix":
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.settimeout(timeout_s)
                sock.connect(address.path)
            except OSError:
                sock.close()
                raise
            return Link(sock, str(address))
        sock = socket.create_connection((address.host or "localhost", address.port), timeout_s)
    except OSError as error:
        raise HostError(
            f"cannot connect to {address}: {error.strerror or error};"
            " is `migrate receive` listening there?"
        ) from error
    return Link(sock, str(address))


def _socket_of_fd(fd: int) -> socket.socket:
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise UsageError(f"fd:{fd} is not a socket")
        sock = socket.socket(fileno=os.dup(fd))
    except OSError as error:
        raise UsageError(f"fd:{fd} is not open in this process ({error.strerror})") from error
    if sock.type != socket.SOCK_STREAM:
        sock.close()
        raise UsageError(f"fd:{fd} is not a stream socket")
    return sock


class Listener:
    """A place where a source can connect. `sock` is None where the URI is a connected fd."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.sock: socket.socket | None = None
        self._unlink: tuple[str, int, int] | None = None
        self._ready: Link | None = None
        try:
            if address.scheme == "fd":
                sock = _socket_of_fd(address.fd)
                if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    self.sock = sock
                else:
                    self._ready = Link(sock, str(address))
            elif address.scheme == "unix":
                self.sock = self._listen_unix(address.path)
            else:
                family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
                self.sock = socket.create_server((address.host, address.port), family=family)
                self.address = Address("tcp", address.host, self.sock.getsockname()[1])
        except OSError as error:
            raise HostError(f"cannot listen on {address}: {error.strerror or error}") from error

    def _listen_unix(self, path: str) -> socket.socket:
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.lstat(path).st_mode) and not _answers(path):
                Path(path).unlink()  # left behind by a process that is gone
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(path)
            Path(path).chmod(0o600)
            info = os.lstat(path)
            self._unlink = (path, info.st_dev, info.st_ino)
            sock.listen(16)
        except OSError:
            sock.close()
            raise
        return sock

    def accept(self) -> Link:
        """The next connection. Blocks; to be called when `sock` is readable.

        Raises LinkLost if that connection is gone already, HostError if there will be no more.
        """
        if self.sock is None:
            if self._ready is None:
                raise HostError(f"{self.address} was used up by the connection before")
            link, self._ready = self._ready, None
            return link
        try:
            sock, peer = self.sock.accept()
        except OSError as error:
            if error.errno in FAULTS_OF_THE_CALLER:
                raise LinkLost(f"{self.address}: a connection was lost ({error})") from None
            raise HostError(f"cannot accept on {self.address}: {error.strerror}") from error
        if isinstance(peer, tuple):
            return Link(sock, str(Address("tcp", peer[0], peer[1])))
        return Link(sock, str(self.address))

    def close(self) -> None:
        """Stop listening; a unix socket's path goes with it, if it is still ours."""
        if self.sock is not None:
            self.sock.close()
        if self._unlink is not None:
            path, device, inode = self._unlink
            self._unlink = None
            with contextlib.suppress(OSError):
                info = os.lstat(path)
                if (info.st_dev, info.st_ino) == (device, inode):
                    Path(path).unlink()
        if self._ready is not None:
            self._ready.close()


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except OSError:
            return False
        return True
