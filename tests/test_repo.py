"""What is true of the repository as a whole: nothing local in it, documents that hold."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Written in pieces, so that this file does not find itself.
FORBIDDEN = {
    "a home directory": re.compile(r"/(?:ho" r"me/[a-z]+|ro" r"ot)/"),
    "a workspace of somebody's machine": re.compile(r"(?<![\w.])/wo" r"rk/"),
    "a scratch directory": re.compile(r"(?<![\w.])/t" r"mp/(?!migrate-)[\w.]"),
    "a local package index": re.compile(r"/o" r"pt/(?:py" r"pi|wheels)"),
    "a package index or mirror": re.compile(
        r"https?://[^\s\"']*(?:py"
        r"pi\.|pythonhosted|arti"
        r"factory|nex"
        r"us|deb\.debian|mirror)"
    ),
}


def tracked() -> list[Path]:
    try:
        done = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, timeout=30
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in os.fsdecode(done.stdout).split("\0") if name]


@pytest.mark.parametrize("what", FORBIDDEN)
def test_nothing_local_in_tracked_files(what: str) -> None:
    found = []
    for path in tracked():
        if not path.is_file():
            continue
        data = path.read_bytes()
        if b"\0" in data[:8192]:
            continue
        for number, line in enumerate(data.decode("utf-8").splitlines(), 1):
            if FORBIDDEN[what].search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("what", FORBIDDEN)
def test_the_patterns_find_something(what: str) -> None:
    examples = [
        "/ho" "me/ann/x", "/wo" "rk/main", "/t" "mp/x", "/o" "pt/wheels",
        "https://py" "pi.example.org/simple",
    ]  # fmt: skip
    assert any(FORBIDDEN[what].search(example) for example in examples)


def makefile_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text("utf-8")
    return set(re.findall(r"^([a-z][a-z-]*):", text, re.M))


def test_make_targets_that_the_documents_name_exist() -> None:
    targets = makefile_targets()
    assert {"setup", "demo", "test", "check", "clean"} <= targets
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"^\s*(?:\$ )?make ([a-z-]+)", document.read_text("utf-8"), re.M):
            assert target in targets, f"{document.name} names `make {target}`"


def test_relative_links_of_the_documents_exist() -> None:
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text("utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_scripts_parse() -> None:
    for script, shell in [(".ci/run", "bash"), ("tools/setup.sh", "sh")]:
        assert os.access(ROOT / script, os.X_OK), script
        subprocess.run([shell, "-n", ROOT / script], check=True, timeout=30)
