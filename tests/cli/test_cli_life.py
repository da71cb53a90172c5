"""A machine's life from outside: started, asked, paused, sent, watched, stopped, killed."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import termios
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli.cli_process import SMALL, Cli, gone, until


def test_run_detached_ask_pause_resume_stop(cli: Cli) -> None:
    started = cli.json("run", "--name", "a", *SMALL, "--detach")
    assert started["name"] == "a"
    (row,) = cli.json("ps")
    assert (row["name"], row["state"], row["pid"]) == ("a", "running", started["pid"])
    assert cli.json("pause", "a")["state"] == "paused"
    first = cli.json("stat", "a")
    time.sleep(0.1)
    second = cli.json("stat", "a")
    executed = [stat["stats"]["board"]["executed"] for stat in (first, second)]
    assert executed[0] == executed[1], "a paused guest executes nothing"
    assert cli.run("resume", "a").stdout == "a: running\n"
    until(
        lambda: cli.json("stat", "a")["stats"]["board"]["executed"] > executed[0], "it runs again"
    )
    assert "memory 16 MiB" in cli.run("stat", "a").stdout
    cli.run("stop", "a")
    until(lambda: gone(started["pid"]), "the process has ended")
    assert cli.machines() == {}
    assert not list(cli.runtime.glob("a.*"))


def test_a_name_is_taken_once(cli: Cli) -> None:
    cli.run("run", "--name", "a", *SMALL, "--detach")
    done = cli.run("run", "--name", "a", *SMALL, "--detach", code=3)
    assert "runs already" in done.stderr
    assert cli.machines() == {"a": "running"}


def test_a_machine_that_was_killed_leaves_its_name_free(cli: Cli) -> None:
    started = cli.json("run", "--name", "a", *SMALL, "--detach")
    os.kill(started["pid"], signal.SIGKILL)
    until(lambda: gone(started["pid"]), "it is dead")
    assert (cli.runtime / "a.sock").exists()
    assert cli.machines() == {}
    cli.run("stat", "a", code=3)
    cli.run("run", "--name", "a", *SMALL, "--detach")
    assert cli.machines() == {"a": "running"}


def test_a_machine_that_hangs_is_listed(cli: Cli) -> None:
    started = cli.json("run", "--name", "a", *SMALL, "--detach")
    os.kill(started["pid"], signal.SIGSTOP)
    try:
        assert cli.machines() == {"a": "not answering"}
    finally:
        os.kill(started["pid"], signal.SIGKILL)


def test_paused_and_a_definition_file(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "guest.toml"
    file.write_text(
        'name = "from-file"\nmemory = "64MiB"\n[guest]\nfill = "zero"\nheartbeat = "20ms"\n'
        f'[[slots]]\nname = "data"\ngpa = 0x100000000\nsize = 8192\n'
        f'backing = "file"\npath = "{tmp_path}/data"\n'
    )
    (tmp_path / "data").write_bytes(b"x" * 8192)
    cli.run("run", str(file), "--memory", "16MiB", "--paused", "--detach")
    stat = cli.stat("from-file")
    assert stat["state"] == "paused"
    assert stat["stats"]["board"]["executed"] == 0
    assert [slot["size_bytes"] for slot in stat["definition"]["slots"]] == [16 << 20, 8192]
    assert stat["definition"]["slots"][1]["backing"] == "file"
    assert cli.json("resume", "from-file")["state"] == "running"


def test_a_guest_that_ends(cli: Cli, tmp_path: Path) -> None:
    """In the foreground, its console in a file; exit status 0, nothing left."""
    out = tmp_path / "console"
    cli.run("run", *SMALL, "--stop-after-heartbeats", "3", "--console", f"file:{out}")
    assert "BYE" in out.read_text()
    assert cli.machines() == {}


def test_the_console_on_stdout(cli: Cli) -> None:
    done = cli.run("run", *SMALL, "--stop-after-heartbeats", "3")
    assert "FILLED" in done.stdout
    assert "BYE" in done.stdout, "the last of the output is not lost"
    assert "machine 'guest' runs" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_nothing_behind(cli: Cli, number: int) -> None:
    process = cli.background("run", "--name", "a", *SMALL)
    assert process.stderr is not None
    assert "runs" in process.stderr.readline()
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    assert cli.machines() == {}
    assert not list(cli.runtime.glob("a.*"))


def test_ctrl_c_while_waiting_for_a_machine(cli: Cli) -> None:
    path = cli.runtime / "in"
    process = cli.background("receive", "--listen", f"unix:{path}", "--name", "b")
    assert process.stderr is not None
    assert "listens" in process.stderr.readline()
    assert cli.state_of("b") == "listening"
    assert "no guest yet" in cli.run("pause", "b", code=3).stderr
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert not path.exists()
    assert cli.machines() == {}


def test_stat_watch(cli: Cli) -> None:
    cli.run(
        "run", "--name", "a", *SMALL, "--working-set", "1MiB", "--rate", "2000", "--detach"
    )  # fmt: skip
    watch = cli.background("stat", "a", "--watch", "0.2", "--json")
    assert watch.stdout is not None
    stats = [json.loads(watch.stdout.readline()) for _ in range(6)]
    watch.send_signal(signal.SIGINT)
    watch.communicate(timeout=20)
    rates = [stat["dirty"]["dirty-pages-rate"] for stat in stats]
    assert rates[0] is None  # nothing to compare with yet
    assert 100 < max(rates[1:]) < 20000, rates
    assert list(stats[-1]["stats"]["logs"]["ram"]["cursors"]), "it has a cursor of its own"
    until(
        lambda: not cli.stat("a")["stats"]["logs"]["ram"]["cursors"],
        "the cursor goes with its reader",
    )


# -- consoles


def test_console_attaches_and_leaves(cli: Cli) -> None:
    """On a terminal of its own: raw meanwhile, Ctrl-] leaves, the terminal as it was before."""
    cli.run("run", "--name", "a", *SMALL, "--heartbeat", "100ms", "--detach")
    controller, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)
    process = subprocess.Popen(
        cli.command("console", "a"), env=cli.environment,
        stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
    )  # fmt: skip
    try:
        seen = read_until(controller, rb"FILLED.*HB n=")
        assert b"Ctrl-] leaves" in seen
        assert not termios.tcgetattr(terminal)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)
        os.write(controller, b"v")
        read_until(controller, rb"VERIFY pages=\d+ wrong=0 ")
        os.write(controller, b"\x1d")
        assert process.wait(20) == 0
        assert termios.tcgetattr(terminal) == before
    finally:
        process.kill()
        process.wait()
        os.close(controller)
        os.close(terminal)
    assert cli.machines() == {"a": "running"}


def test_console_by_pipe(cli: Cli) -> None:
    cli.run("run", "--name", "a", *SMALL, "--detach")
    process = cli.background("console", "a", stdin=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("v")
    process.stdin.close()
    process.stdin = None
    line = next(line for line in process.stdout if line.startswith("VERIFY"))
    assert " wrong=0 " in line
    cli.run("stop", "a")
    process.communicate(timeout=20)
    assert process.returncode == 0


def test_run_on_a_terminal_ends_with_the_escape(cli: Cli) -> None:
    controller, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)
    process = subprocess.Popen(
        cli.command("run", "--name", "a", *SMALL), env=cli.environment,
        stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
    )  # fmt: skip
    try:
        read_until(controller, rb"HB n=")
        os.write(controller, b"v\x1d")
        read_until(controller, rb"stopped by Ctrl-\]")
        assert process.wait(20) == 0
        assert termios.tcgetattr(terminal) == before
    finally:
        process.kill()
        process.wait()
        os.close(controller)
        os.close(terminal)
    assert cli.machines() == {}


def test_the_console_at_a_socket(cli: Cli) -> None:
    path = cli.runtime / "console"
    cli.run("run", "--name", "a", *SMALL, "--console", f"unix:{path}", "--detach")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        assert b"FILLED" in read_until(client.fileno(), rb"HB n=")
        client.sendall(b"v")
        read_until(client.fileno(), rb"VERIFY .* code=1 ")
    cli.run("stop", "a")
    assert not path.exists()


def read_until(fd: int, pattern: bytes, timeout_s: float = 30.0) -> bytes:
    seen = b""
    deadline = time.monotonic() + timeout_s
    while not re.search(pattern, seen, re.S):
        assert select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0], seen[-500:]
        data = os.read(fd, 65536)
        assert data, seen[-500:]
        seen += data
    return seen


# -- migration


def check_report(report: dict[str, Any]) -> None:
    assert report["status"] == "completed"
    assert 0 < report["downtime"] < report["total-time"]
    assert sum(report["downtime-phases"].values()) == pytest.approx(report["downtime"], abs=0.01)
    assert list(report["downtime-phases"]) == [
        "stop", "final-harvest", "final-send", "state", "handover", "start",
    ]  # fmt: skip
    for name in (
        "transferred", "total", "duplicate", "normal", "remaining", "dirty-sync-count", "mbps",
        "dirty-pages-rate",
    ):  # fmt: skip
        assert report["ram"][name] >= 0, name
    assert {"pages-dirty", "pages-zero", "bytes-sent", "ms"} <= set(report["rounds"][0])


def verify_guest(cli: Cli, name: str) -> str:
    """Have the guest check all of its memory; its heartbeats up to then."""
    process = cli.background("console", name, stdin=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("v")
    process.stdin.flush()
    seen = ""
    for line in process.stdout:
        seen += line
        if line.startswith("VERIFY"):
            assert " wrong=0 " in line
            assert " wrong_visits=0 " in line
            break
    process.kill()
    process.communicate()
    return seen


BUSY = (*SMALL, "--working-set", "1MiB", "--rate", "2000")


@pytest.mark.parametrize("scheme", ["unix", "tcp"])
def test_send_and_receive(cli: Cli, scheme: str) -> None:
    uri = f"unix:{cli.runtime}/in" if scheme == "unix" else "tcp:127.0.0.1:0"
    source = cli.json("run", "--name", "a", *BUSY, "--detach")
    waiting = cli.json("receive", "--listen", uri, "--prealloc", "16MiB", "--detach")
    assert cli.machines() == {"a": "running", waiting["name"]: "listening"}
    report = cli.json("send", "a", waiting["uri"], "--downtime-limit", "1s", "--verify")
    check_report(report)
    assert report["verified"] is True
    until(lambda: gone(source["pid"]), "the source ends by itself")
    # On the same host it takes the name that the source has given back.
    until(lambda: cli.machines() == {"a": "running"}, "it is called as before")
    assert cli.stat("a")["pid"] == waiting["pid"]
    seen = verify_guest(cli, "a")
    assert "FILLED" not in seen, "it carries on, it does not start again"
    cli.run("stop", "a")
    until(
        lambda: all(path.name == ".lock" for path in cli.runtime.iterdir()),
        "nothing is left behind, once the process has ended",
    )


def test_send_for_people(cli: Cli) -> None:
    source = cli.background("run", "--name", "a", *BUSY, "--console", "none")
    until(lambda: cli.state_of("a") == "running", "it runs")
    cli.run("receive", "--listen", f"unix:{cli.runtime}/in", "--name", "b", "--detach")
    text = cli.run("send", "a", f"unix:{cli.runtime}/in", "--downtime-limit", "1s").stdout
    assert re.search(r"^round 0: 4,096 pages", text, re.M)
    assert "completed: the guest runs at unix:" in text
    assert "final-harvest" in text
    _, errors = source.communicate(timeout=20)
    assert source.returncode == 0
    assert "machine 'a' runs at unix:" in errors


def test_send_on_a_terminal(cli: Cli) -> None:
    """A live display; with a bandwidth that lets one see it."""
    cli.run("run", "--name", "a", *BUSY, "--detach")
    cli.run("receive", "--listen", f"unix:{cli.runtime}/in", "--name", "b", "--detach")
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        cli.command(
            "send", "a", f"unix:{cli.runtime}/in", "--downtime-limit", "1s", "--bandwidth", "24MiB"
        ),
        env={**cli.environment, "TERM": "xterm", "COLUMNS": "100"},
        stdin=terminal, stdout=terminal, stderr=terminal,
    )  # fmt: skip
    try:
        seen = read_until(controller, rb"completed.*final-harvest.*sum")
        for word in (b"pages left", b"bandwidth", b"dirty rate", b"expected downtime"):
            assert word in seen, word
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(controller)
        os.close(terminal)


def test_send_over_a_descriptor(cli: Cli) -> None:
    """fd:N names a descriptor of the command, not of the machine's process."""
    ours, theirs = socket.socketpair()
    cli.run("run", "--name", "a", *BUSY, "--detach")
    receiver = cli.background(
        "receive", "--listen", f"fd:{theirs.fileno()}", "--name", "b", "--console", "none",
        pass_fds=[theirs.fileno()],
    )  # fmt: skip
    until(lambda: cli.state_of("b") == "listening", "it listens")
    sender = cli.background(
        "send", "a", f"fd:{ours.fileno()}", "--downtime-limit", "1s", "--json",
        pass_fds=[ours.fileno()],
    )  # fmt: skip
    output, errors = sender.communicate(timeout=60)
    assert sender.returncode == 0, errors
    check_report(json.loads(output))
    assert cli.state_of("b") == "running"
    ours.close()
    theirs.close()
    cli.run("stop", "b")
    receiver.communicate(timeout=20)
    assert receiver.returncode == 0


