"""The control socket: names and places, lines, and a server that survives whatever comes."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate import control
from migrate.control import (
    MAX_LINE_BYTES,
    Client,
    Json,
    RemoteError,
    SocketPlace,
    check_name,
    encode,
    error_from_json,
    error_to_json,
    exit_code_of,
    machine_names,
    parse_request_untrusted,
    runtime_dir,
    socket_path,
)
from migrate.control_server import Connection, ControlServer, take_untrusted
from migrate.errors import (
    HostError,
    MachineStateError,
    NotConverging,
    PeerError,
    UsageError,
)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory of the test's own, with a path that is short enough for sockets."""
    path = Path(tempfile.mkdtemp(prefix="migrate-"))
    monkeypatch.setenv("MIGRATE_RUNTIME_DIR", str(path))
    yield path
    shutil.rmtree(path)


def run(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """A test that is a trio task."""

    @functools.wraps(test)
    def body(*args: Any, **kwargs: Any) -> None:
        trio.run(functools.partial(test, *args, **kwargs))

    return body


# -- names and places


@pytest.mark.parametrize("name", ["a", "vm-1", "A.b_c", "0", "x" * 64])
def test_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "a/b", "-a", "_a", "a b", "a\n", "x" * 65, "ä", "a\0b"]
)
def test_names_that_could_be_a_path_or_an_option(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be a machine's name"):
        check_name(name)


def test_the_runtime_directory_is_closed_to_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = tmp_path / "run"
    monkeypatch.setenv("MIGRATE_RUNTIME_DIR", str(place))
    assert stat.S_IMODE(runtime_dir().stat().st_mode) == 0o700
    place.chmod(0o770)
    with pytest.raises(HostError, match="open to others"):
        runtime_dir()
    place.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HostError, match="not a directory"):
        runtime_dir()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
def test_a_runtime_directory_of_somebody_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = tmp_path / "run"
    place.mkdir(mode=0o700)
    os.chown(place, 12345, -1)
    monkeypatch.setenv("MIGRATE_RUNTIME_DIR", str(place))
    with pytest.raises(HostError, match="another user"):
        runtime_dir()


def test_where_the_runtime_directory_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MIGRATE_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert runtime_dir() == tmp_path / "migrate"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert runtime_dir().name == f"migrate-{os.getuid()}"


def test_a_socket_path_that_is_too_long(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = tmp_path / ("x" * 90)
    monkeypatch.setenv("MIGRATE_RUNTIME_DIR", str(place))
    with pytest.raises(UsageError, match="107 bytes"):
        socket_path("a" * 60)


def test_a_name_is_taken_and_given_back(runtime: Path) -> None:
    place = SocketPlace("a")
    assert stat.S_IMODE((runtime / "a.sock").stat().st_mode) == 0o600
    assert machine_names() == ["a"]
    with pytest.raises(MachineStateError, match="'a' runs already"):
        SocketPlace("a")
    place.close()
    place.close()
    assert machine_names() == []
    SocketPlace("a").close()


def test_the_socket_of_a_dead_process_is_replaced(runtime: Path) -> None:
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(runtime / "a.sock"))
    dead.close()
    with pytest.raises(MachineStateError, match="no machine 'a'"):
        Client("a")
    place = SocketPlace("a")
    Client("a").socket.close()
    place.close()


def test_a_socket_that_was_replaced_is_not_removed(runtime: Path) -> None:
    first = SocketPlace("a")
    first.listener.close()  # as if its process had died
    second = SocketPlace("a")
    first.close()
    assert machine_names() == ["a"]
    second.close()


def test_a_machine_takes_another_name(runtime: Path) -> None:
    one, two = SocketPlace("one"), SocketPlace("two")
    with pytest.raises(MachineStateError):
        one.rename("two")
    assert one.name == "one"
    two.close()
    one.rename("two")
    assert machine_names() == ["two"]
    Client("two").socket.close()
    one.close()
    assert machine_names() == []


# -- lines


@given(st.binary(max_size=200))
@settings(max_examples=300)
def test_no_line_does_more_than_be_refused(line: bytes) -> None:
    with contextlib.suppress(PeerError):
        parse_request_untrusted(line)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["id", "command", "arguments"]) | st.text(max_size=8), inner, max_size=4
        )
    ),
    max_leaves=8,
)


@given(JSON_VALUES)
@settings(max_examples=300)
def test_any_json_is_a_request_or_refused(value: Any) -> None:
    try:
        request = parse_request_untrusted(json.dumps(value).encode())
    except PeerError as error:
        assert error.role == "control client"
    else:
        assert isinstance(request.command, str)
        assert isinstance(request.arguments, dict)


def test_deep_json_is_refused() -> None:
    with pytest.raises(PeerError):
        parse_request_untrusted(b"[" * 60000)


def test_errors_cross_with_class_message_and_code() -> None:
    for error in (NotConverging("too fast"), PeerError("nonsense", role="source", phase="final")):
        back = error_from_json(json.loads(encode(error_to_json(error))))
        assert str(back) == str(error)
        assert exit_code_of(back) == error.exit_code
        # Passed on once more, it is still the same.
        assert error_to_json(back) == error_to_json(error)


