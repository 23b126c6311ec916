"""Parts of the server without a server: forms, growing texts, metrics, jobs on the wire."""

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megabagel.data.tokenize.tokenizer import ByteTokenizer
from megabagel.serve.errors import ApiError
from megabagel.serve.jobs import Job, Upload, from_wire, to_wire
from megabagel.serve.metrics import Histogram, Metrics
from megabagel.serve.multipart import FormPart, parse_multipart
from megabagel.serve.text_stream import TextStream
from tests.support.pictures import file_of, noise


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["image[]", "prompt"]), st.binary(max_size=60)), min_size=1, max_size=5))
def test_forms_come_back_as_they_were_written(parts: list[tuple[str, bytes]]) -> None:
    files = [(name, (f"f{number}.png", data)) for number, (name, data) in enumerate(parts)]
    request = httpx.Request("POST", "http://x", files=files, data={"n": "2"})
    found = parse_multipart(request.headers["content-type"], request.read())
    assert [(part.name, part.data) for part in found if part.filename] == parts
    assert FormPart("n", None, b"2") in found


def test_line_ends_and_boundaries_inside_data_are_data() -> None:
    data = b"\r\n--b\n--bb\r\n\r\n--"
    body = b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n' + data + b"\r\n--b--\r\n"
    with pytest.raises(ApiError):  # "--b" after a line end is the boundary: a client has to choose another
        parse_multipart("multipart/form-data; boundary=b", body)
    body = body.replace(b"--b\r\nContent", b"--b7\r\nContent").replace(b"--b--\r\n", b"--b7--\r\n")
    (part,) = parse_multipart('multipart/form-data; boundary="b7"', body)
    assert part == FormPart("x", None, data)


@pytest.mark.parametrize(
    "body", [b"", b"--b--", b"--b\r\n\r\nx\r\n--b--", b"--b\r\nno header\r\n--b--", b"--b\r\n" * 100 + b"--b--"]
)
def test_damaged_forms_are_refused(body: bytes) -> None:
    if body == b"--b--":
        assert parse_multipart("multipart/form-data; boundary=b", body) == []
        return
    with pytest.raises(ApiError) as caught:
        parse_multipart("multipart/form-data; boundary=b", body)
    assert caught.value.status == 400


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 259), max_size=30))
def test_pieces_joined_are_the_text_of_all_ids(ids: list[int]) -> None:
    """Any bytes, also such as are no UTF-8; ids from 256 on are special and have no text."""
    stream = TextStream(ByteTokenizer())
    pieces = [stream.push(token) for token in ids] + [stream.finish()]
    assert "".join(pieces) == ByteTokenizer().decode(ids)


def test_a_character_is_given_once_it_is_complete() -> None:
    stream = TextStream(ByteTokenizer())
    assert [stream.push(byte) for byte in "aé€".encode()] == ["a", "", "é", "", "", "€"]


@settings(max_examples=200, deadline=None)
@given(st.text("abc", max_size=20), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_the_first_complete_stop_text_ends_the_stream_before_it(text: str, stops: list[str]) -> None:
    stream = TextStream(ByteTokenizer(), stops)
    got = "".join([*map(stream.push, text.encode()), stream.finish()])
    beginnings = (text[:end] for end in range(len(text) + 1))
    first = next((part for part in beginnings if any(part.endswith(stop) for stop in stops)), None)
    expected = text if first is None else first[: min(first.find(stop) for stop in stops if stop in first)]
    assert got == expected and stream.stopped == (first is not None)


def test_a_histogram_is_cumulative() -> None:
    histogram = Histogram()
    for seconds in (0.05, 0.07, 2.0, 1000.0):
        histogram.observe(seconds)
    lines = dict(line.rsplit(" ", 1) for line in histogram.lines("x", 'path="/"'))
    assert lines['x_bucket{path="/",le="0.05"}'] == "1" and lines['x_bucket{path="/",le="0.1"}'] == "2"
    assert lines['x_bucket{path="/",le="300"}'] == "3" and lines['x_bucket{path="/",le="+Inf"}'] == "4"
    assert lines['x_count{path="/"}'] == "4" and lines['x_sum{path="/"}'] == "1002.120000"


def test_metrics_have_help_and_type_before_every_value() -> None:
    metrics = Metrics()
    metrics.answered("/v1/chat/completions", 200, 0.2)
    lines = metrics.text({"cache_pages": ("Pages.", 8)}).splitlines()
    assert "megabagel_cache_pages 8" in lines and len(lines) == len(set(lines))
    named = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    values = {line.partition("{")[0].partition(" ")[0] for line in lines if not line.startswith("#")}
    assert all(any(value.removesuffix(end) in named for end in ("_bucket", "_sum", "_count", "")) for value in values)


def test_a_job_on_the_wire_is_the_same_job() -> None:
    image = noise(9, 5)
    job = Job(("a", Upload(file_of(image), image)), True, {"size": [64, 48], "seed": 2**53 - 1}, 3)
    again = from_wire(to_wire(job))
    assert (again.items[0], again.draws, again.options, again.previews) == ("a", True, job.options, 3)
    assert again.items[1].image.tobytes() == image.tobytes()