def test_a_paused_guest_stays_paused(cli: Cli) -> None:
    cli.run("run", "--name", "a", *SMALL, "--paused", "--detach")
    cli.run("receive", "--listen", f"unix:{cli.runtime}/in", "--name", "b", "--detach")
    cli.json("send", "a", f"unix:{cli.runtime}/in")
    assert cli.state_of("b") == "paused"
    cli.run("resume", "b")
    verify_guest(cli, "b")


def test_nobody_listens(cli: Cli) -> None:
    cli.run("run", "--name", "a", *SMALL, "--detach")
    done = cli.run("send", "a", f"unix:{cli.runtime}/nobody", code=5)
    assert "cannot connect" in done.stderr
    failed = cli.json("send", "a", f"unix:{cli.runtime}/nobody", code=5)
    assert failed["status"] == "failed"
    assert "cannot connect" in failed["error-desc"]
    assert cli.machines() == {"a": "running"}


def test_a_limit_that_cannot_be_kept(cli: Cli) -> None:
    cli.run("run", "--name", "a", *SMALL, "--working-set", "8MiB", "--detach")
    cli.run("receive", "--listen", f"unix:{cli.runtime}/in", "--name", "b", "--detach")
    done = cli.run(
        "send", "a", f"unix:{cli.runtime}/in", "--downtime-limit", "10us", "--max-rounds", "3",
        "--compression", "none", code=7,
    )  # fmt: skip
    assert "runs on here" in done.stderr
    assert cli.state_of("a") == "running"
    until(lambda: cli.state_of("b") is None, "the destination has ended")
    assert "VERIFY" in verify_guest(cli, "a")
    assert "gave up" in (cli.runtime / "b.log").read_text()


