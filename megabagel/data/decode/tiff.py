"""Workaround for valid TIFF files that Pillow does not open: 16-bit grey, big-endian, white at zero."""

import struct

_PHOTOMETRIC, _BITS = 262, 258
_HEADER = b"MM\0*"


def readable(blob: bytes) -> bytes:
    """Rewrite a big-endian 16-bit WhiteIsZero TIFF as BlackIsZero with inverted pixels, which is the same image.

    Pillow 12 supports 16-bit WhiteIsZero in little-endian files only. Only uncompressed pixels can be inverted; any
    other file is returned unchanged.
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
    """Integer tags of the first directory: tag -> (offset of the first value, values). Raises struct.error."""
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
