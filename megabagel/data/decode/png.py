"""Removal of ancillary PNG chunks that have no effect on pixels."""

import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOURS_WITH_ALPHA = (4, 6)
_CLEAR_BYTES = {0: 2, 2: 6}
"""Length of a tRNS chunk in bytes by colour type; for a palette (3) it is at most one byte per colour."""


def pixels_alone(blob: bytes) -> bytes | None:
    """Strip a PNG to the chunks that determine its pixels.

    Critical chunks are kept, damaged or not; so are a well-formed transparency chunk, and an EXIF chunk (for the
    orientation) that begins with a TIFF header.

    Returns:
        The stripped file, or None if `blob` is no PNG or has nothing to remove.
    """
    if not blob.startswith(SIGNATURE):
        return None
    kept, at, colour, dropped = [SIGNATURE], 8, -1, False
    while at + 12 <= len(blob):
        length, kind = int.from_bytes(blob[at : at + 4], "big"), blob[at + 4 : at + 8]
        data, stop = blob[at + 8 : at + 8 + length], at + 12 + length
        if kind == b"IHDR" and len(data) == 13:
            colour = data[9]
        # PNG marks ancillary chunks by a lower-case first letter.
        is_critical = not kind[:1].islower()
        if is_critical or (_is_sound(blob[at:stop]) and _is_needed(kind, data, colour)):
            kept.append(blob[at:stop])
        else:
            dropped = True
        at = stop
        if kind == b"IEND":
            break
    if not dropped:
        return None
    return b"".join(kept) + (blob[at:] if at < len(blob) and kept[-1][4:8] != b"IEND" else b"")


def _is_sound(chunk: bytes) -> bool:
    return zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")


def _is_needed(kind: bytes, data: bytes, colour: int) -> bool:
    if kind == b"eXIf":
        return data.startswith((b"II*\0", b"MM\0*")) and len(data) >= 14
    if kind != b"tRNS" or colour in _COLOURS_WITH_ALPHA:
        return False
    return 0 < len(data) <= 256 if colour == 3 else len(data) == _CLEAR_BYTES.get(colour)