def test_ctrl_c_calls_a_migration_off(cli: Cli) -> None:
    cli.run("run", "--name", "a", *SMALL, "--detach")
    cli.run("receive", "--listen", f"unix:{cli.runtime}/in", "--name", "b", "--detach")
    sender = cli.background("send", "a", f"unix:{cli.runtime}/in", "--bandwidth", "1MiB")
    until(lambda: "migration" in cli.stat("a"), "it is under way")
    done = cli.run("send", "a", f"unix:{cli.runtime}/in", code=3)
    assert "being migrated already" in done.stderr
    assert "while it is being migrated" in cli.run("pause", "a", code=3).stderr
    sender.send_signal(signal.SIGINT)
    _, errors = sender.communicate(timeout=20)
    assert sender.returncode == 130
    assert "Traceback" not in errors
    until(lambda: "migration" not in cli.stat("a"), "it is called off")
    assert cli.state_of("a") == "running"
    until(lambda: cli.state_of("b") is None, "the destination has given up")
    verify_guest(cli, "a")


def test_stop_in_the_middle_of_a_migration(cli: Cli) -> None:
    started = cli.json("run", "--name", "a", *SMALL, "--detach")
    cli.run("receive", "--listen", f"unix:{cli.runtime}/in", "--name", "b", "--detach")
    sender = cli.background("send", "a", f"unix:{cli.runtime}/in", "--bandwidth", "1MiB")
    until(lambda: "migration" in cli.stat("a"), "it is under way")
    cli.run("stop", "a")
    until(lambda: gone(started["pid"]), "the machine has ended")
    _, errors = sender.communicate(timeout=20)
    assert sender.returncode not in (0, None)
    assert "Traceback" not in errors
    until(lambda: cli.state_of("b") is None, "nothing was started there")


