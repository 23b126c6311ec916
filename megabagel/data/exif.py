"""The orientation in a block of EXIF, whatever else the block holds."""

import struct

ORIENTATION = 0x0112
_SHORT, _LONG = 3, 4


def orientation_of(block: bytes) -> int | None:
    """The number of tag 274 in the first directory of an EXIF block; None where there is none.

    Pillow reads all tags at once, so that one it cannot read (a doubled one, a text where a number belongs, an offset
    beyond the end) hides the others.
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
