"""Builds the bare-metal guest's image, or checks that the committed one matches its source.

`tools/build_guest.py` compiles `migrate/guest/` with a riscv64 cross compiler and writes
`guest.bin` and `guest.json` (digests of source and image, and the compiler's version).
`--check` writes nothing: without a cross compiler it compares the recorded digests; with the
compiler that built the committed image it also builds again and compares the bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

GUEST = Path(__file__).resolve().parent.parent / "migrate" / "guest"
SOURCES = ("guest.c", "guest.h", "guest.ld", "start.S")
PREFIX = "riscv64-linux-gnu-"
FLAGS = (
    "-march=rv64ima_zicsr", "-mabi=lp64", "-mcmodel=medany", "-O2", "-std=gnu11",
    "-ffreestanding", "-nostdlib", "-static", "-fno-pic", "-fno-stack-protector",
    "-fno-strict-aliasing", "-fno-tree-loop-distribute-patterns",
    "-Wall", "-Wextra", "-Werror", "-Wl,--build-id=none", "-Wl,--no-relax",
)  # fmt: skip


class BuildError(Exception):
    """The image could not be built, or does not match."""


def source_digest() -> str:
    """SHA-256 over the flags and every source file, names and lengths included."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for name in SOURCES:
        data = (GUEST / name).read_bytes()
        digest.update(f"\0{name}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()


def compiler_version() -> str | None:
    """First line of the cross compiler's `--version`; None where there is none."""
    if not all(shutil.which(PREFIX + tool) for tool in ("gcc", "objcopy")):
        return None
    done = subprocess.run([PREFIX + "gcc", "--version"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[0]


def compile_image() -> bytes:
    """The flat image, built from the sources."""
    with tempfile.TemporaryDirectory() as scratch:
        elf, flat = Path(scratch, "guest.elf"), Path(scratch, "guest.bin")
        commands = (
            [PREFIX + "gcc", *FLAGS, "-T", "guest.ld", "-o", str(elf), "start.S", "guest.c"],
            [PREFIX + "objcopy", "-O", "binary", str(elf), str(flat)],
        )
        for command in commands:
            done = subprocess.run(command, cwd=GUEST, capture_output=True, text=True, check=False)
            if done.returncode:
                raise BuildError(f"{command[0]} failed:\n{done.stderr}")
        return flat.read_bytes()


def record_of(image: bytes, compiler: str) -> dict[str, str]:
    """What guest.json holds."""
    return {
        "source_sha256": source_digest(),
        "image_sha256": hashlib.sha256(image).hexdigest(),
        "compiler": compiler,
    }


def check() -> str:
    """What was compared. Raises BuildError where the committed image is not its source's."""
    record = json.loads((GUEST / "guest.json").read_text())
    image = (GUEST / "guest.bin").read_bytes()
    if record["image_sha256"] != hashlib.sha256(image).hexdigest():
        raise BuildError("guest.bin is not the image that guest.json records")
    if record["source_sha256"] != source_digest():
        raise BuildError("the guest's source has changed since guest.bin was built; build it again")
    compiler = compiler_version()
    if compiler is None:
        return "recorded digests match (no cross compiler here to build again)"
    if compiler != record["compiler"]:
        compile_image()
        return f"recorded digests match and the source builds (another compiler: {compiler})"
    if compile_image() != image:
        raise BuildError("a build from the source gives another guest.bin")
    return "a build from the source gives the committed guest.bin"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only, write nothing")
    options = parser.parse_args()
    try:
        if options.check:
            print(check())
            return 0
        compiler = compiler_version()
        if compiler is None:
            raise BuildError(f"{PREFIX}gcc is missing (Debian: gcc-riscv64-linux-gnu)")
        image = compile_image()
        (GUEST / "guest.bin").write_bytes(image)
        record = json.dumps(record_of(image, compiler), indent=2) + "\n"
        (GUEST / "guest.json").write_text(record)
        print(f"guest.bin: {len(image)} bytes")
    except BuildError as error:
        print(f"build_guest: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
