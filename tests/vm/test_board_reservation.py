"""A reservation (LR) held over the end of a turn fares alike on a board that was moved and on one
that stayed: whether SC succeeds is part of what must not differ.
"""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

from riscv64 import asm

from migrate.vm.board import Board, StopReason
from migrate.vm.console import Console
from migrate.vm.definition import MachineDefinition, SlotSpec
from migrate.vm.memory import GuestMemory
from migrate.vm.memory_map import RAM_BASE

DEFINITION = MachineDefinition(
    "small", (SlotSpec("ram", RAM_BASE, 1 << 20),), cpus=2, deterministic=True
)
ROUNDS = 400


def program() -> bytes:
    """Hart 0 spins. Hart 1 waits between LR and SC for about a third of a turn, counts in s0 how
    often SC succeeded, and switches off after ROUNDS.
    """
    spin = [asm.j(0)]
    wait = [
        asm.addi("t1", "zero", 1), asm.slli("t1", "t1", 16),
        asm.addi("t1", "t1", -1), asm.bne("t1", "zero", -4),
    ]  # fmt: skip
    body = [
        asm.lr_d("a0", "t2"), *wait, asm.sc_d("a1", "s1", "t2"),
        asm.bne("a1", "zero", 8), asm.addi("s0", "s0", 1), asm.addi("s1", "s1", -1),
    ]  # fmt: skip
    off = [
        asm.addi("t0", "zero", 1), asm.slli("t0", "t0", 20),
        asm.addi("t1", "zero", 0x555), asm.slli("t1", "t1", 4), asm.addi("t1", "t1", 5),
        asm.sw("t1", "t0"), asm.j(0),
    ]  # fmt: skip
    return asm.code(
        asm.csrr("t0", "mhartid"), asm.bne("t0", "zero", 8), *spin,
        asm.addi("t2", "zero", 1), asm.slli("t2", "t2", 31), asm.addi("t2", "t2", 0x700),
        asm.addi("s1", "zero", ROUNDS),
        *body, asm.bne("s1", "zero", -4 * len(body)), *off,
    )  # fmt: skip


def new_board() -> Board:
    return Board(DEFINITION, GuestMemory(DEFINITION.slots), console=Console())


def close(board: Board) -> None:
    board.close()
    board.memory.close()


def ending(image: Path, draw: random.Random | None) -> tuple[Any, bytes, int]:
    board = new_board()
    board.boot(firmware=str(image))
    moves = 0
    while True:
        timer = threading.Timer(draw.uniform(0.001, 0.006), board.stop) if draw else None
        if timer is not None:
            timer.start()
        reason = board.run()
        if timer is not None:
            timer.cancel()
            timer.join()
        if reason is StopReason.SHUTDOWN:
            break
        moves += 1
        other = new_board()
        other.memory.slots[0].view[:] = board.memory.slots[0].view
        other.load_untrusted(board.save())
        close(board)
        board = other
    end = board.save(), bytes(board.memory.slots[0].view), moves
    close(board)
    return end


def test_reservations_over_turns(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(program())
    state, ram, _ = ending(image, None)
    succeeded = state["fields"]["harts"][1]["fields"]["x8"]
    assert 0 < succeeded < ROUNDS  # some were broken by a switch of harts, some were not
    seed = random.randrange(1 << 32)
    print(f"seed of the moves: {seed}")
    moved_state, moved_ram, moves = ending(image, random.Random(seed))
    assert moves > 5
    assert moved_state == state
    assert moved_ram == ram
