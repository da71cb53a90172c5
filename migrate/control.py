"""The control socket's names, lines and client (layer 5; the server is daemon.py).

Knows where machines are found, how a request and its answers look, and how to ask. No trio here:
the client is plain blocking sockets, so that `migrate ps` starts fast.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from migrate.errors import HostError, MachineStateError, MigrateError, PeerError, UsageError

MAX_LINE_BYTES: Final = 65536
"""Longest line of either direction, its newline included."""
MAX_SOCKET_PATH_BYTES: Final = 107
"""sun_path of sockaddr_un, less the final zero."""
ANSWER_TIMEOUT_S: Final = 5.0

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Json = dict[str, Any]


class RemoteError(MigrateError):
    """An error that the machine's process reported; message and code are its own."""

    def __init__(self, class_name: str, message: str, exit_code: int) -> None:
        self.class_name = class_name
        self.remote_exit_code = exit_code
        super().__init__(message)


# -- where machines are found


def check_name(name: str) -> str:
    """The name, if a machine may be called so. Raises UsageError."""
    if _NAME.fullmatch(name) is None:
        raise UsageError(
            f"{name[:80]!r} cannot be a machine's name: 1 to 64 letters, digits, '.', '_' or '-', "
            "a letter or digit first"
        )
    return name


def runtime_dir() -> Path:
    """The directory of the machines' sockets, made if need be.

    Raises HostError if it is somebody else's or open to others: whoever could put a socket there
    could pose as a machine.
    """
    if own := os.environ.get("MIGRATE_RUNTIME_DIR"):
        path = Path(own)
    elif xdg := os.environ.get("XDG_RUNTIME_DIR"):
        path = Path(xdg) / "migrate"
    else:
        path = Path(f"/tmp/migrate-{os.getuid()}")
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise HostError(f"cannot make the runtime directory {path}: {error.strerror}") from error
    if not stat.S_ISDIR(status.st_mode):
        raise HostError(f"the runtime directory {path} is not a directory")
    if status.st_uid != os.getuid():
        raise HostError(f"the runtime directory {path} belongs to another user")
    if status.st_mode & 0o077:
        raise HostError(f"the runtime directory {path} is open to others: chmod 700 {path}")
    return path


def socket_path(name: str) -> Path:
    """Where the machine `name` listens. Raises UsageError, HostError."""
    path = runtime_dir() / f"{check_name(name)}.sock"
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise UsageError(
            f"the socket path {path} is over {MAX_SOCKET_PATH_BYTES} bytes: "
            "take a shorter name or MIGRATE_RUNTIME_DIR"
        )
    return path


def log_path(name: str) -> Path:
    """Where a detached machine's process writes what it has to say."""
    return runtime_dir() / f"{check_name(name)}.log"


def machine_names() -> list[str]:
    """The names that have a socket, whether or not anybody answers there."""
    found = (path.name.removesuffix(".sock") for path in runtime_dir().glob("*.sock"))
    return sorted(name for name in found if _NAME.fullmatch(name))


class SocketPlace:
    """A listening socket at a machine's name; `listener` is for whoever serves it.

    A socket whose process is dead is replaced; one that is answered is a MachineStateError.
    """

    def __init__(self, name: str) -> None:
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._path: Path | None = None
        self._inode = 0
        try:
            self._put(name)
        except BaseException:
            self.listener.close()
            raise
        self.name = name

    def rename(self, name: str) -> None:
        """Answer to another name from now on. Raises MachineStateError if it is taken."""
        if name == self.name:
            return
        path = socket_path(name)
        with _directory_lock():
            refuse_taken(name, path)
            assert self._path is not None
            self._path.rename(path)
            self._path = path
        self.name = name

    def close(self) -> None:
        """Stop listening; the name is free. Any number of times."""
        self.listener.close()
        if self._path is not None:
            # A later machine of the same name may have replaced a socket that it found dead.
            with contextlib.suppress(OSError):
                if self._path.lstat().st_ino == self._inode:
                    self._path.unlink()
            self._path = None

    def _put(self, name: str) -> None:
        path = socket_path(name)
        temporary = path.with_name(f".{os.getpid()}.new")
        with _directory_lock():
            refuse_taken(name, path)
            try:
                temporary.unlink(missing_ok=True)
                self.listener.bind(os.fspath(temporary))
                temporary.chmod(0o600)
                self.listener.listen(16)
                self._inode = temporary.lstat().st_ino
                # In place only once it listens: whoever sees the socket is answered.
                temporary.rename(path)
            except OSError as error:
                temporary.unlink(missing_ok=True)
                raise HostError(f"cannot listen on {path}: {error.strerror}") from error
        self._path = path


