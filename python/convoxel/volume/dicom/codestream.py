"""What a compressed frame says of its own size, before a decoder takes memory for it.

JPEG and JPEG-LS: the frame header SOFn (FF C0 to CF, F7), two bytes rows, two bytes columns; JPEG 2000:
the SIZ marker, four bytes each, less the image's offset; RLE: no size, but at most 64 bytes out of one.
"""

from __future__ import annotations

import struct
from typing import Any

from ..files import Source
from .headers import Pixels

_NO_SIZE = (0xC4, 0xC8, 0xCC)  # in the range of the frame headers, but tables
_RLE = "1.2.840.10008.1.2.5"


def check_frames(dataset: Any, pixels: Pixels, source: Source) -> None:
    from pydicom.encaps import generate_frames

    expected = pixels.rows * pixels.columns * pixels.allocated // 8
    frames = int(dataset.get("NumberOfFrames") or 1)
    for frame in generate_frames(dataset.PixelData, number_of_frames=frames):
        if str(dataset.file_meta.get("TransferSyntaxUID")) == _RLE:
            size = (pixels.rows, pixels.columns) if len(frame) * 64 >= expected else (0, 0)
        else:
            size = _size(bytes(frame[: 1 << 20]))
        if size != (pixels.rows, pixels.columns):
            raise source.error(
                f"its header says {pixels.rows} x {pixels.columns}, a compressed frame {size[0]} x {size[1]}",
                "one of the two is damaged: export it again",
            )


def _size(frame: bytes) -> tuple[int, int]:
    """(rows, columns); (0, 0) if it is none of these."""
    start = frame.find(b"\xff\x4f\xff\x51", 0, 256)  # JPEG 2000, perhaps inside a JP2 file's boxes
    if start >= 0 and len(frame) >= start + 24:
        width, height, x, y = struct.unpack_from(">4I", frame, start + 8)
        return height - y, width - x
    at = 2 if frame[:2] == b"\xff\xd8" else len(frame)
    while at + 9 <= len(frame) and frame[at] == 0xFF:
        mark, length = frame[at + 1], int.from_bytes(frame[at + 2 : at + 4], "big")
        if (0xC0 <= mark <= 0xCF and mark not in _NO_SIZE) or mark == 0xF7:
            rows, columns = struct.unpack_from(">HH", frame, at + 5)
            return rows, columns
        at += 1 if mark == 0xFF else 2 + length
    return 0, 0
