"""Bytes from and to the disk: reads stop at what the file can hold, writes are all or nothing."""

from __future__ import annotations

import gzip
import os
import stat
import uuid
import zlib
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from .core import VolumeError

_DEFLATE_RATIO = 1032  # deflate's best: 258 bytes out of 2 bits
_COMPRESSION = 3  # label maps shrink nearly as far as with 9, in a fraction of the time


class Source:
    """A file read from front to back; whatever goes wrong is a VolumeError that names it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.compressed = path.name.lower().endswith(".gz")
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
                raise self.error(f"this is {kind}", "give the path of one .nii or .nii.gz file")
            self.file_size = status.st_size
            self._raw: IO[bytes] = path.open("rb")
        except (OSError, ValueError) as error:
            if isinstance(error, VolumeError):
                raise
            reason = getattr(error, "strerror", None) or str(error)
            raise self.error(f"cannot open ({reason})", "check the path and its permissions") from error
        self._stream: IO[bytes] = self._raw
        try:
            self._open_stream()
        except BaseException:
            self._raw.close()
            raise

    def _open_stream(self) -> None:
        if self.file_size == 0:
            raise self.error("the file is empty", "copy it again from where it came")
        zipped = self._raw.read(2) == b"\x1f\x8b"
        self._raw.seek(0)
        if zipped and not self.compressed:
            raise self.error("named .nii but gzip-compressed", "rename it to .nii.gz")
        if self.compressed and not zipped:
            raise self.error("named .gz but not gzip-compressed", "rename it to .nii if it is NIfTI")
        if zipped:
            self._stream = gzip.GzipFile(fileobj=self._raw, mode="rb")  # type: ignore[assignment]

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._raw.close()

    def error(self, reason: str, remedy: str) -> VolumeError:
        return VolumeError(f"{self.path}: {reason}; {remedy}")

    def could_hold(self, count: int) -> bool:
        """Whether `count` bytes can come out of a file of this size at all."""
        return count <= self.file_size * (_DEFLATE_RATIO if self.compressed else 1)

    def fill(self, buffer: memoryview) -> None:
        """Fills the buffer with the next bytes."""
        done = 0
        try:
            while done < len(buffer):
                got = self._stream.readinto(buffer[done : done + (1 << 24)])  # type: ignore[attr-defined]
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

    def end(self) -> None:
        """Checks that nothing follows, and with gzip that length and checksum are right."""
        try:
            rest = self._stream.read(1)
        except (OSError, EOFError, zlib.error) as error:
            raise self.error(f"damaged or cut off at its end ({error})", "copy or export it again") from error
        if rest:
            raise self.error(
                "the file goes on after the voxels that its header announces",
                "one of the two is wrong; export it again",
            )

    def voxels(self, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        """The next `count` values, which have to be the file's last."""
        try:
            array = np.empty(count, dtype)
        except (MemoryError, ValueError) as error:
            raise self.error(
                f"no memory for {count * dtype.itemsize} bytes of voxels", "use a larger machine"
            ) from error
        self.fill(array.view(np.uint8).data)
        self.end()
        return array


def write_atomically(path: Path, head: bytes, array: NDArray[Any]) -> None:
    """Header bytes and the array in C order into `path`; gzip-compressed if the name ends in .gz.

    The bytes go to a file aside, are flushed to the disk and renamed: at any instant `path` holds either
    what it held before or everything.
    """
    path = Path(os.path.realpath(path))
    aside = path.with_name(f".convoxel-{uuid.uuid4().hex}.part")
    try:
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as raw:
            if path.name.lower().endswith(".gz"):
                # no name and no time inside: the same volume gives the same bytes
                with gzip.GzipFile("", "wb", _COMPRESSION, raw, mtime=0) as zipped:
                    _write(zipped, head, array)
            else:
                _write(raw, head, array)
            raw.flush()
            os.fsync(raw.fileno())
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


def _write(stream: Any, head: bytes, array: NDArray[Any]) -> None:
    stream.write(head)
    for index in np.ndindex(array.shape[:-2]):  # by planes: a reoriented view is never copied whole
        stream.write(np.ascontiguousarray(array[index]).data)


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
