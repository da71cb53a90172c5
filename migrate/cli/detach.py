"""Detaching: the machine's process goes on by itself, the command returns (layer 5).

The command forks before anything heavy is imported or any thread is made. The child reports over
a pipe, once: that it is ready, or why it is not.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from migrate.cli.common import error_line, fail_with
from migrate.control import RemoteError, log_path, refuse_taken, socket_path
from migrate.errors import HostError

Ready = Callable[[dict[str, Any]], None]
"""Tells whoever waits that the machine is there; the fields are what it is told."""


def in_background(name: str, work: Callable[[Ready], int]) -> dict[str, Any]:
    """Run `work(ready)` in a process of its own; what it gave to `ready`.

    Raises the child's error where it fails before it is ready.
    """
    log = log_path(name)
    refuse_taken(name, socket_path(name))  # the log is that machine's
    reading, writing = os.pipe2(os.O_CLOEXEC)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _child(log, writing, work)
    os.close(writing)
    os.waitpid(child, 0)  # the first of two forks, gone at once
    with os.fdopen(reading, "rb") as pipe:
        line = pipe.read()
    try:
        answer = json.loads(line)
    except ValueError:
        raise HostError(f"machine {name!r} ended before it was ready; {log} may say why") from None
    if "error" in answer:
        error = answer["error"]
        raise RemoteError(error["class"], error["message"], error["exit-code"])
    ready = answer["ready"]
    assert isinstance(ready, dict)
    return ready


def _child(log: Path, writing: int, work: Callable[[Ready], int]) -> NoReturn:
    code = 1
    try:
        os.setsid()
        if os.fork():  # not a session's leader, and init's child: no terminal, no zombie
            os._exit(0)
        null = os.open(os.devnull, os.O_RDONLY)
        log.unlink(missing_ok=True)  # a file of its own, whoever had the name before
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        inode = os.fstat(out).st_ino
        os.dup2(null, 0)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.close(null)
        os.close(out)
        code = _work(writing, work)
        if code == 0 or os.fstat(1).st_size == 0:
            with contextlib.suppress(OSError):
                if log.stat().st_ino == inode:
                    log.unlink()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _work(writing: int, work: Callable[[Ready], int]) -> int:
    told = False

    def tell(answer: dict[str, Any]) -> None:
        nonlocal told
        if not told:
            told = True
            # A command that was interrupted leaves nothing behind: BrokenPipeError ends us.
            os.write(writing, json.dumps(answer).encode())
            os.close(writing)

    try:
        return work(lambda fields: tell({"ready": fields}))
    except BaseException as error:
        if not told:
            tell({"error": error_line(error)})
            return 1
        return fail_with(error)