@pytest.mark.parametrize("value", [None, {}, [], {"class": 1, "message": "x", "exit-code": 1}])
def test_an_error_in_no_known_form(value: object) -> None:
    assert exit_code_of(error_from_json(value)) == 1


@pytest.mark.parametrize(
    "arguments",
    [{"n": "1"}, {"n": True}, {"n": 1.5}, {"n": None}, {}, {"n": 1, "z": 1}, {"n": 1, "deep": 3}],
)
def test_arguments_that_do_not_fit(arguments: Json) -> None:
    with pytest.raises(UsageError):
        take_untrusted(arguments, n=(int, ...), deep=(str, None))


def test_arguments() -> None:
    assert take_untrusted({"a-b": 1}, a_b=(float, ...), c=(str, None)) == {"a_b": 1.0, "c": None}


# -- the server


async def _echo(connection: Connection, arguments: Json) -> Json:
    for number in range(arguments.get("events", 0)):
        connection.emit({"event": "tick", "number": number})
    return arguments


async def _fail(_: Connection, arguments: Json) -> Json:
    raise NotConverging("the guest is too quick")


async def _break(_: Connection, arguments: Json) -> Json:
    raise ZeroDivisionError("oh")


async def _unspeakable(connection: Connection, arguments: Json) -> float:
    if arguments:
        connection.emit({"event": "x", "value": object()})
    return float("nan")


async def _upgrade(connection: Connection, arguments: Json) -> Json:
    async def loud(stream: trio.abc.Stream) -> None:
        async for data in stream:
            await stream.send_all(bytes(data).upper())

    connection.upgrade = loud
    return {}


async def _from_thread(connection: Connection, arguments: Json) -> Json:
    await trio.to_thread.run_sync(connection.emit, {"event": "from-thread"})
    return {}


async def _size_of_fds(connection: Connection, arguments: Json) -> list[int]:
    return [os.fstat(fd).st_size for fd in connection.fds]


class Slow:
    """A command that goes on until its client is gone."""

    def __init__(self) -> None:
        self.cancelled = trio.Event()

    async def __call__(self, connection: Connection, arguments: Json) -> Json:
        try:
            await trio.sleep_forever()
        finally:
            self.cancelled.set()
        return {}


@contextlib.asynccontextmanager
async def serving(name: str = "m") -> AsyncIterator[tuple[ControlServer, Slow]]:
    slow = Slow()
    server = ControlServer({
        "echo": _echo, "fail": _fail, "break": _break, "upgrade": _upgrade, "slow": slow,
        "thread": _from_thread, "unspeakable": _unspeakable, "fds": _size_of_fds,
    })  # fmt: skip
    place = SocketPlace(name)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve, place.listener)
            with trio.fail_after(20):
                yield server, slow
            nursery.cancel_scope.cancel()
    finally:
        place.close()


def in_thread(work: Callable[[], Any]) -> Awaitable[Any]:
    return trio.to_thread.run_sync(work)


def ask(command: str, arguments: Json | None = None, **options: Any) -> Awaitable[Any]:
    return in_thread(lambda: control.ask("m", command, arguments, **options))


@run
async def test_return_events_and_errors(runtime: Path) -> None:
    async with serving():
        events: list[Json] = []
        answer = await ask("echo", {"events": 3}, on_event=events.append)
        assert answer == {"events": 3}
        assert [event["number"] for event in events] == [0, 1, 2]
        await ask("thread", on_event=events.append)
        assert events[-1] == {"event": "from-thread"}
        with pytest.raises(RemoteError, match="too quick") as caught:
            await ask("fail")
        assert exit_code_of(caught.value) == 7
        with pytest.raises(RemoteError, match="unknown command 'nonsense'") as caught:
            await ask("nonsense")
        assert exit_code_of(caught.value) == 2


