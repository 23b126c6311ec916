"""Parts of a multipart/form-data body (RFC 7578) that is held in memory.

By hand, because the usual parser, python-multipart, is a streaming one for large uploads to disk; bodies here are bound
by `Limits.body` before they are parsed, and splitting bytes at the boundary is all there is to do.
"""

from dataclasses import dataclass
from email.message import Message
from email.parser import HeaderParser

from megabagel.serve.errors import ApiError

MOST_PARTS = 64


@dataclass(frozen=True)
class FormPart:
    """One field of a form."""

    name: str
    filename: str | None
    """None for a plain field."""
    data: bytes


def parse_multipart(content_type: str, body: bytes) -> list[FormPart]:
    """The parts of a form, in order.

    Args:
        content_type: value of that header, which names the boundary.
        body: the whole body.

    Raises:
        ApiError: it is no form, or is damaged.
    """
    header = Message()
    header["Content-Type"] = content_type
    boundary = header.get_boundary()
    if header.get_content_type() != "multipart/form-data" or not boundary or not boundary.isascii():
        raise ApiError(
            415, f"Content-Type is {content_type[:80]!r}: expected multipart/form-data with a boundary", "invalid_form"
        )
    mark = b"\r\n--" + boundary.encode()
    pieces = (b"\r\n" + body).split(mark, MOST_PARTS + 2)
    # What precedes the first boundary is a preamble; the last boundary is followed by "--".
    if len(pieces) < 2 or len(pieces) > MOST_PARTS + 2 or not pieces[-1].startswith(b"--"):
        raise ApiError(400, f"the form is cut off, or has more than {MOST_PARTS} parts", "invalid_form")
    return [_part(piece) for piece in pieces[1:-1]]


def _part(piece: bytes) -> FormPart:
    """A part from what stands between two boundaries: the rest of the line, headers, an empty line, data."""
    _, line_end, rest = piece.partition(b"\r\n")
    head, empty_line, data = rest.partition(b"\r\n\r\n")
    headers = HeaderParser().parsestr(head.decode("utf-8", "replace"))
    name = headers.get_param("name", header="Content-Disposition")
    if not line_end or not empty_line or not isinstance(name, str):
        raise ApiError(400, "a part of the form has no name; expected Content-Disposition: form-data", "invalid_form")
    return FormPart(name, headers.get_filename(), data)
