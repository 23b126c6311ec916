"""TIFF files that Pillow does not open although they are sound: grey of 16 bits, big-endian, white at zero."""

import struct

_PHOTOMETRIC, _BITS = 262, 258
_HEADER = b"MM\0*"


def readable(blob: bytes) -> bytes:
    """The file, with its pixels turned negative on disk where Pillow knows no mode for white at zero.

    Pillow 12 has WhiteIsZero of 16 bits in Intel's byte order only. Uncompressed pixels of the other order are
    inverted and declared BlackIsZero, which shows the same picture; anything else is returned as it is.
    """
    if not blob.startswith(_HEADER):
        return blob
    try:
        tags = _tags(blob)
    except struct.error:
        return blob
    is_grey = tags.get(_BITS, (0, ()))[1] == (16,) and tags.get(_PHOTOMETRIC, (0, ()))[1] == (0,)
    strips = tags.get(273, (0, ()))[1], tags.get(279, (0, ()))[1]
    if not is_grey or tags.get(259, (0, (1,)))[1] != (1,) or not strips[0] or len(strips[0]) != len(strips[1]):
        return blob
    data = bytearray(blob)
    for start, length in zip(*strips, strict=True):
        data[start : start + length] = bytes(255 - byte for byte in data[start : start + length])
    struct.pack_into(">H", data, tags[_PHOTOMETRIC][0], 1)
    return bytes(data)


def _tags(blob: bytes) -> dict[int, tuple[int, tuple[int, ...]]]:
    """Numbers of the first directory by tag, and where the first of them lies. Raises struct.error."""
    (directory,) = struct.unpack_from(">I", blob, 4)
    (count,) = struct.unpack_from(">H", blob, directory)
    found = {}
    for entry in range(directory + 2, directory + 2 + 12 * count, 12):
        tag, kind, number = struct.unpack_from(">HHI", blob, entry)
        if kind not in (3, 4) or number > len(blob):
            continue
        size = number * (2 if kind == 3 else 4)
        at = entry + 8 if size <= 4 else struct.unpack_from(">I", blob, entry + 8)[0]
        found[tag] = at, struct.unpack_from(f">{number}{'H' if kind == 3 else 'I'}", blob, at)
    return found
