"""MetaImage files (.mha; .mhd with the voxels in a file beside it), ITK's own format.

The header is lines of text, `Key = value`, up to `ElementDataFile`; axes are listed fastest first, the
rows of TransformMatrix are the directions of the axes, in LPS. Parsed here for the same reason as NRRD.
"""

from __future__ import annotations

import re
import zlib
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from .core import Volume
from .files import COMPRESSION, Source, write_array
from .layout import MM, RAS_FROM_LPS, Layout, numbers, placed, shrunk, sizes_of, voxels, wholes

_DTYPES = {
    **{"MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4"},
    **{"MET_UINT": "u4", "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8"},
    **{"MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8"},
}
_NAMES = {code: name for name, code in _DTYPES.items() if name not in ("MET_LONG", "MET_ULONG")}
_ALIAS = {
    **dict.fromkeys(("Rotation", "Orientation"), "TransformMatrix"),
    **dict.fromkeys(("Position", "Origin"), "Offset"),
    "ElementByteOrderMSB": "BinaryDataByteOrderMSB",
}
_HEADER = 1 << 20  # bytes
_KEPT = ("TransformMatrix", "Offset", "ElementSpacing", "DistanceUnits")
_DIGITS = 20  # of CompressedDataSize, which is filled in when it is known


def layout(source: Source) -> tuple[Layout, Source]:
    """The header, checked, and the source that stands at the first voxel: this one or the file beside it."""
    fields = _fields(source)
    rank = wholes(fields.get("NDims", ""), "NDims", source)
    if len(rank) != 1 or not 2 <= rank[0] <= 4:
        raise source.error(f"it has {rank} dimensions", "expected 2, 3 or 4; split or export it again")
    sizes = sizes_of(fields.get("DimSize", ""), rank[0], "DimSize", source)
    affine, spacing = _place(fields, sizes, source)
    shape, channels = _channels(fields, sizes, source)
    kept = {name: fields[name] for name in _KEPT if name in fields} if len(sizes) == 3 else None
    found = Layout(
        shape, _dtype(fields, source), affine, spacing, channels, kept and {"metaimage": 1, **kept}
    )
    return found, _voxels(fields, found, source)


def _fields(source: Source) -> dict[str, str]:
    fields: dict[str, str] = {}
    left = _HEADER
    while line := source.line(left):
        left -= len(line)
        text = line.decode("utf-8", "replace").strip()
        name, equals, value = text.partition("=")
        name, value = _ALIAS.get(name.strip(), name.strip()), value.strip()
        if not fields and name not in ("ObjectType", "NDims", "Comment"):
            raise source.error(
                f"not a MetaImage file: it should begin with ObjectType, it begins with {line[:20]!r}",
                "check that this is the right file",
            )
        if not text:
            continue
        if not equals or not line.endswith(b"\n"):
            break
        if name in fields:
            raise source.error(f"the header gives {name[:80]!r} twice", "one of the two is wrong: remove it")
        fields[name] = value
        if name == "ElementDataFile":
            return fields
    raise source.error(
        "the header does not come to ElementDataFile", "it is cut off or damaged: copy or export it again"
    )


def _flag(fields: dict[str, str], name: str, default: bool, source: Source) -> bool:
    value = fields.get(name, str(default)).lower()
    if value not in ("true", "false", "1", "0", "t", "f"):
        raise source.error(f"{name} is {value[:80]!r}", "expected True or False; export the file again")
    return value[0] in "t1"


def _dtype(fields: dict[str, str], source: Source) -> np.dtype[Any]:
    if fields.get("ObjectType", "Image") != "Image":
        raise source.error(f"it holds {fields['ObjectType'][:80]!r}", "expected ObjectType Image")
    name = fields.get("ElementType", "missing")
    if name not in _DTYPES:
        raise source.error(
            f"ElementType is {name[:80]!r}", "expected integers or floats of up to 64 bits; convert the file"
        )
    big = _flag(fields, "BinaryDataByteOrderMSB", False, source)
    return np.dtype(_DTYPES[name]).newbyteorder(">" if big else "<")


def _channels(fields: dict[str, str], sizes: list[int], source: Source) -> tuple[tuple[int, ...], int | None]:
    """Shape of the bytes in C order, and which axis counts channels."""
    count = wholes(fields.get("ElementNumberOfChannels", "1"), "ElementNumberOfChannels", source)
    if len(count) != 1 or count[0] < 1:
        raise source.error(f"ElementNumberOfChannels is {count}", "expected at least 1; export it again")
    shape = tuple([*sizes, *[1] * (3 - len(sizes))][::-1])
    if count[0] == 1:
        return shape, 0 if len(shape) == 4 else None
    if len(shape) == 4:
        raise source.error("it has four dimensions and channels besides", "split the file")
    return (*shape, count[0]), 3


