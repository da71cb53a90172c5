"""The options of `send` as they cross the control socket (layer 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from migrate.control import Json
from migrate.control_server import take_untrusted
from migrate.errors import UsageError

if TYPE_CHECKING:
    from migrate.source import SendOptions

MAX_DURATION_NS = 7 * 24 * 3600 * 10**9


def send_options_untrusted(arguments: Json, fds: list[int]) -> tuple[str, SendOptions]:
    """URI and options of a `send` request. Raises UsageError.

    `fd:N` names a descriptor of the client, which came with the request: the first of `fds`.
    """
    from migrate.codec import parse_compression
    from migrate.source import SendOptions

    taken = take_untrusted(
        arguments,
        uri=(str, ...),
        downtime_limit_ns=(int, 300_000_000),
        bandwidth=(int, None),
        compression=(str, "auto"),
        threads=(int, None),
        max_rounds=(int, 30),
        timeout_ns=(int, None),
        verify=(bool, False),
    )
    for name, least, most in [
        ("downtime_limit_ns", 1, MAX_DURATION_NS),
        ("bandwidth", 4096, 1 << 50),
        ("threads", 1, 1024),
        ("max_rounds", 1, 1_000_000),
        ("timeout_ns", 1, MAX_DURATION_NS),
    ]:
        if taken[name] is not None and not least <= taken[name] <= most:
            raise UsageError(f"{name.replace('_', '-')} must be from {least} to {most}")
    uri = taken.pop("uri")
    if uri.startswith("fd:"):
        if not fds:
            raise UsageError(f"{uri}: no descriptor came with the request")
        uri = f"fd:{fds[0]}"
    taken["compression"] = parse_compression(taken["compression"])
    return uri, SendOptions(**taken)
