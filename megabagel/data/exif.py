"""EXIF orientation, read without parsing the other tags."""

import struct

ORIENTATION = 0x0112
_SHORT, _LONG = 3, 4


def orientation_of(block: bytes) -> int | None:
    """Value of the orientation tag (274) in the first directory of an EXIF block, or None if there is none.

    Used where Pillow fails: it parses all tags at once, so a single malformed tag (duplicated, text instead of a
    number, an offset beyond the end) makes it lose the orientation too.
    """
    tiff = block.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return None
    try:
        (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, directory)
        for entry in range(directory + 2, directory + 2 + 12 * count, 12):
            tag, kind, number = struct.unpack_from(f"{order}HHI", tiff, entry)
            if tag == ORIENTATION and number == 1 and kind in (_SHORT, _LONG):
                return int(struct.unpack_from(f"{order}{'H' if kind == _SHORT else 'I'}", tiff, entry + 8)[0])
    except struct.error:
        pass
    return None