@contextlib.contextmanager
def _directory_lock() -> Iterator[None]:
    """One process at a time looks whether a name is free and takes it."""
    fd = os.open(runtime_dir() / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def refuse_taken(name: str, path: Path) -> None:
    """Raises MachineStateError if a machine of this name answers there."""
    probe = _connect(path)
    if probe is not None:
        probe.close()
        raise MachineStateError(
            f"a machine {name!r} runs already: choose another --name, or `migrate stop {name}`"
        )


def _connect(path: Path) -> socket.socket | None:
    """A connection, or None where nobody listens."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    connection.settimeout(ANSWER_TIMEOUT_S)
    try:
        connection.connect(os.fspath(path))
    except (ConnectionRefusedError, FileNotFoundError):
        connection.close()
        return None
    except OSError as error:
        connection.close()
        raise HostError(f"cannot reach {path}: {error.strerror or error}") from error
    return connection


# -- lines


@dataclass(frozen=True, slots=True)
class Request:
    id: int | str | None
    command: str
    arguments: Json


def parse_request_untrusted(line: bytes) -> Request:
    """The request in a line. Raises PeerError."""
    try:
        value = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise PeerError(f"not a line of JSON: {error}"[:200], role="control client") from None
    if not isinstance(value, dict):
        raise PeerError("a request is a JSON object", role="control client")
    number = value.get("id")
    if not (number is None or (isinstance(number, int | str) and len(str(number)) <= 64)):
        raise PeerError("an id is a short string or number", role="control client")
    command = value.get("command")
    if not isinstance(command, str):
        raise PeerError("a request has a command", role="control client")
    arguments = value.get("arguments", {})
    if not isinstance(arguments, dict):
        raise PeerError("arguments are a JSON object", role="control client")
    if left_over := sorted(set(value) - {"id", "command", "arguments"}):
        raise PeerError(f"unknown field {left_over[0][:40]!r}", role="control client")
    return Request(number, command, arguments)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def encode(line: Json) -> bytes:
    """A line of the protocol, newline included."""
    return json.dumps(line, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def exit_code_of(error: MigrateError) -> int:
    return error.remote_exit_code if isinstance(error, RemoteError) else error.exit_code


def error_to_json(error: MigrateError) -> Json:
    name = error.class_name if isinstance(error, RemoteError) else type(error).__name__
    return {"class": name, "message": str(error), "exit-code": exit_code_of(error)}


def error_from_json(value: object) -> RemoteError:
    match value:
        case {"class": str(name), "message": str(message), "exit-code": int(code)}:
            return RemoteError(name, message, code)
    return RemoteError("MigrateError", f"an error in no known form: {value!r}"[:200], 1)


# -- the client


class Client:
    """A connection to a machine's process. Blocking; a context manager."""

    def __init__(self, name: str) -> None:
        """Raises MachineStateError if there is no such machine."""
        connection = _connect(socket_path(name))
        if connection is None:
            raise MachineStateError(f"no machine {name!r} runs here; `migrate ps` lists those")
        self.name = name
        self.socket = connection
        self._pending = b""
        self._next_id = 0

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def call(
        self,
        command: str,
        arguments: Json | None = None,
        *,
        on_event: Callable[[Json], None] | None = None,
        timeout_s: float | None = ANSWER_TIMEOUT_S,
        fds: Sequence[int] = (),
    ) -> Any:
        """What the command returns; `fds` go with it.

        Raises RemoteError with the machine's own error, and MachineStateError if the machine
        ends or stays silent for `timeout_s` (None: no limit).
        """
        self._next_id += 1
        request = {"id": self._next_id, "command": command, "arguments": arguments or {}}
        self.socket.settimeout(timeout_s)
        try:
            line = encode(request)
            sent = socket.send_fds(self.socket, [line], fds) if fds else 0
            self.socket.sendall(line[sent:])
            while True:
                answer = json.loads(self._line())
                if not isinstance(answer, dict) or answer.get("id") not in (self._next_id, None):
                    raise PeerError("an answer to no request", role=f"machine {self.name}")
                if "event" in answer:
                    if on_event is not None:
                        on_event({key: value for key, value in answer.items() if key != "id"})
                elif "error" in answer:
                    raise error_from_json(answer["error"])
                else:
                    return answer.get("return")
        except TimeoutError:
            raise MachineStateError(
                f"machine {self.name!r} did not answer within {timeout_s:g} s"
            ) from None
        except ValueError as error:
            raise PeerError(f"not JSON: {error}", role=f"machine {self.name}") from None
        except OSError as error:
            raise MachineStateError(f"machine {self.name!r} has ended: {error.strerror}") from error

    def console(self) -> tuple[socket.socket, bytes]:
        """Make this connection the console: the socket, and what has come of it already."""
        self.call("console")
        self.socket.settimeout(None)
        return self.socket, self._pending

    def _line(self) -> bytes:
        while b"\n" not in self._pending:
            if len(self._pending) > MAX_LINE_BYTES * 16:
                raise PeerError("a line without end", role=f"machine {self.name}")
            data = self.socket.recv(65536)
            if not data:
                raise ConnectionResetError(0, "it closed the connection")
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return line


def ask(name: str, command: str, arguments: Json | None = None, **options: Any) -> Any:
    """One question to one machine. Raises as Client."""
    with Client(name) as client:
        return client.call(command, arguments, **options)
