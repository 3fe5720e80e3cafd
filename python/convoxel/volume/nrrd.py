"""NRRD files (.nrrd; .nhdr with the voxels in a file beside it), as ITK, 3D Slicer and teem write them.

The header is lines of text, `field: value`, up to an empty line; axes are listed fastest first. It is
parsed here and not by a library, because nothing in it may be believed: fields of unknown names are
skipped, of the known ones each value is checked before memory is taken for the voxels.
"""

from __future__ import annotations

import re
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from .core import Volume
from .files import Source, gzipped, write_array
from .layout import MM, RAS_FROM_LPS, Layout, numbers, placed, shrunk, sizes_of, voxels, wholes

_TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("unsigned char", "uchar", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("unsigned short", "ushort", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("unsigned int", "uint", "uint32", "uint32_t"),
    "i8": (
        *("longlong", "long long", "long long int", "signed long long", "signed long long int"),
        *("int64", "int64_t"),
    ),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
_DTYPES = {name: np.dtype(code) for code, names in _TYPES.items() for name in names}
_RAS_FROM = {
    **dict.fromkeys(("right-anterior-superior", "ras"), np.eye(4)),
    **dict.fromkeys(("left-anterior-superior", "las"), np.diag([-1.0, 1.0, 1.0, 1.0])),
    **dict.fromkeys(("left-posterior-superior", "lps"), RAS_FROM_LPS),
}
_UNSAID = ("", "scanner-xyz", "3d-right-handed", "3d-left-handed")  # three axes, but not which way they run
_SPATIAL = ("domain", "space")  # kinds of axes; others count time, channels, gradients
_ALIAS = {"datafile": "data file", "byteskip": "byte skip", "lineskip": "line skip"}
_HEADER = 16 << 20  # bytes; segmentations with thousands of named segments have one


def layout(source: Source) -> tuple[Layout, Source]:
    """The header, checked, and the source that stands at the first voxel: this one or the file beside it."""
    fields = _fields(source)
    sizes, kinds = _sizes(fields, source)
    vectors, origin, to_ras = _place(fields, sizes, kinds, source)
    spatial = [axis for axis, vector in enumerate(vectors) if vector is not None]
    others = [axis for axis in range(len(sizes)) if axis not in spatial and sizes[axis] > 1]
    if not 2 <= len(spatial) <= 3 or len(others) > 1:
        raise source.error(
            f"it has {len(spatial)} axes in space and {len(others)} others (sizes {sizes}, fastest first)",
            "expected 2 or 3 and at most one for channels; split the file",
        )
    columns = [vectors[axis] for axis in spatial]
    affine = to_ras @ _affine(columns, origin)
    spacing = placed(affine, source)
    axes = sorted(spatial + others)
    shape = [sizes[axis] for axis in reversed(axes)]
    channels = len(axes) - 1 - axes.index(others[0]) if others else None
    if len(spatial) == 2:
        at = 0 if channels != 0 else 1
        shape.insert(at, 1)
        channels = channels + 1 if channels is not None and channels >= at else channels
    found = Layout(tuple(shape), _dtype(fields, source), affine, spacing, channels)
    return found, _voxels(fields, found, source)


def _fields(source: Source) -> dict[str, str]:
    """Field names in lower case; key/value pairs (`key:=value`) and comments are left out."""
    mark = source.line(64)
    if not re.fullmatch(rb"NRRD000[1-5]\r?\n", mark):
        raise source.error(
            f"not a NRRD file: it should begin with NRRD0001 to NRRD0005, it begins with {mark[:12]!r}",
            "check that this is the right file",
        )
    fields: dict[str, str] = {}
    left = _HEADER
    while line := source.line(left):
        left -= len(line)
        if not line.endswith(b"\n"):
            break
        text = line.decode("utf-8", "replace").rstrip("\r\n")
        if not text:
            return fields
        name, colon, value = text.partition(":")
        name = _ALIAS.get(name.strip().lower(), name.strip().lower())
        if text.startswith("#") or value.startswith("="):
            continue
        if not colon:
            raise source.error(f"no field of a header: {text[:80]!r}", "the header is damaged: copy it again")
        if name in fields:
            raise source.error(f"the header gives {name[:80]!r} twice", "one of the two is wrong: remove it")
        fields[name] = value.strip()
    if "data file" in fields:  # a header of its own need not end in an empty line
        return fields
    raise source.error("the header has no end", "the file is cut off or damaged: copy or export it again")


def _wanted(fields: dict[str, str], name: str, source: Source) -> str:
    if not fields.get(name):
        raise source.error(f"the header has no field {name!r}", "it is damaged: copy or export it again")
    return fields[name]


def _dtype(fields: dict[str, str], source: Source) -> np.dtype[Any]:
    name = " ".join(_wanted(fields, "type", source).lower().split())
    if name not in _DTYPES:
        raise source.error(
            f"the voxels' type is {name[:80]!r}", "expected integers or floats of up to 64 bits; convert it"
        )
    dtype = _DTYPES[name]
    if dtype.itemsize == 1:
        return dtype
    endian = _wanted(fields, "endian", source).lower()
    if endian not in ("little", "big"):
        raise source.error(f"endian is {endian[:80]!r}", "expected little or big; export the file again")
    return dtype.newbyteorder("<" if endian == "little" else ">")


def _sizes(fields: dict[str, str], source: Source) -> tuple[list[int], list[str]]:
    """Sizes and kinds of the axes, fastest first."""
    rank = wholes(_wanted(fields, "dimension", source), "dimension", source)
    if len(rank) != 1 or not 2 <= rank[0] <= 5:
        raise source.error(f"it has {rank} dimensions", "expected 2, 3 or 4; split or export it again")
    sizes = sizes_of(_wanted(fields, "sizes", source), rank[0], "sizes", source)
    kinds = fields.get("kinds", "").lower().split()
    if kinds and len(kinds) != len(sizes):
        raise source.error(f"{len(sizes)} sizes but {len(kinds)} kinds of axes", "export the file again")
    return sizes, kinds


def _place(
    fields: dict[str, str], sizes: list[int], kinds: list[str], source: Source
) -> tuple[list[list[float] | None], list[float], NDArray[np.float64]]:
    """Per axis its step in space (in mm; None for channels), the origin, and RAS from that space."""
    space = fields.get("space", "").lower()
    if space not in _RAS_FROM and space not in _UNSAID:
        raise source.error(
            f"its space is {space[:80]!r}", "expected left-posterior-superior or another of three axes"
        )
    dimension = fields.get("space dimension", "3")
    if dimension != "3" and (space or dimension != "2"):
        raise source.error(f"its space has {dimension[:20]!r} dimensions", "expected 3; export it again")
    if "space directions" not in fields:
        if space:
            raise source.error("it names a space but no space directions", "export it again")
        return _bare(fields, sizes, kinds, source)
    if not space:
        source.warn("the header does not say which way its space runs; taken as left-posterior-superior")
    elif space in _UNSAID:
        source.warn(f"its space is {space}; taken as left-posterior-superior")
    unit = _unit(re.findall(r'"([^"]*)"', fields.get("space units", "")), source)
    vectors = _vectors(fields["space directions"], "space directions", int(dimension), source)
    if len(vectors) != len(sizes):
        raise source.error(f"{len(sizes)} sizes but {len(vectors)} space directions", "export it again")
    if "space origin" in fields:
        origin = _vectors(fields["space origin"], "space origin", int(dimension), source)
        if len(origin) != 1 or origin[0] is None:
            raise source.error(f"space origin is {fields['space origin'][:80]!r}", "expected one point")
        start = origin[0]
    else:
        source.warn("the header gives no space origin; the first voxel is put at 0, 0, 0")
        start = [0.0] * 3
    scaled = [None if vector is None else [unit * v for v in vector] for vector in vectors]
    return scaled, [unit * v for v in start], _RAS_FROM.get(space, RAS_FROM_LPS)


def _bare(
    fields: dict[str, str], sizes: list[int], kinds: list[str], source: Source
) -> tuple[list[list[float] | None], list[float], NDArray[np.float64]]:
    """Voxel sizes alone: axes as ITK takes them, the first voxel at the origin."""
    words = fields.get("spacings", "").split()
    if len(words) != len(sizes):
        raise source.error(
            f"the header gives neither space directions nor a spacing for each of the {len(sizes)} axes",
            "export it from the program that knows them",
        )
    spatial = [
        word.lower() != "nan" and (not kinds or kinds[axis] in (*_SPATIAL, "???", "none"))
        for axis, word in enumerate(words)
    ]
    for axis in reversed(range(len(sizes))):  # nothing said: the slowest axis counts channels
        if sum(spatial) > 3:
            spatial[axis] = False
    unit = _unit(re.findall(r'"([^"]*)"', fields.get("units", "")), source)
    steps: list[list[float] | None] = []
    for axis, word in enumerate(words):
        step = numbers(word, 1, "spacings", source)[0] * unit if spatial[axis] else 0.0
        at = sum(spatial[:axis])
        steps.append([step if i == at else 0.0 for i in range(3)] if spatial[axis] else None)
    source.warn("the header does not say how the scan lies; taken as left-posterior-superior from 0, 0, 0")
    return steps, [0.0] * 3, RAS_FROM_LPS


def _unit(units: list[str], source: Source) -> float:
    found = {MM.get(unit.strip().lower()) for unit in units if unit.strip()} or {1.0}
    unit = found.pop()
    if found or unit is None:
        raise source.error(f"its units of length are {units[:4]}", "expected one that is known, best mm")
    return unit


def _vectors(text: str, what: str, dimension: int, source: Source) -> list[list[float] | None]:
    if not re.fullmatch(r"(\s*(none|\([^()]*\)))+\s*", text):
        raise source.error(f"{what} is {text[:80]!r}", 'expected "(1,0,0) (0,1,0) ..."; export it again')
    words = re.findall(r"none|\([^()]*\)", text)
    return [
        None if word == "none" else [*numbers(word[1:-1], dimension, what, source), *[0.0] * (3 - dimension)]
        for word in words
    ]


def _affine(columns: list[list[float] | None], origin: list[float]) -> NDArray[np.float64]:
    affine = np.eye(4)
    affine[:3, : len(columns)] = np.array(columns, float).T
    affine[:3, 3] = origin
    if len(columns) == 2:  # a plane needs no third size; it is 1 mm thick
        normal = np.cross(affine[:3, 0], affine[:3, 1])
        affine[:3, 2] = normal / (np.linalg.norm(normal) or 1.0)
    return affine


def _voxels(fields: dict[str, str], found: Layout, source: Source) -> Source:
    encoding = _wanted(fields, "encoding", source).lower()
    if encoding not in ("raw", "gzip", "gz"):
        raise source.error(f"its encoding is {encoding[:80]!r}", "expected raw or gzip; save it again so")
    name = fields.get("data file")
    if name is not None and re.search(r"%|^LIST| [0-9]", name):
        raise source.error("its voxels are in a list of files", "save it again as one .nrrd file")
    if "line skip" in fields and wholes(fields["line skip"], "line skip", source) != [0]:
        raise source.error("its header skips lines of text", "save it again as one .nrrd file")
    skip = wholes(fields.get("byte skip", "0"), "byte skip", source)[0]
    if skip < -1 or (skip == -1 and encoding != "raw"):
        raise source.error(f"its header skips {skip} bytes", "expected 0 or more; export it again")
    return voxels(source, name, found, skip, None if encoding == "raw" else _gunzip)


def _gunzip(data: Source) -> None:
    if not data.is_gzip():
        raise data.error("the header says gzip, the voxels are not", "one is damaged: export it again")
    data.inflate()


def save(volume: Volume, stream: IO[bytes], compress: bool) -> None:
    """Left-posterior-superior, as ITK writes it; the affine to the last bit."""
    array = shrunk(volume.array)
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    code = array.dtype.str[1:]
    affine = RAS_FROM_LPS @ volume.affine + 0.0  # no -0.0
    x, y, z, origin = ("(" + ",".join(repr(float(v)) for v in affine[:3, i]) + ")" for i in range(4))
    channels = array.ndim == 4
    lines = [
        "NRRD0004",
        f"type: {_TYPES[code][0]}",
        f"dimension: {array.ndim}",
        "space: left-posterior-superior",
        f"sizes: {' '.join(map(str, array.shape[::-1]))}",
        f"space directions: {x} {y} {z}{' none' * channels}",
        f"kinds: domain domain domain{' list' * channels}",
        "endian: little",
        f"encoding: {'gzip' if compress else 'raw'}",
        f"space origin: {origin}",
    ]
    stream.write("\n".join([*lines, "", ""]).encode())
    if not compress:
        return write_array(stream, array)
    with gzipped(stream) as zipped:
        write_array(zipped, array)
