"""Reader of tar headers that is safe on untrusted files: lists the members of a shard, and how it ends.

The standard library's tarfile was used before and rejected. It reads header extensions of any announced length into
memory, recurses once per extension, walks backwards at a negative size (an endless loop in Python 3.11.7), fails at
sizes of 2**63, and stops at the first end mark, so that of concatenated tars only the first was read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
MAX_EXTENSION = 2**20
"""Largest header extension (a PAX header, a GNU long name) that is read, in bytes; file names have at most 4096."""
MAX_FILES = 2**22
"""Most files of one shard that are listed; a list of that many takes about 1 GB."""

BEHIND_THE_END = "data after the end mark"
"""Start of the message about bytes that follow a complete tar and are not a tar themselves."""

_ZEROS = bytes(BLOCK)
_PIECE = 2**20
_LINKS = {b"1": "a hard link to a file that is not before it", b"2": "a symbolic link"}
_NO_DATA = frozenset(b"123456")
"""Types without data, whatever their size field says: links, devices, folders, FIFOs."""
_OTHERS = {
    b"3": "a device",
    b"4": "a device",
    b"6": "a FIFO",
    b"M": "the continuation of a file from another volume",
}


class NotTar(Exception):
    """The file does not begin with a tar header."""


class _Damaged(Exception):
    """An invalid header. Everything after it is lost, because the next header can't be located."""


@dataclass(frozen=True, slots=True)
class TarFile:
    """A member of a tar: a regular file of `size` bytes from byte `offset`, or an unusable member with a `fault`.

    Bytes of a name that are not UTF-8 become surrogates (PEP 383), so that different names stay different.
    """

    name: str
    offset: int
    size: int
    fault: str = ""
    """Why the member cannot be read (a link, a sparse file, a device); empty for a regular file."""


@dataclass(frozen=True, slots=True)
class _Header:
    """Fields of one header block."""

    name: bytes
    size: int
    kind: bytes
    link: bytes
    extended: bool
    """Old GNU sparse file whose map continues in further blocks."""


def walk(file: BinaryIO, length: int) -> tuple[list[TarFile], str | None]:
    """List the members of a tar.

    Concatenated tars are read as one (like `tar -i`). A hard link is listed with the bytes of the file that it links
    to. Nothing after a damaged header is listed, and the last member before it may be cut off.

    Args:
        file: the open tar.
        length: its length in bytes.

    Returns:
        The members in order, and a description of the damage at the end (None for an intact tar).

    Raises:
        NotTar: there is no header at byte 0.
        OSError: the file cannot be read.
    """
    return _Walk(file, length).run()


class _Walk:
    """State of one walk."""

    def __init__(self, file: BinaryIO, length: int) -> None:
        self._file, self._length = file, length
        self._at = 0
        self._files: list[TarFile] = []
        self._regular: dict[bytes, TarFile] = {}
        self._global: dict[bytes, bytes] = {}
        self._forget_extensions()

    def _forget_extensions(self) -> None:
        """Reset the header extensions, which apply to the next member only."""
        self._local: dict[bytes, bytes] = {}
        self._fault = ""

    def run(self) -> tuple[list[TarFile], str | None]:
        """Walk to the end or to the first damaged header; see `walk`."""
        ended = False
        while True:
            block = self._read(self._at, BLOCK)
            if block == _ZEROS:
                ended = True
                if not self._skip_zeros():
                    return self._files, None
                continue
            # Zeros after the end mark that do not fill a block are padding.
            if len(block) < BLOCK and ended and not block.strip(b"\0"):
                return self._files, None
            try:
                header = _header(block)
                # Another tar was appended; extensions of the one before do not apply to it.
                if ended:
                    ended, self._global = False, {}
                    self._forget_extensions()
                self._member(header)
            except _Damaged as error:
                if self._at == 0 and not str(error):
                    raise NotTar("no tar header at byte 0" if self._length else "empty file") from error
                where = BEHIND_THE_END if ended else "no end mark"
                return self._files, str(error) or f"{where} at byte {self._at}"
            if len(self._files) > MAX_FILES:
                return self._files, f"more than {MAX_FILES:,} files"

    def _read(self, at: int, size: int) -> bytes:
        self._file.seek(at)
        return self._file.read(size)

    def _skip_zeros(self) -> bool:
        """Move to the next block that is not all zeros; return whether there is one."""
        while piece := self._read(self._at, _PIECE):
            rest = len(piece.lstrip(b"\0"))
            if rest:
                self._at += (len(piece) - rest) // BLOCK * BLOCK
                return True
            self._at += len(piece)
        return False

    def _member(self, header: _Header) -> None:
        """Process one header and move past its data."""
        data_at = self._at + BLOCK
        if header.kind in (b"x", b"X", b"g", b"L", b"K"):
            self._extension(header, data_at)
        else:
            self._entry(header, data_at)
            self._forget_extensions()

    def _extension(self, header: _Header, data_at: int) -> None:
        """Process a header extension, which applies to all members that follow (PAX `g`) or to the next one."""
        # A bad extension is a fault of the member that it belongs to, not of the tar: its size is known, so the walk
        # can continue behind it.
        self._fit("a header extension", data_at, header.size)
        if header.size > MAX_EXTENSION:
            self._fault = f"header extension of {header.size:,} bytes"
        else:
            data = self._read(data_at, header.size)
            try:
                match header.kind:
                    case b"L":
                        self._local[b"path"] = data.partition(b"\0")[0]
                    case b"K":
                        self._local[b"linkpath"] = data.partition(b"\0")[0]
                    case b"g":
                        self._global |= _pax_records(data)
                    case _:
                        self._local |= _pax_records(data)
            except ValueError:
                self._fault = "damaged header extension"
        self._at = _next_block(data_at + header.size)

    def _entry(self, header: _Header, data_at: int) -> None:
        """Process the header of a file, folder, link or other member."""
        fields = {key: value for key, value in (self._global | self._local).items() if value}
        name = fields.get(b"GNU.sparse.name") or fields.get(b"path") or header.name
        link = fields.get(b"linkpath") or header.link
        size = 0 if header.kind[0] in _NO_DATA else _pax_size(fields, header.size)
        extended = header.extended
        while extended:
            block = self._read(data_at, BLOCK)
            if len(block) < BLOCK:
                raise _Damaged(f"the map of a sparse file is cut off at byte {data_at}")
            extended, data_at = block[504] != 0, data_at + BLOCK
        # Formats before POSIX have no type for folders; their names end in a slash.
        is_folder = header.kind == b"5" or (header.kind == b"0" and name.endswith(b"/"))
        if not is_folder and header.kind not in (b"V", b"D", b"N"):  # volume label, GNU's listings
            self._add(name, link, header.kind, data_at, size, any(key.startswith(b"GNU.sparse.") for key in fields))
        self._fit(printable_name(name), data_at, size)
        self._at = _next_block(data_at + size)

    def _add(self, name: bytes, link: bytes, kind: bytes, data_at: int, size: int, sparse: bool) -> None:
        text, fault = name.decode(errors="surrogateescape"), self._fault
        if not fault:
            if kind == b"1" and (target := self._regular.get(link)):
                self._files.append(TarFile(text, target.offset, target.size))
                return
            fault = _LINKS.get(kind) or _OTHERS.get(kind) or ("a sparse file" if kind == b"S" or sparse else "")
            if not fault and kind != b"0":
                fault = f"a member of type {kind!r}"
        self._files.append(TarFile(text, data_at, size, fault))
        if not fault:
            self._regular[name] = self._files[-1]

    def _fit(self, what: str, at: int, size: int) -> None:
        if size > self._length - at:
            raise _Damaged(f"unexpected end of data: {what} has {size:,} bytes at byte {at} of {self._length:,}")