def test_a_destination_that_is_killed(cli: Cli) -> None:
    cli.run("run", "--name", "a", *SMALL, "--detach")
    waiting = cli.json("receive", "--listen", f"unix:{cli.runtime}/in", "--name", "b", "--detach")
    sender = cli.background("send", "a", f"unix:{cli.runtime}/in", "--bandwidth", "4MiB")
    until(lambda: "migration" in cli.stat("a"), "it is under way")
    os.kill(waiting["pid"], signal.SIGKILL)
    _, errors = sender.communicate(timeout=40)
    assert sender.returncode == 6, errors
    assert "stays here" in errors
    assert cli.state_of("a") == "running"
    cli.run("receive", "--listen", f"unix:{cli.runtime}/in", "--name", "b", "--detach")
    check_report(cli.json("send", "a", f"unix:{cli.runtime}/in", "--downtime-limit", "1s"))
    verify_guest(cli, "b")


def test_a_listener_survives_strangers(cli: Cli) -> None:
    waiting = cli.json("receive", "--listen", "tcp:127.0.0.1:0", "--name", "b", "--detach")
    port = int(waiting["uri"].rpartition(":")[2])
    for noise in (b"GET / HTTP/1.0\r\n\r\n", b"\0" * 4096, os.urandom(4096), b""):
        with socket.create_connection(("127.0.0.1", port), 5) as stranger:
            stranger.sendall(noise)
    assert cli.state_of("b") == "listening"
    cli.run("run", "--name", "a", *SMALL, "--detach")
    check_report(cli.json("send", "a", waiting["uri"], "--downtime-limit", "1s"))
    verify_guest(cli, "b")


def test_the_demo(cli: Cli) -> None:
    done = cli.run("demo", "--memory", "32MiB", "--working-set", "4MiB", "--rate", "2000")
    assert "all is well" in done.stdout
    assert re.search(r"VERIFY pages=\d+ wrong=0 ", done.stdout)
