"""The dirty log: which pages of a slot were written, for any number of readers (layer 3).

    log = open_log(slot)
    cursor = log.cursor("migration")        # clean: it has seen everything up to now
    with cursor.harvest() as lease:         # get and reset in one step of the kernel
        send(lease.memory, lease.bitmap)    # an exception puts the pages back

One *raw harvest* of the back end is shared out to every cursor's *pending* bitmap; a cursor's
harvest takes its own pending pages away as a *lease*. Nothing else ever clears a bit, so a page
leaves a cursor only through a lease that was committed. Every method is for any thread.

Page contents are read from `memory` of the log or lease, not from the slot: a back end that
compares contents knows only what it has itself seen, and serves its own copy. (A page that went
A, B, A between two of its looks would count as clean, though a reader of the slot saw B.)

Where the raw dirt comes from is in `dirtylog_backends`; what the pages are used for is above.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from migrate import pages
from migrate.dirtylog_backends.base import Backend
from migrate.dirtylog_backends.compare import CompareBackend
from migrate.dirtylog_backends.hook import HookBackend, Subscribe
from migrate.dirtylog_backends.pagemap import PagemapBackend
from migrate.errors import MigrateError, UsageError
from migrate.linux.uffd import FeatureMissing
from migrate.pages import Bitmap
from migrate.vm.memory import MemorySlot

__all__ = ["BACKENDS", "Cursor", "DirtyLog", "Lease", "open_log"]

BACKENDS = ("auto", "pagemap", "compare", "hook")

_log = logging.getLogger("migrate")
_said: set[str] = set()


def open_log(
    slot: MemorySlot, backend: str = "auto", *, subscribe: Subscribe | None = None
) -> DirtyLog:
    """A dirty log of `slot`, armed. At most one a slot; readers share it by cursors.

    `auto` takes `pagemap`, or `compare` where the kernel cannot (and says so once). `hook` lives
    on being told of every store: `subscribe` connects it to who tells (see HookBackend).
    Raises HostError if a back end asked for by name cannot work here, and why.
    """
    if slot.closed:
        raise UsageError(f"slot {slot.name!r} is closed")
    if backend == "auto":
        try:
            return DirtyLog(slot.name, PagemapBackend(slot))
        except FeatureMissing as error:
            _say_once(
                f"dirty pages are found by comparing contents, which takes as much memory again "
                f"and is slower: {error}"
            )
            return DirtyLog(slot.name, CompareBackend(slot))
    if backend == "pagemap":
        try:
            return DirtyLog(slot.name, PagemapBackend(slot))
        except FeatureMissing as error:
            message = f"the dirty log's back end 'pagemap' cannot work here: {error}"
            raise FeatureMissing(message) from error
    if backend == "compare":
        return DirtyLog(slot.name, CompareBackend(slot))
    if backend == "hook":
        if subscribe is None:
            raise UsageError(
                "the dirty log's back end 'hook' sees only what it is told: it needs a source of "
                "stores to subscribe to"
            )
        return DirtyLog(slot.name, HookBackend(slot, subscribe))
    raise UsageError(f"no dirty-log back end {backend!r}; there are {', '.join(BACKENDS)}")


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        _log.warning(message)


class DirtyLog:
    """The log of one slot."""

    def __init__(self, slot_name: str, backend: Backend) -> None:
        """For a back end of one's own, which is taken over; else `open_log` is the way in."""
        self.raw = backend
        self.slot_name = slot_name
        self.n_pages = backend.n_pages
        self._lock = threading.RLock()
        self._cursors: list[Cursor] = []
        self._scratch = pages.empty(self.n_pages)
        self.closed = False

    @property
    def backend(self) -> str:
        """The back end's name."""
        return self.raw.name

    @property
    def memory(self) -> npt.NDArray[np.uint8]:
        """The bytes that go with the log: pages of a lease are copied from here."""
        return self.raw.memory

    @property
    def cursors(self) -> tuple[Cursor, ...]:
        """The open ones, oldest first."""
        with self._lock:
            return tuple(self._cursors)

    def cursor(self, name: str) -> Cursor:
        """A new cursor, clean as of now. Raises UsageError if the name is taken."""
        with self._lock:
            self._check_open()
            if any(cursor.name == name for cursor in self._cursors):
                raise UsageError(f"slot {self.slot_name!r} has a dirty-log cursor {name!r} already")
            self._share_out()  # what is dirty now belongs to the older ones
            cursor = Cursor(self, name)
            self._cursors.append(cursor)
            return cursor

    def close(self) -> None:
        """Close all cursors and end tracking. Idempotent."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            for cursor in tuple(self._cursors):
                cursor.close()
            self.raw.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self.closed:
            raise UsageError(f"the dirty log of slot {self.slot_name!r} is closed")

    def _share_out(self) -> None:
        """One raw harvest into every cursor's pending pages. Under the lock."""
        scratch = self._scratch
        try:
            self.raw.collect(scratch)
            for cursor in self._cursors:
                cursor._pending |= scratch
        except BaseException:
            # The back end may have let go of pages that nobody has got: all count as dirty.
            for cursor in self._cursors:
                cursor._pending |= pages.full(self.n_pages)
            raise
        finally:
            scratch.fill(0)


