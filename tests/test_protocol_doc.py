"""The tables of docs/protocol.md against the structs, limits and transitions in the code."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import pytest

from migrate import channel, codec, destination, errors, source, transport, wire
from migrate.session import TRANSITIONS, Phase
from migrate.wire import LIMITS, Encoding, Feature, FrameType, Role
from tests.links import ERRORS, SESSION

DOCUMENT = (Path(__file__).parent.parent / "docs" / "protocol.md").read_text(encoding="utf-8")
Row = dict[str, str]


def tables_of(section: str) -> list[list[Row]]:
    """The tables under a heading, each a list of rows by column name."""
    _, found, text = DOCUMENT.partition(f"\n## {section}\n")
    assert found, f"no section {section!r}"
    text = text.partition("\n## ")[0]
    tables = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        lines = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()
        ]
        assert all(len(line) == len(lines[0]) for line in lines), lines
        tables.append([dict(zip(lines[0], line, strict=True)) for line in lines[2:]])
    return tables


def layout(format_: struct.Struct) -> list[tuple[int, int]]:
    """(offset, bytes) of each field."""
    fields, at = [], 0
    for code in re.findall(r"\d*s|[A-Z]", format_.format.lstrip("<")):
        size = struct.calcsize("<" + code)
        fields.append((at, size))
        at += size
    assert at == format_.size
    return fields


@pytest.mark.parametrize(
    ("section", "number", "format_"),
    [
        ("Stream header", 0, wire.STREAM_HEADER),
        ("Frame header", 0, wire.FRAME_HEADER),
        ("Pages", 0, wire.PAGES_META),
        ("Pages", 1, wire.RANGE),
    ],
)
def test_layouts(section: str, number: int, format_: struct.Struct) -> None:
    table = tables_of(section)[number]
    assert [(int(row["offset"]), int(row["bytes"])) for row in table] == layout(format_)


@pytest.mark.parametrize(
    ("section", "format_", "magic"),
    [
        ("Stream header", wire.STREAM_HEADER, wire.STREAM_MAGIC),
        ("Frame header", wire.FRAME_HEADER, wire.FRAME_MAGIC),
    ],
)
def test_fields_stand_where_the_writer_puts_them(
    section: str, format_: struct.Struct, magic: bytes
) -> None:
    """By their names: the docstring of each struct lists them in the same order."""
    source_text = Path(wire.__file__).read_text(encoding="utf-8")
    name = "STREAM_HEADER" if format_ is wire.STREAM_HEADER else "FRAME_HEADER"
    listed = re.search(rf'^{name}: .*\n"""(.*?)\."""', source_text, re.MULTILINE)
    assert listed
    (table, *_) = tables_of(section)
    names = [row["field"] for row in table]
    assert [n.replace("the ", "") for n in listed.group(1).split(", ")] == names
    assert table[0]["meaning"].startswith(f"`{magic.hex(' ')}`")


def test_golden_stream_header_by_the_table() -> None:
    """The bytes of the golden header, cut up by the table."""
    (table, *_) = tables_of("Stream header")
    head = SESSION[0].head
    at = {row["field"]: (int(row["offset"]), int(row["bytes"])) for row in table}

    def number(field: str) -> int:
        offset, size = at[field]
        return int.from_bytes(head[offset : offset + size], "little")

    assert (number("major"), number("minor")) == (wire.MAJOR, wire.MINOR)
    assert number("header bytes") == len(head) == 40
    assert number("features offered") == int(wire.FEATURES)
    assert number("features required") == int(wire.REQUIRED)
    assert number("role") == Role.SOURCE


def test_roles_flags_encodings_features() -> None:
    roles = tables_of("Stream header")[1]
    assert {row["role"]: int(row["number"]) for row in roles} == dict(Role.__members__.items())
    (flag,) = tables_of("Frame header")[1]
    assert (flag["flag"], int(flag["value"])) == ("OPTIONAL", wire.FLAG_OPTIONAL)
    encodings = tables_of("Pages")[2]
    assert {row["encoding"]: int(row["number"]) for row in encodings} == dict(
        Encoding.__members__.items()
    )
    (features,) = tables_of("Versions and features")
    assert {row["feature"]: 1 << int(row["bit"]) for row in features} == {
        feature.name: feature.value for feature in Feature
    }
    required = {row["feature"] for row in features if row["required"] == "yes"}
    assert required == {feature.name for feature in wire.REQUIRED}


def test_frames() -> None:
    (table,) = tables_of("Frames")
    assert [int(row["type"], 16) for row in table] == [kind.value for kind in FrameType]
    transitions: dict[Any, Phase] = {}
    for row in table:
        kind = FrameType(int(row["type"], 16))
        assert row["name"] == kind.name
        assert int(row["meta limit"]) == LIMITS[kind].meta_bytes
        assert int(row["bulk limit"]) == LIMITS[kind].bulk_bytes
        if kind is FrameType.ERROR:
            assert (row["from"], row["phase → next phase"]) == ("either", "any → failed")
            continue
        for step in row["phase → next phase"].split(", "):
            before, after = step.split(" → ")
            transitions[Phase(before), Role[row["from"].upper()], kind] = Phase(after)
    assert transitions == TRANSITIONS
    assert set(LIMITS) == set(FrameType)


TYPES = {
    "map": dict,
    "integer": int,
    "boolean": bool,
    "text": str,
    "list of binary": list,
}


def test_control_frames() -> None:
    """Against the golden frames, which writer and readers are held to."""
    (table,) = tables_of("Control frames")
    documented: dict[str, dict[str, type]] = {}
    for row in table:
        fields = documented.setdefault(row["frame"], {})
        if row["field"]:
            fields[row["field"]] = TYPES[row["type"]]
    golden = {v.frame: v.fields for v in SESSION + ERRORS if v.fields is not None}
    assert documented == {
        name: {key: type(value) for key, value in fields.items()} for name, fields in golden.items()
    }
    control = set(FrameType.__members__) - {"PAGES", "ZERO"}
    assert set(documented) == control


@pytest.mark.parametrize("module", [source, destination, channel])
def test_fields_that_the_code_sends_and_demands_are_documented(module: Any) -> None:
    (table,) = tables_of("Control frames")
    documented = {(row["frame"], row["field"]) for row in table}
    text = Path(module.__file__).read_text(encoding="utf-8")
    calls = re.findall(
        r"(?:send_map|expect_untrusted)\(\s*FrameType\.(\w+)([^()]*(?:\([^()]*\)[^()]*)*)", text
    )
    assert calls
    for frame, arguments in calls:
        for field in re.findall(r"(\w+)=", arguments):
            assert (frame, field) in documented, f"{frame}.{field}"


def test_constants() -> None:
    (table,) = tables_of("Page hashes")
    assert {row["constant"]: int(row["value"]) for row in table} == {
        "words of a page": codec.PAGE_WORDS,
        "pages of a region": codec.REGION_PAGES,
        "pages of a batch": wire.BATCH_PAGES,
    }
    words = re.search(r"1 MiB\nof meta and 1 MiB of bulk", DOCUMENT)
    assert words and (wire.UNKNOWN_OPTIONAL.meta_bytes, wire.UNKNOWN_OPTIONAL.bulk_bytes) == (
        1 << 20,
        1 << 20,
    )
    assert f"at most {wire.MAX_CONTAINERS} lists and maps" in DOCUMENT
    assert f"in PAGES {wire.BATCH_PAGES} at most" in DOCUMENT


def test_error_codes() -> None:
    def classes(root: type[errors.MigrateError]) -> list[type[errors.MigrateError]]:
        return [root, *(found for child in root.__subclasses__() for found in classes(child))]

    (table,) = tables_of("Errors")
    own = {
        kind.wire_code: kind.__name__
        for kind in classes(errors.MigrateError)
        if "wire_code" in vars(kind) and kind.__module__ in (errors.__name__, transport.__name__)
    }
    assert {int(row["code"]): row["class"] for row in table} == own


def test_time_limits() -> None:
    (table,) = tables_of("Time limits")
    seconds = {row["limit"]: float(row["seconds"]) for row in table}
    for module in (source, destination):
        assert seconds["negotiation"] == module.NEGOTIATION_TIMEOUT_S
        assert seconds["stall"] == module.STALL_TIMEOUT_S
    assert seconds["grace"] == destination.GRACE_S
    assert len(seconds) == 3
    assert f"talks to {destination.MAX_NEGOTIATING} connections" in DOCUMENT


def test_links_inside_the_page_lead_somewhere() -> None:
    headings = {
        line.lstrip("# ").lower().replace(" ", "-")
        for line in DOCUMENT.splitlines()
        if line.startswith("#")
    }
    assert set(re.findall(r"\]\(#([^)]*)\)", DOCUMENT)) <= headings