def _header(block: bytes) -> _Header:
    """Parse a header block. Raises _Damaged, without a message, if the block is not a header."""
    if len(block) < BLOCK:
        raise _Damaged
    stored = _octal(block[148:156])
    plain = block[:148] + b" " * 8 + block[156:]
    total = sum(plain)
    # Some old programs computed the checksum over signed characters; both sums are accepted.
    if stored is None or stored not in (total, total - 256 * sum(byte > 127 for byte in plain)):
        raise _Damaged
    size, kind = _number(block[124:136]), block[156:157]
    # Regular files under other names: the type of old programs, and "contiguous file".
    if kind in (b"\0", b"7"):
        kind = b"0"
    if size is None:
        raise _Damaged(f"the header of {printable_name(_text(block[:100]))} has no valid size")
    name, prefix = _text(block[:100]), _text(block[345:500])
    # Only in the POSIX format: GNU tar stores other fields in place of the prefix.
    if prefix and block[257:263] == b"ustar\0":
        name = prefix + b"/" + name
    return _Header(name, size, kind, _text(block[157:257]), kind == b"S" and block[482] != 0)


def printable_name(name: bytes) -> str:
    """Name of a member for messages: control characters and bytes that are not UTF-8 are escaped."""
    return ascii(name.decode(errors="surrogateescape"))[1:-1][:100] or "a member without a name"


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _number(field: bytes) -> int | None:
    """Parse octal digits, or base 256 if the first byte is 0x80 (GNU); None for anything else, such as negatives."""
    return int.from_bytes(field[1:], "big") if field[0] == 0x80 else _octal(field)


def _octal(field: bytes) -> int | None:
    digits = _text(field).strip()
    if digits.strip(b"01234567"):
        return None
    return int(digits or b"0", 8)


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """Parse PAX records `LENGTH key=value\\n`; keeps only keys that are used. Raises ValueError if malformed."""
    found, at = {}, 0
    while at < len(data) and data[at]:
        blank = data.find(b" ", at, at + 20)
        if blank < 0 or not data[at:blank].isdigit():
            raise ValueError("no length")
        stop = at + int(data[at:blank])
        key, equals, value = data[blank + 1 : stop - 1].partition(b"=")
        if not blank < stop - 1 < len(data) or data[stop - 1 : stop] != b"\n" or not equals:
            raise ValueError("no record")
        if key in (b"path", b"linkpath", b"size") or key.startswith(b"GNU.sparse."):
            found[key] = value
        at = stop
    return found


def _pax_size(fields: Mapping[bytes, bytes], size: int) -> int:
    """Size of a member in bytes: from its PAX header if it has one, else from the header block."""
    if (given := fields.get(b"size")) is None:
        return size
    if not given.isdigit() or len(given) > 30:
        raise _Damaged(f"a PAX header gives the size {given[:40]!r}")
    return int(given)


def _next_block(at: int) -> int:
    return -(-at // BLOCK) * BLOCK