class Cursor:
    """One reader's place in the log of a slot."""

    def __init__(self, log: DirtyLog, name: str) -> None:
        self.log = log
        self.name = name
        self.epoch = 0
        """How many harvests this cursor has made."""
        self.n_pages = log.n_pages
        self.closed = False
        self._pending = pages.empty(log.n_pages)
        self._orphans: deque[Bitmap] = deque()
        """Pages of leases that were dropped; no lock needed to add some."""

    def harvest(self) -> Lease:
        """Atomic get-and-reset: the pages written since this cursor's last harvest, those that it
        marked, and those that leases restored.

        Raises HostError (the kernel refuses: every page counts as dirty then).
        """
        log = self.log
        with log._lock:
            self._check_open()
            log._share_out()
            self._adopt()
            self.epoch += 1
            lease = Lease(self, self.epoch, self._pending)
            self._pending = pages.empty(self.n_pages)
            return lease

    def peek(self, first_page: int = 0, end_page: int | None = None) -> Bitmap:
        """What `harvest` would find in pages [first_page, end_page), without resetting it.

        A bitmap of end_page - first_page pages, bit 0 is `first_page`. Costs by the size of the
        range. Raises UsageError for a range outside of the slot.
        """
        end = self.n_pages if end_page is None else end_page
        log = self.log
        with log._lock:
            self._check_open()
            if not 0 <= first_page <= end <= self.n_pages:
                raise UsageError(
                    f"pages {first_page}..{end} are not in slot {log.slot_name!r}, "
                    f"which has {self.n_pages}"
                )
            if first_page == end:
                return pages.empty(0)
            self._adopt()
            bitmap = log.raw.peek(first_page, end)
            bitmap |= pages.extract(self._pending, first_page, end)
            return bitmap

    def count(self) -> int:
        """Pages that `harvest` would find."""
        return pages.count(self.peek())

    def mark(self, bitmap: Bitmap) -> None:
        """Make pages dirty for this cursor. Raises UsageError for a bitmap of another size."""
        with self.log._lock:
            self._check_open()
            self._add(self._checked(bitmap))

    def mark_all(self) -> None:
        """Make every page dirty for this cursor."""
        with self.log._lock:
            self._check_open()
            self._add(pages.full(self.n_pages))

    def close(self) -> None:
        """Forget this reader. Idempotent. Its open leases may still be settled, to no effect."""
        with self.log._lock:
            self.closed = True
            if self in self.log._cursors:
                self.log._cursors.remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self.closed:
            raise UsageError(f"cursor {self.name!r} of slot {self.log.slot_name!r} is closed")

    def _checked(self, bitmap: Bitmap) -> Bitmap:
        """A copy without bits past the last page."""
        if bitmap.shape != self._pending.shape or bitmap.dtype != self._pending.dtype:
            raise UsageError(
                f"a bitmap of {bitmap.shape} {bitmap.dtype} does not fit slot "
                f"{self.log.slot_name!r} of {self.n_pages} pages"
            )
        copy = bitmap.copy()
        pages.clear_past(copy, self.n_pages)
        return copy

    def _adopt(self) -> None:
        while self._orphans:
            self._pending |= self._orphans.popleft()

    def _add(self, bitmap: Bitmap) -> None:
        self._pending |= bitmap


class Lease:
    """Pages that a cursor handed out and may get back.

    As a context manager: leaving normally commits, leaving by an exception restores, unless it was
    settled before. One that is dropped without being settled restores itself.
    """

    def __init__(self, cursor: Cursor, epoch: int, bitmap: Bitmap) -> None:
        self._state = "open"
        self._cursor = cursor
        self._bitmap = bitmap
        self._returned: Bitmap | None = None
        self.epoch = epoch
        self.n_pages = cursor.n_pages
        self.bitmap: Bitmap = bitmap.view()
        """The leased pages, read-only."""
        self.bitmap.flags.writeable = False
        self.count = pages.count(bitmap)
        """How many they are."""

    @property
    def memory(self) -> npt.NDArray[np.uint8]:
        """Where the pages' contents are read from."""
        return self._cursor.log.memory

    @property
    def state(self) -> str:
        """ "open", "committed" or "restored"."""
        return self._state

    def commit(self) -> None:
        """The pages are safe. Idempotent. Raises UsageError after `restore`."""
        with self._cursor.log._lock:
            if self._state == "restored":
                raise self._settled("commit")
            self._state = "committed"

    def restore(self, only: Bitmap | None = None) -> None:
        """Give the pages back to the cursor, ORed into what came since; with `only`, those of them,
        and the others count as safe.

        Idempotent: a page goes back once at most; a further call may give back more of the lease.
        Raises UsageError after `commit`.
        """
        with self._cursor.log._lock:
            if self._state == "committed":
                raise self._settled("restore")
            back = self._bitmap if only is None else self._cursor._checked(only) & self._bitmap
            if self._returned is not None:
                back = back & ~self._returned
            self._returned = back if self._returned is None else self._returned | back
            self._state = "restored"
            self._cursor._add(back)

    def _settled(self, verb: str) -> MigrateError:
        return UsageError(
            f"lease {self.epoch} of cursor {self._cursor.name!r}, slot "
            f"{self._cursor.log.slot_name!r}, is {self._state}: it cannot {verb}"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._state == "open":
            if kind is None:
                self.commit()
            else:
                self.restore()

    def __del__(self) -> None:
        # Wherever the collector may call this, other locks than ours may be held: take none.
        if self._state == "open" and hasattr(self, "_bitmap"):
            self._cursor._orphans.append(self._bitmap)