@run
async def test_a_defect_in_a_command_does_not_end_the_machine(
    runtime: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async with serving():
        with pytest.raises(RemoteError, match="ZeroDivisionError: oh"):
            await ask("break")
        for arguments in ({}, {"event": 1}):  # answers that are no JSON
            with pytest.raises(MachineStateError, match="has ended"):
                await ask("unspeakable", arguments)
        assert await ask("echo") == {}
    assert "ZeroDivisionError" in capfd.readouterr().err


@run
async def test_many_requests_on_one_connection_and_many_connections(runtime: Path) -> None:
    async with serving():

        def converse(number: int) -> None:
            with Client("m") as client:
                for step in range(20):
                    assert client.call("echo", {"n": number, "step": step})["step"] == step

        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(trio.to_thread.run_sync, converse, number)


async def raw(data: bytes, *, half_close: bool = True) -> list[Json]:
    """What the server answers to raw bytes, until it closes."""
    stream = await trio.open_unix_socket(str(socket_path("m")))
    answer = b""
    async with stream:
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(data)
            if half_close:
                await stream.send_eof()
        with contextlib.suppress(trio.BrokenResourceError):
            async for part in stream:
                answer += part
    return [json.loads(line) for line in answer.splitlines()]


@run
async def test_lines_that_are_no_requests(runtime: Path) -> None:
    hostile = [
        b"\n", b"nonsense\n", b"[]\n", b'{"command":1}\n', b'{"id":{},"command":"echo"}\n',
        b'{"command":"echo","arguments":[]}\n', b'{"command":"echo","more":1}\n', b"\xff\xfe\n",
        b"[" * 50000 + b"\n", b"9" * 60000 + b"\n", b'{"command":"echo","arguments":{"x":NaN}}\n',
        b'{"id":' + b"1" * 100 + b',"command":"echo"}\n',
    ]  # fmt: skip
    async with serving():
        for line in hostile:
            answers = await raw(line + b'{"id":7,"command":"echo"}\n')
            assert answers[-1] == {"id": 7, "return": {}}, line[:40]
            assert len(answers) == 2
            assert "error" in answers[0], line[:40]


@run
async def test_a_line_that_is_too_long_ends_the_connection(runtime: Path) -> None:
    async with serving():
        for line in (b"x" * (1 << 20), b'{"command":"' + b"x" * MAX_LINE_BYTES + b'"}\n'):
            answers = await raw(line)
            assert [answer["error"]["exit-code"] for answer in answers] in ([4], [])
        assert await ask("echo") == {}


@run
async def test_random_bytes(runtime: Path) -> None:
    noise = os.urandom(1 << 16)
    async with serving():
        for start in range(0, len(noise), 4096):
            await raw(noise[start : start + 4096])
        assert await ask("echo") == {}


@run
async def test_clients_that_say_nothing_do_not_keep_others_out(runtime: Path) -> None:
    async with serving():
        silent = [await trio.open_unix_socket(str(socket_path("m"))) for _ in range(40)]
        assert await ask("echo") == {}
        for stream in silent:
            await stream.aclose()


@run
async def test_more_connections_than_there_may_be(runtime: Path) -> None:
    async with serving():
        silent = [await trio.open_unix_socket(str(socket_path("m"))) for _ in range(70)]
        await trio.sleep(0.1)
        for stream in silent:
            await stream.aclose()
        while True:  # the places are free again, a moment later
            try:
                assert await ask("echo") == {}
            except MachineStateError:
                await trio.sleep(0.02)
            else:
                break


@run
async def test_a_client_that_leaves_cancels_what_it_asked_for(runtime: Path) -> None:
    async with serving() as (server, slow):
        stream = await trio.open_unix_socket(str(socket_path("m")))
        await stream.send_all(b'{"command":"slow"}\n')
        await trio.sleep(0.05)
        assert not slow.cancelled.is_set()
        await stream.aclose()
        with trio.fail_after(3):
            await slow.cancelled.wait()
            await server.idle()


@run
async def test_a_client_that_only_stops_talking_is_answered(runtime: Path) -> None:
    async with serving():
        assert await raw(b'{"id":"x","command":"echo"}\n') == [{"id": "x", "return": {}}]


@run
async def test_a_reader_that_does_not_read_holds_nothing_up(runtime: Path) -> None:
    async with serving():
        stream = await trio.open_unix_socket(str(socket_path("m")))
        await stream.send_all(b'{"command":"echo","arguments":{"events":100000}}\n')
        await trio.sleep(0.1)
        assert await ask("echo") == {}
        await stream.aclose()


@run
async def test_descriptors_come_along_and_are_closed(runtime: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 123)
    before = len(list(Path("/proc/self/fd").iterdir()))
    async with serving():

        def send() -> Any:
            with Client("m") as client, file.open("rb") as opened:
                return client.call("fds", fds=[opened.fileno()])

        assert await in_thread(send) == [123]
        await trio.sleep(0.05)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@run
async def test_a_connection_becomes_something_else(runtime: Path) -> None:
    async with serving():
        stream = await trio.open_unix_socket(str(socket_path("m")))
        await stream.send_all(b'{"id":1,"command":"upgrade"}\n')
        assert json.loads(await stream.receive_some()) == {"id": 1, "return": {}}
        await stream.send_all(b"hello\n")
        assert await stream.receive_some() == b"HELLO\n"
        await stream.aclose()


def test_a_process_that_does_not_answer(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = SocketPlace("m")  # listens, and nobody serves it
    with pytest.raises(MachineStateError, match=r"did not answer within 0\.1 s"):
        control.ask("m", "status", timeout_s=0.1)
    place.close()


def test_a_process_that_ends_meanwhile(runtime: Path) -> None:
    place = SocketPlace("m")
    with Client("m") as client:
        accepted, _ = place.listener.accept()
        accepted.close()
        with pytest.raises(MachineStateError, match="has ended"):
            client.call("status")
    place.close()


@pytest.mark.parametrize("answer", [b"nonsense\n", b"[]\n", b'{"id":99,"return":1}\n'])
def test_a_process_that_answers_nonsense(runtime: Path, answer: bytes) -> None:
    place = SocketPlace("m")
    with Client("m") as client:
        accepted, _ = place.listener.accept()
        accepted.sendall(answer)
        with pytest.raises(PeerError, match="machine m"):
            client.call("status")
        accepted.close()
    place.close()
