#!/usr/bin/env python3
"""Fetches a Linux guest: Debian's riscv64 kernel and busybox, with apt's own signed machinery.

A private apt configuration (its own state, cache and sources) is used with the mirror that this
machine's apt already uses and Debian's archive keys; nothing of the system changes. The result
lies in the user's cache directory and is used again.

    tools/fetch_linux.py [--refresh] [--json]
"""

from __future__ import annotations

import argparse
import io
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from elftools.elf.elffile import ELFFile

sys.path.insert(0, str(Path(__file__).resolve().parent))
import initramfs

RELEASE = "trixie"
ARCHITECTURE = "riscv64"
KERNEL = "linux-image-riscv64"
BUSYBOX = "busybox-static"
LAYOUT = 1
"""Raised when what is cached changes its form."""

MODULES = ("virtio_mmio", "virtio_blk", "crc32c_generic", "ext4")
"""For guests with a disk; an initramfs without them boots a second earlier."""
KEYRING_PLACES = ("/usr/share/keyrings", "/etc/apt/trusted.gpg.d", "/etc/apt/keyrings")
DEBIAN_SUITES = {"bullseye", "bookworm", "trixie", "forky", "stable", "testing", "unstable", "sid"}
APT_TIMEOUT_S = 900

APT_CONF = """\
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Post-Invoke;
APT::Architecture "{architecture}";
APT::Architectures {{ "{architecture}"; }};
Acquire::Languages "none";
Acquire::Retries "3";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Acquire::IndexTargets::deb::DEP-11-icons::DefaultEnabled "false";
Acquire::IndexTargets::deb::DEP-11-icons-small::DefaultEnabled "false";
Acquire::IndexTargets::deb::DEP-11-icons-hidpi::DefaultEnabled "false";
Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled "false";
Acquire::IndexTargets::deb::CNF::DefaultEnabled "false";
Dir::State "{root}/state";
Dir::State::status "{root}/status";
Dir::Cache "{root}/cache";
Dir::Etc::sourcelist "{root}/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::Etc::trusted "/dev/null";
Dir::Etc::trustedparts "{root}/keys";
"""


class FetchError(Exception):
    """The guest cannot be had; the message says why."""


@dataclass(frozen=True)
class LinuxGuest:
    """Paths of a fetched guest."""

    directory: str
    version: str
    kernel: str
    initrd: str
    """busybox and a shell, no modules."""
    busybox: str
    modules: list[str]
    """For a disk with ext4, in the order to load them in."""

    def build_initrd(
        self,
        *,
        disk: bool = False,
        rc: str | None = None,
        files: dict[str, bytes] | None = None,
    ) -> bytes:
        """Another initramfs: with the modules for a disk (the guest's `load-modules` loads them),
        a script that runs before the shell, and more files.
        """
        modules = self.modules if disk else []
        return initramfs.build(
            Path(self.busybox).read_bytes(),
            [(Path(path).name, Path(path).read_bytes()) for path in modules],
            rc=rc,
            files=files,
        )


def cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "migrate"


def ensure(*, refresh: bool = False) -> LinuxGuest:
    """The cached guest; fetched when there is none, or anew with `refresh`. Raises FetchError."""
    home = cache_directory() / f"linux-guest-{LAYOUT}"
    current = home / "current.json"
    if not refresh and current.exists():
        guest = LinuxGuest(**json.loads(current.read_text()))
        if all(Path(path).exists() for path in (guest.kernel, guest.initrd, guest.busybox)):
            return guest
    missing = [tool for tool in ("apt-get", "apt-cache", "dpkg-deb") if not shutil.which(tool)]
    if missing:
        raise FetchError(f"no {', '.join(missing)} here: the Linux guest comes from Debian's apt")
    try:
        home.mkdir(parents=True, exist_ok=True)
        # Not below the cache: apt's download user may be barred from the home directory.
        with tempfile.TemporaryDirectory(prefix="migrate-linux-") as work:
            Path(work).chmod(0o755)
            guest = _install(_download(Path(work)), Path(work), home)
        _write_atomically(current, json.dumps(asdict(guest), indent=2).encode())
    except OSError as error:
        raise FetchError(f"the Linux guest cannot be fetched: {error}") from error
    return guest


