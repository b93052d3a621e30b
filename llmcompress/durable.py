"""Files that are either absent or complete, whatever happens while they are written, and folders held alone."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

# what writing to an open file fails by; a lost connection, say, that the writer was waiting for is none of them
_WRITING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE})


def read_json(path: Path) -> Any:
    """Content of a JSON file, None where it is missing or not (yet) valid."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_durably(path: Path, data: bytes) -> None:
    """Write ``data`` so that ``path`` either does not exist or is complete, even after a power cut."""
    with durably(path) as handle:
        handle.write(data)


@contextmanager
def durably(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that appears as ``path``, complete, when the ``with`` block ends without an error.

    After an error nothing of it is left, for on a full disk its half would be in the way. What a disk fails by when it
    is written to names no file, and gets this one.
    """
    part = path.with_name(path.name + ".part")
    # outside: a file that cannot be opened is not this one's to remove
    handle = part.open("wb")
    try:
        with handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        part.replace(path)
    except BaseException as error:
        with suppress(OSError):
            part.unlink()
        if isinstance(error, OSError) and error.errno in _WRITING and error.filename is None:
            error.filename = str(path)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def held_alone(folder: Path) -> Iterator[bool]:
    """Whether no other process is inside such a block for this folder; True where folders cannot be locked."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            yield error.errno != errno.EWOULDBLOCK
            return
        yield True
    finally:
        os.close(handle)
