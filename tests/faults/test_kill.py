"""Processes killed or hung in any phase of a migration, by the command line.

Whatever happens to one side: the guest runs on at one place and never at two, no dirty page is
lost for the next attempt, and what the command says and returns is what docs/cli.md promises.
"""

from __future__ import annotations

import random
import signal
import time

import pytest

from migrate.wire import FrameType
from tests.cli.cli_process import Cli, until
from tests.faults.gate import Gate
from tests.faults.sides import Side, Sides, last_line

QUICK = ("--downtime-limit", "1s", "--compression", "none")


def moves(sides: Sides, source: Side) -> None:
    """One more attempt, undisturbed: the guest arrives whole."""
    moves_to(source, sides.destination())


def moves_to(source: Side, destination: Side) -> None:
    report = source.cli.json("send", source.name, destination.uri, *QUICK)
    assert report["status"] == "completed"
    source.ended()
    destination.lives()
    destination.verify()


def stays(source: Side, errors: str) -> None:
    """The guest runs on at the source, and the message says so."""
    assert len(errors.strip().splitlines()) == 1, errors
    assert f"machine '{source.name}'" in errors
    assert "stays here" in errors or "runs on here" in errors, errors
    assert "phase" in errors or "gave up" in errors, errors
    assert source.state == "running"
    source.lives()
    source.verify()


@pytest.mark.parametrize(
    "moments",
    [
        [(FrameType.CONFIGURE, False), (FrameType.CONFIGURED, True), (FrameType.PAGES, False)],
        [(FrameType.ROUND_END, True), (FrameType.FINAL, True), (FrameType.STATE, False)],
        [(FrameType.STATE, True), (FrameType.LOADED, False)],
    ],
    ids=["set-up", "rounds", "switchover"],
)
def test_destination_killed_before_the_handover(
    cli: Cli, moments: list[tuple[FrameType, bool]]
) -> None:
    """One guest outlives its destinations, and then moves."""
    sides = Sides(cli)
    source = sides.guest()
    for kind, passes in moments:
        destination = sides.destination()
        with Gate(destination.uri, kind, destination.kill, passes=passes) as gate:
            done = cli.run("send", source.name, gate.uri, *QUICK, code=6)
            assert gate.struck.is_set()
        stays(source, done.stderr)
        destination.ended()
        assert destination.beats() == 0
    moves(sides, source)


def test_destination_killed_before_it_reads_the_handover(cli: Cli) -> None:
    """Nobody can tell from the source: it waits, and somebody decides."""
    sides = Sides(cli)
    source, destination = sides.guest(), sides.destination()
    with Gate(destination.uri, FrameType.HANDOVER, destination.kill) as gate:
        done = cli.run("send", source.name, gate.uri, *QUICK, code=8)
    uncertain(source, done.stderr)
    destination.ended()
    assert destination.beats() == 0
    cli.run("resume", source.name)
    source.lives()
    source.verify()
    moves(sides, source)


def test_destination_killed_after_it_started(cli: Cli) -> None:
    """Its guest died with it; the one at the source is whole, and may be woken."""
    sides = Sides(cli)
    source, destination = sides.guest(), sides.destination()
    with Gate(destination.uri, FrameType.RUNNING, destination.kill) as gate:
        done = cli.run("send", source.name, gate.uri, *QUICK, code=8)
    uncertain(source, done.stderr)
    destination.ended()
    cli.run("resume", source.name)
    source.lives()
    source.verify()


def test_confirmation_lost(cli: Cli) -> None:
    """The destination runs, the source cannot know: it stands still until it is stopped."""
    sides = Sides(cli)
    source, destination = sides.guest(), sides.destination()
    with Gate(destination.uri, FrameType.RUNNING) as gate:
        failed = cli.json("send", source.name, gate.uri, *QUICK, code=8)
    assert failed["status"] == "failed"
    assert failed["error-class"] == "HandoverUncertain"
    uncertain(source, failed["error-desc"])
    assert destination.state == "running"
    destination.lives()
    destination.verify()
    assert source.stands()
    cli.run("stop", source.name)
    source.ended()
    destination.lives()


def test_handover_lost(cli: Cli) -> None:
    """The destination never heard that the guest is its own: it starts nothing."""
    sides = Sides(cli)
    source, (destination, waiting) = sides.guest(), sides.waiting()
    with Gate(destination.uri, FrameType.HANDOVER) as gate:
        done = cli.run("send", source.name, gate.uri, *QUICK, code=8)
    uncertain(source, done.stderr)
    assert "nothing was started" in waiting.ends(6)
    assert destination.beats() == 0
    cli.run("resume", source.name)
    source.verify()