def _run(*command: str, cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=APT_TIMEOUT_S, check=False,
            env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise FetchError(f"{command[0]} took longer than {APT_TIMEOUT_S} s") from None
    if done.returncode:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise FetchError(f"{' '.join(command[:1] + command[-2:])} failed:\n{tail}")
    return done.stdout


def mirrors() -> list[str]:
    """Debian mirrors in this machine's apt sources, as apt itself reads them."""
    suites = set(DEBIAN_SUITES)
    release = Path("/etc/os-release")
    if release.exists() and re.search(r"^ID=debian$", release.read_text(), re.M):
        match = re.search(r"^VERSION_CODENAME=(\S+)$", release.read_text(), re.M)
        suites |= {match.group(1)} if match else set()
    listing = _run(
        "apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)",
        "Created-By: Packages",
    )  # fmt: skip
    found = []
    for line in listing.splitlines():
        parts = line.split()
        if len(parts) == 3 and parts[1] in suites and parts[2] == "main" and parts[0] not in found:
            found.append(parts[0])
    if not found:
        raise FetchError("this machine's apt sources name no Debian mirror (a suite with `main`)")
    return found


def _archive_keys(target: Path) -> None:
    """Copies of Debian's archive keys, for the private configuration to trust."""
    target.mkdir()
    found = False
    for place in KEYRING_PLACES:
        for pattern in ("debian-archive-*.gpg", "debian-archive-*.asc", "debian-archive-*.pgp"):
            for key in sorted(Path(place).glob(pattern)):
                if "removed" not in key.name:
                    # apt knows .gpg and .asc; a .pgp keyring is of the former kind.
                    name = key.with_suffix(".gpg").name if key.suffix == ".pgp" else key.name
                    shutil.copyfile(key, target / name)
                    (target / name).chmod(0o644)
                    found = True
    if not found:
        raise FetchError("no Debian archive keys here: install the package debian-archive-keyring")


def _download(root: Path) -> list[Path]:
    """The two packages, checked by apt. Raises FetchError."""
    for directory in ("state/lists/partial", "cache/archives/partial", "debs"):
        (root / directory).mkdir(parents=True)
    (root / "status").touch()
    _archive_keys(root / "keys")
    conf = root / "apt.conf"
    conf.write_text(APT_CONF.format(root=root, architecture=ARCHITECTURE))
    failures = []
    for mirror in mirrors():
        (root / "sources.list").write_text(f"deb [arch={ARCHITECTURE}] {mirror} {RELEASE} main\n")
        try:
            _run("apt-get", "-c", str(conf), "-o", "APT::Update::Error-Mode=any", "update")
            show = _run("apt-cache", "-c", str(conf), "show", "--no-all-versions", KERNEL)
            match = re.search(r"^Depends: .*?(linux-image-[0-9]\S*)", show, re.M)
            if match is None:
                raise FetchError(f"{KERNEL} names no kernel package")
            packages = (match.group(1), BUSYBOX)
            _run("apt-get", "-c", str(conf), "download", *packages, cwd=root / "debs")
            return sorted((root / "debs").glob("*.deb"))
        except FetchError as error:
            failures.append(str(error))
    raise FetchError("\n".join(failures))


def _install(packages: Iterable[Path], root: Path, home: Path) -> LinuxGuest:
    tree = root / "tree"
    for package in packages:
        _run("dpkg-deb", "-x", str(package), str(tree))
    kernels = sorted((tree / "boot").glob("vmlinu[xz]-*"))
    modules = sorted((tree / "usr/lib/modules").glob("*")) or sorted(
        (tree / "lib/modules").glob("*")
    )
    busybox = [path for path in (tree / "usr/bin/busybox", tree / "bin/busybox") if path.exists()]
    if not kernels or not modules or not busybox:
        raise FetchError("the packages do not hold kernel, modules and busybox where expected")
    version = modules[0].name
    staged = Path(tempfile.mkdtemp(prefix="staged-", dir=home))
    try:
        (staged / "modules").mkdir()
        shutil.copyfile(kernels[0], staged / "kernel")
        shutil.copyfile(busybox[0], staged / "busybox")
        names = []
        for name, data in _with_dependencies(modules[0], MODULES):
            (staged / "modules" / f"{name}.ko").write_bytes(data)
            names.append(name)
        final = home / version
        guest = LinuxGuest(
            directory=str(final), version=version, kernel=str(final / "kernel"),
            initrd=str(final / "initrd.cpio"), busybox=str(final / "busybox"),
            modules=[str(final / "modules" / f"{name}.ko") for name in names],
        )  # fmt: skip
        archive = initramfs.build((staged / "busybox").read_bytes())
        (staged / "initrd.cpio").write_bytes(archive)
        staged.chmod(0o755)
        if final.exists():  # from a run before: the new one is as good
            final.rename(Path(tempfile.mkdtemp(prefix="old-", dir=home)) / version)
        staged.rename(final)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        for old in home.glob("old-*"):
            shutil.rmtree(old, ignore_errors=True)
    return guest


def _with_dependencies(tree: Path, wanted: Iterable[str]) -> list[tuple[str, bytes]]:
    """`wanted` and what they need, each module after its dependencies; built-in ones left out."""
    files = {_module_name(path): path for path in tree.rglob("*.ko*")}
    ordered: dict[str, bytes] = {}

    def visit(name: str) -> None:
        if name in ordered or name not in files:
            return
        data = files[name].read_bytes()
        if files[name].suffix == ".xz":
            data = lzma.decompress(data)
        for needed in _depends(data):
            visit(needed)
        ordered[name] = data

    for name in wanted:
        visit(name)
    return list(ordered.items())


def _module_name(path: Path) -> str:
    return path.name.split(".", 1)[0].replace("-", "_")


def _depends(module: bytes) -> list[str]:
    """What the module's .modinfo says it needs."""
    section = ELFFile(io.BytesIO(module)).get_section_by_name(".modinfo")
    if section is None:
        return []
    for entry in section.data().split(b"\0"):
        if entry.startswith(b"depends="):
            return [n.replace("-", "_") for n in entry[8:].decode().split(",") if n]
    return []


def _write_atomically(path: Path, data: bytes) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    Path(name).replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description="Fetch a Debian riscv64 guest into the cache.")
    parser.add_argument("--refresh", action="store_true", help="fetch anew")
    parser.add_argument("--json", action="store_true", help="print the paths as JSON")
    options = parser.parse_args()
    try:
        guest = ensure(refresh=options.refresh)
    except FetchError as error:
        print(f"fetch_linux: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(asdict(guest), indent=2))
    else:
        print(f"Linux {guest.version} in {guest.directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
