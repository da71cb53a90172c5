"""Builds an initramfs for the Linux guest: cpio "newc" with busybox, a few modules and /init.

Format: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

DIRECTORIES = ("bin", "dev", "etc", "lib", "lib/modules", "mnt", "proc", "root", "sys", "tmp")

INIT = """\
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox mount -t tmpfs tmpfs /tmp
/bin/busybox --install -s /bin
export PATH=/bin HOME=/root
hostname guest
dmesg -n 4
[ -x /etc/rc ] && /etc/rc
echo "Linux $(uname -r), $(nproc) cpus: the shell is ready"
cd /root
setsid cttyhack sh
poweroff -f
"""

LOAD_MODULES = """\
#!/bin/sh
# Loads the modules of this initramfs, each after those that it needs.
while read -r module; do insmod "/lib/modules/$module" || exit 1; done < /lib/modules/order
"""


class Cpio:
    """An archive under construction. Everything belongs to root, times are 0."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0

    def _add(
        self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)
    ) -> None:
        self._inode += 1
        path = name.encode() + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        numbers = (
            self._inode,
            mode,
            0,
            0,
            links,
            0,
            len(data),
            0,
            0,
            *device,
            len(path),
            0,
        )
        header = b"070701" + b"".join(b"%08X" % number for number in numbers)
        self._parts.append(_padded(header + path) + _padded(data))

    def directory(self, name: str) -> None:
        self._add(name, stat.S_IFDIR | 0o755)

    def file(self, name: str, data: bytes, *, executable: bool = False) -> None:
        self._add(name, stat.S_IFREG | (0o755 if executable else 0o644), data)

    def character_device(self, name: str, major: int, minor: int) -> None:
        self._add(name, stat.S_IFCHR | 0o600, device=(major, minor))

    def finish(self) -> bytes:
        self._inode = -1
        self._add("TRAILER!!!", 0)
        data = b"".join(self._parts)
        return data + bytes(-len(data) % 512)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def build(
    busybox: bytes,
    modules: Iterable[tuple[str, bytes]] = (),
    *,
    rc: str | None = None,
    files: Mapping[str, bytes] | None = None,
) -> bytes:
    """The archive. `modules` are (file name, contents) in the order to load them in.

    `rc` is a shell script that /init runs before the shell; `files` are more files, executable,
    by their path without the leading slash (directories are made).
    """
    cpio = Cpio()
    made = set(DIRECTORIES)
    for name in DIRECTORIES:
        cpio.directory(name)
    cpio.character_device("dev/console", 5, 1)
    cpio.character_device("dev/null", 1, 3)
    cpio.file("bin/busybox", busybox, executable=True)
    cpio.file("init", INIT.encode(), executable=True)
    cpio.file("bin/load-modules", LOAD_MODULES.encode(), executable=True)
    order = []
    for name, data in modules:
        cpio.file(f"lib/modules/{name}", data)
        order.append(name + "\n")
    cpio.file("lib/modules/order", "".join(order).encode())
    if rc is not None:
        cpio.file("etc/rc", ("#!/bin/sh\n" + rc).encode(), executable=True)
    for name, data in (files or {}).items():
        for parent in reversed(Path(name).parents):
            if str(parent) not in {".", *made}:
                made.add(str(parent))
                cpio.directory(str(parent))
        cpio.file(name, data, executable=True)
    return cpio.finish()