def _place(
    fields: dict[str, str], sizes: list[int], source: Source
) -> tuple[NDArray[np.float64], tuple[float, float, float]]:
    n = len(sizes)
    unit = MM.get(fields.get("DistanceUnits", "mm").lower())
    if unit is None:
        raise source.error(f"DistanceUnits is {fields['DistanceUnits'][:80]!r}", "expected mm, um, cm or m")
    said = fields.get("ElementSpacing", fields.get("ElementSize"))
    if said is None:
        raise source.error("the header gives no ElementSpacing", "set the right one (mm) and save it again")
    step = np.array(numbers(said, n, "ElementSpacing", source))
    rows = np.eye(n)
    if "TransformMatrix" in fields:
        matrix = numbers(fields["TransformMatrix"], n * n, "TransformMatrix", source)
        rows = np.array(matrix).reshape(n, n)
    else:
        source.warn(
            "the header has no TransformMatrix; its axes are taken to run to left, posterior, superior"
        )
    with np.errstate(all="ignore"):
        unitary = np.allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-3)
    apart = n == 4 and (rows[3, :3].any() or rows[:3, 3].any())
    if not unitary or apart:
        raise source.error(
            f"the rows of TransformMatrix should be directions of length 1: {rows.tolist()}",
            "export the file again",
        )
    affine = np.eye(4)
    space = min(n, 3)
    with np.errstate(all="ignore"):
        affine[:space, :space] = rows[:space, :space].T * step[:space] * unit
        if "Offset" in fields:
            affine[:space, 3] = np.array(numbers(fields["Offset"], n, "Offset", source))[:space] * unit
        affine = RAS_FROM_LPS @ affine
    if (step[:space] <= 0).any():
        raise source.error(f"ElementSpacing is {said[:80]!r}", "expected positive numbers in mm")
    return affine, placed(affine, source)


def _voxels(fields: dict[str, str], found: Layout, source: Source) -> Source:
    if not _flag(fields, "BinaryData", True, source):
        raise source.error("its voxels are written as text", "save it again in binary")
    compressed = _flag(fields, "CompressedData", False, source)
    name = fields["ElementDataFile"]
    if re.search(r"%|^LIST", name):
        raise source.error("its voxels are in a list of files", "save it again as one .mha file")
    skip = wholes(fields.get("HeaderSize", "0"), "HeaderSize", source)[0]
    local = name.upper() == "LOCAL"
    if skip < -1 or (skip and (compressed or local)):
        raise source.error(f"HeaderSize is {skip}", "expected 0; export the file again")
    return voxels(source, None if local else name, found, skip, Source.inflate if compressed else None)


def save(volume: Volume, stream: IO[bytes], compress: bool) -> None:
    """Channels as ITK has them: interleaved."""
    array = shrunk(volume.array)
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    code = array.dtype.str[1:]
    channels = array.shape[0] if array.ndim == 4 else 1
    lines = ["ObjectType = Image", "NDims = 3", "BinaryData = True", "BinaryDataByteOrderMSB = False"]
    lines += [f"{name} = {value}" for name, value in _placement(volume).items()]
    lines += [
        f"DimSize = {' '.join(map(str, array.shape[:-4:-1]))}",
        *([f"ElementNumberOfChannels = {channels}"] if channels > 1 else []),
        f"ElementType = {_NAMES[code]}",
        f"CompressedData = {compress}",
    ]
    head = "\n".join(lines).encode() + b"\n"
    end = b"ElementDataFile = LOCAL\n"
    if array.ndim == 4:
        array = np.moveaxis(array, 0, -1)
    if not compress:
        stream.write(head + end)
        return write_array(stream, array)
    size_at = len(head) + len(b"CompressedDataSize = ")
    stream.write(head + b"CompressedDataSize = " + b" " * _DIGITS + b"\n" + end)
    start = stream.tell()
    encoder = zlib.compressobj(COMPRESSION)
    for index in np.ndindex(array.shape[:-2]):
        stream.write(encoder.compress(np.ascontiguousarray(array[index]).data))
    stream.write(encoder.flush())
    size = stream.tell() - start
    stream.seek(size_at)
    stream.write(str(size).encode())


def _placement(volume: Volume) -> dict[str, str]:
    """The fields as they were read, or the affine to 17 digits."""
    kept = volume._file_placement()
    if kept is not None and "metaimage" in kept:
        return {name: kept[name] for name in _KEPT if name in kept}
    affine = RAS_FROM_LPS @ volume.affine
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    rows = (affine[:3, :3] / lengths).T
    return {
        "TransformMatrix": _text(rows.ravel()),
        "Offset": _text(affine[:3, 3]),
        "CenterOfRotation": "0 0 0",
        "ElementSpacing": _text(lengths),
    }


def _text(values: NDArray[np.float64]) -> str:
    return " ".join(repr(float(v) + 0.0).removesuffix(".0") for v in values)