def uncertain(source: Side, message: str) -> None:
    """Paused at the source, and the message says what to do."""
    assert len(message.strip().splitlines()) == 1
    for words in (f"machine '{source.name}'", "paused here", "migrate stop", "migrate resume"):
        assert words in message
    assert source.state == "paused"
    assert source.stands()


def test_destination_killed_at_random(cli: Cli) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    sides = Sides(cli)
    source = sides.guest()
    for _ in range(3):
        destination = sides.destination()
        sender = cli.background("send", source.name, destination.uri, "--bandwidth", "20MiB")
        time.sleep(chance.uniform(0.1, 1.0))
        destination.kill()
        _, errors = sender.communicate(timeout=40)
        assert "Traceback" not in errors
        assert destination.state is None
        match sender.returncode:
            case 0:  # it had moved, and died over there
                source.ended()
                source = sides.guest()
            case 8:
                uncertain(source, errors)
                cli.run("resume", source.name)
                source.verify()
            case 5:  # before it connected
                assert "cannot connect" in errors
                source.verify()
            case code:
                assert code == 6, (code, errors)
                stays(source, errors)
    moves(sides, source)


# -- a destination that hangs


def test_destination_hangs(cli: Cli) -> None:
    """--timeout ends the attempt, wherever it stands; so does Ctrl-C."""
    sides = Sides(cli)
    source = sides.guest()
    for kind, timeout in [(FrameType.CONFIGURE, 1), (FrameType.STATE, 2)]:
        destination = sides.destination()
        gate = Gate(
            destination.uri, kind, lambda d=destination: d.kill(signal.SIGSTOP), goes_on=True
        )
        with gate:
            began = time.monotonic()
            done = cli.run(
                "send", source.name, gate.uri, *QUICK, "--timeout", f"{timeout}s", code=6
            )
            assert time.monotonic() - began < timeout + 4
            assert gate.struck.is_set()
            assert f"{timeout} s" in done.stderr, done.stderr
            stays(source, done.stderr)
        destination.kill()
    destination = sides.destination()
    sender = cli.background("send", source.name, destination.uri, "--bandwidth", "2MiB")
    until(lambda: "progress" in cli.stat(source.name).get("migration", {}), "pages are sent")
    destination.kill(signal.SIGSTOP)
    sender.send_signal(signal.SIGINT)
    _, errors = sender.communicate(timeout=10)
    assert sender.returncode == 130, errors
    assert "Traceback" not in errors
    until(lambda: "migration" not in cli.stat(source.name), "it is called off")
    source.lives()
    source.verify()
    destination.kill(signal.SIGCONT)
    destination.ended()
    assert destination.beats() == 0
    moves(sides, source)


# -- the source


@pytest.mark.parametrize("kind", [FrameType.CONFIGURE, FrameType.PAGES, FrameType.HANDOVER])
def test_source_killed_before_the_handover(cli: Cli, kind: FrameType) -> None:
    """The machine's process, at `kind`: nothing is started, and nothing is left behind."""
    sides = Sides(cli)
    source, (destination, waiting) = sides.guest(), sides.waiting()
    with Gate(destination.uri, kind, source.kill) as gate:
        done = cli.run("send", source.name, gate.uri, *QUICK, code=3)
        assert f"machine '{source.name}' has ended" in done.stderr
    if kind is FrameType.CONFIGURE:  # nothing had begun: it goes on listening
        until(lambda: "turned away" in waiting.text, "the connection was turned away")
        assert destination.state == "listening"
        moves_to(sides.guest(), destination)
        cli.run("stop", destination.name)
        waiting.ends(0)
        return
    said = last_line(waiting.ends(6))
    assert "nothing was started" in said
    assert "phase" in said
    assert destination.beats() == 0
    assert destination.state is None
    assert not (cli.runtime / f"{destination.name}.sock").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_client_of_send_killed(cli: Cli, number: int) -> None:
    """The command only: the machine's process calls the migration off, its guest stays."""
    sides = Sides(cli)
    source, (destination, waiting) = sides.guest(), sides.waiting()
    sender = cli.background("send", source.name, destination.uri, "--bandwidth", "2MiB")
    until(lambda: "progress" in cli.stat(source.name).get("migration", {}), "pages are sent")
    sender.send_signal(number)
    _, errors = sender.communicate(timeout=20)
    assert sender.returncode == (130 if number == signal.SIGINT else -number)
    assert "Traceback" not in errors
    assert "nothing was started" in last_line(waiting.ends(6))
    assert destination.beats() == 0
    until(lambda: "migration" not in cli.stat(source.name), "it is called off")
    source.lives()
    source.verify()
    moves(sides, source)
