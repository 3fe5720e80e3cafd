"""Bytes from and to the disk: reads stop at what the file can hold, writes are all or nothing."""

from __future__ import annotations

import gzip
import math
import os
import stat
import sys
import uuid
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from .core import VolumeError

_DEFLATE_RATIO = 1032  # deflate's best: 258 bytes out of 2 bits
COMPRESSION = 3  # label maps shrink nearly as far as with 9, in a fraction of the time
_CHUNK = 1 << 20  # a decoder holds as much again, and what it reads
_HERE = Path(__file__).parent


class Source:
    """A file read from front to back; whatever goes wrong is a VolumeError that names it.

    A quiet source keeps its warnings to itself: it looks at a file that this package has just written.
    """

    def __init__(self, path: Path, *, quiet: bool = False) -> None:
        self.path = path
        self.quiet = quiet
        self.compressed = False
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
                raise self.error(f"this is {kind}", "give the path of one file")
            self.file_size = status.st_size
            self.raw = path.open("rb")
        except (OSError, ValueError) as error:
            if isinstance(error, VolumeError):
                raise
            reason = getattr(error, "strerror", None) or str(error)
            raise self.error(f"cannot open ({reason})", "check the path and its permissions") from error
        self._stream: Any = self.raw
        if self.file_size == 0:
            self.raw.close()
            raise self.error("the file is empty", "copy it again from where it came")

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.raw.close()

    def error(self, reason: str, remedy: str) -> VolumeError:
        return VolumeError(f"{self.path}: {reason}; {remedy}")

    def warn(self, message: str) -> None:
        if not self.quiet:
            warn(f"{self.path}: {message}")

    def is_gzip(self) -> bool:
        return self.raw.peek(2)[:2] == b"\x1f\x8b"

    def inflate(self) -> None:
        """What follows is compressed, by gzip or zlib."""
        zipped = gzip.GzipFile(fileobj=self.raw, mode="rb") if self.is_gzip() else _Zlib(self.raw)
        self._stream, self.compressed = zipped, True

    def could_hold(self, count: int) -> bool:
        """Whether `count` bytes can come out of a file of this size at all."""
        return count <= self.file_size * (_DEFLATE_RATIO if self.compressed else 1)

    def line(self, longest: int) -> bytes:
        """The next line with its end, at most `longest` bytes; b"" at the end of the file."""
        return self.raw.readline(longest)

    def fill(self, buffer: memoryview) -> None:
        """Fills the buffer with the next bytes."""
        done = 0
        try:
            while done < len(buffer):
                got = self._stream.readinto(buffer[done : done + _CHUNK])
                if not got:
                    raise EOFError("end of file")
                done += got
        except EOFError as error:
            raise self.error("the file is cut off", "copy or export it again") from error
        except (OSError, zlib.error) as error:
            raise self.error(f"damaged data ({error})", "copy or export it again") from error

    def read(self, count: int) -> bytes:
        buffer = bytearray(count)
        self.fill(memoryview(buffer))
        return bytes(buffer)

    def skip(self, count: int) -> None:
        while count > 0:
            count -= len(self.read(min(count, 1 << 20)))

    def skip_to_last(self, count: int) -> None:
        """To the last `count` bytes of a file that is not compressed."""
        before = self.file_size - count - self.raw.tell()
        if before < 0:
            raise self.error(f"the last {count} bytes overlap the header", "it is cut off: copy it again")
        self.skip(before)

    def end(self) -> None:
        """Checks that nothing follows, and if compressed that length and checksum are right."""
        try:
            rest = self._stream.read(1)
        except (OSError, EOFError, zlib.error) as error:
            raise self.error(f"damaged or cut off at its end ({error})", "copy or export it again") from error
        if rest:
            raise self.error(
                "the file goes on after the voxels that its header announces",
                "one of the two is wrong; export it again",
            )

    def afford(self, end: int, needed: int, limit: int | None) -> None:
        """Refuses what the file cannot hold (bytes up to its last voxel) or memory is not to (limit)."""
        if not self.could_hold(end):
            raise self.error(
                f"the header announces {end} bytes, the file of {self.file_size} bytes cannot hold them",
                "it is cut off or its header damaged; copy or export it again",
            )
        limit = machine_memory() // 2 if limit is None else limit
        if needed > limit:
            raise self.error(
                f"its voxels need {needed} bytes of memory, the limit is {limit}",
                "raise it by read(path, max_bytes=...) if the machine has them",
            )

    def voxels(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """The next values in C order, which have to be the file's last."""
        try:
            array = np.empty(shape, dtype)
        except (MemoryError, ValueError) as error:
            needed = math.prod(shape) * dtype.itemsize
            raise self.error(f"no memory for {needed} bytes of voxels", "use a larger machine") from error
        self.fill(array.reshape(-1).view(np.uint8).data)
        self.end()
        return array


class _Zlib:
    """A zlib stream; the last byte of it must be the file's last."""

    def __init__(self, raw: IO[bytes]) -> None:
        self.raw = raw
        self._decoder = zlib.decompressobj()

    def readinto(self, buffer: memoryview) -> int:
        while len(buffer) and not self._decoder.eof:
            data = self._decoder.unconsumed_tail or self.raw.read(1 << 16)
            out = self._decoder.decompress(data, len(buffer))
            buffer[: len(out)] = out
            if out or not data:
                return len(out)
        return 0

    def read(self, count: int) -> bytes:
        buffer = bytearray(count)
        got = self.readinto(memoryview(buffer))
        if not got and not self._decoder.eof:
            raise EOFError("its checksum is missing")
        return bytes(buffer[:got]) or self._decoder.unused_data or self.raw.read(count)


def write_atomically(path: Path, save: Callable[[IO[bytes]], None], check: Callable[[Path], None]) -> None:
    """What `save` writes becomes `path`, or nothing does.

    The bytes go to a file aside, are flushed to the disk, looked at by `check` and renamed: at any
    instant `path` holds either what it held before or everything.
    """
    path = Path(os.path.realpath(path))
    aside = path.with_name(f".convoxel-{uuid.uuid4().hex}.part")
    try:
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as raw:
            save(raw)
            raw.flush()
            os.fsync(raw.fileno())
        check(aside)
        os.replace(aside, path)
        _sync_folder(path.parent)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            raise VolumeError(
                f"{path}: cannot write ({reason}); check that the folder exists, is writable and not full"
            ) from error
        raise


def write_array(stream: IO[bytes] | gzip.GzipFile, array: NDArray[Any]) -> None:
    """In C order, by planes: a reoriented view is never copied whole."""
    for index in np.ndindex(array.shape[:-2]):
        stream.write(np.ascontiguousarray(array[index]).data)


def gzipped(stream: IO[bytes]) -> gzip.GzipFile:
    """To write into, and to close. No name and no time inside: the same volume gives the same bytes."""
    return gzip.GzipFile("", "wb", COMPRESSION, stream, mtime=0)


def warn(message: str) -> None:
    """A UserWarning at the line outside this package that called it."""
    level, frame = 1, sys._getframe()
    while frame.f_back and Path(frame.f_code.co_filename).is_relative_to(_HERE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened, and the rename is durable without
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def machine_memory() -> int:
    """Bytes of physical memory; 8 GiB where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 8 << 30
