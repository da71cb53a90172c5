"""What the link itself takes: 1 GiB from one process's memory into another's, over loopback TCP.

Both memories are populated, sends are of 1 MiB, the receiver uses `recv_into`, and a third process
spins, as the guest does while it is migrated. `tools/bare_socket.py [MiB] [RUNS]`.
"""

from __future__ import annotations

import mmap
import multiprocessing
import socket
import statistics
import sys
import time
from multiprocessing.connection import Connection

from migrate.units import GIB, MIB

CHUNK_BYTES = MIB


def _populated(size_bytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for offset in range(0, size_bytes, mmap.PAGESIZE):
        memory[offset] = 1
    return memory


def _spin(ready: Connection) -> None:
    ready.send(None)
    while True:
        pass


def _receive(size_bytes: int, port: Connection) -> None:
    memory = memoryview(_populated(size_bytes))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port.send(listener.getsockname()[1])
        link, _ = listener.accept()
        with link:
            offset = 0
            while offset < size_bytes:
                got = link.recv_into(memory[offset : offset + CHUNK_BYTES])
                if not got:
                    return
                offset += got
            link.sendall(b"\0")


def _send(size_bytes: int, port: int, result: Connection) -> None:
    memory = memoryview(_populated(size_bytes))
    with socket.create_connection(("127.0.0.1", port)) as link:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        began = time.monotonic()
        for offset in range(0, size_bytes, CHUNK_BYTES):
            link.sendall(memory[offset : offset + CHUNK_BYTES])
        link.recv(1)
        result.send((time.monotonic() - began) * 1e3)


def bare_socket_ms(size_bytes: int = GIB) -> float:
    """Milliseconds from the first send to the receiver's word that it has everything."""
    context = multiprocessing.get_context("fork")
    parent, child = context.Pipe()
    workers = [context.Process(target=_spin, args=(child,), daemon=True)]
    try:
        workers[0].start()
        parent.recv()
        workers.append(context.Process(target=_receive, args=(size_bytes, child), daemon=True))
        workers[-1].start()
        port = parent.recv()
        workers.append(context.Process(target=_send, args=(size_bytes, port, child), daemon=True))
        workers[-1].start()
        elapsed_ms: float = parent.recv()
        return elapsed_ms
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
        parent.close()
        child.close()


if __name__ == "__main__":
    size_mib = int(sys.argv[1]) if len(sys.argv) > 1 else 1024
    runs = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    times = [bare_socket_ms(size_mib * MIB) for _ in range(runs)]
    print(f"{statistics.median(times):.0f} ms, median of {runs} ({size_mib} MiB beside a spinner)")
