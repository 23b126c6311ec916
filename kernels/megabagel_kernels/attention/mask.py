"""BAGEL's attention mask as integers: a code per key, two half-open ranges of codes per query.

A query sees a key if and only if the key's code lies in one of the query's two ranges:

    public_start <= key_code < public_stop   or   private_start <= key_code < private_stop

Public keys (text, clean images) have their position in the sequence as code. Private keys (noised images) have
`PRIVATE` + a number of their image or group of images, unique in the pack; padding has `PADDING`. The ranges of a query
depend on its segment, the run of tokens of one text or image (`split_lens` in the official code):

    segment of the query                       public range                       private range
    causal (text)                              [sample start, own position + 1)   empty
    full (ViT image, clean latents)            [sample start, segment end)        empty
    noise, group g                             [sample start, segment start)      [PRIVATE + g, PRIVATE + g + 1)
    noise, in a chain that begins at group f   [sample start, segment start)      [PRIVATE + f, PRIVATE + g + 1)
    padding                                    empty                              empty

A range with equal ends is empty. A chain is diffusion forcing: a later group also sees the groups of its chain before.
The idea of a mask as ranges is MagiAttention's (AttnRanges), there in units of slices and here per token.

Because codes carry the sequence order, tokens may be stored in any order, and queries and keys may be any subset of a
pack: the [und | gen] layout, a context-parallel rank and a KV cache need no code of their own. The mask takes 20 bytes
per token; no T x S matrix is made.

Letters: T queries, K keys.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PRIVATE = 2**30
"""First private code. Sequence positions, the codes of public keys, stay below it."""

PADDING = -1
"""Code of a key that no query sees."""

Codes = npt.NDArray[np.int32]

RANGES = ("public_start", "public_stop", "private_start", "private_stop")
"""Names of the per-query arrays, in the order of the fields of `AttentionRanges`."""


@dataclass(frozen=True, eq=False)
class AttentionRanges:
    """The mask between T queries and K keys; the rule is at the top of this file."""

    key_code: Codes  # [K]
    public_start: Codes  # [T]
    public_stop: Codes  # [T] exclusive
    private_start: Codes  # [T]
    private_stop: Codes  # [T] exclusive

    @property
    def queries(self) -> int:
        """Number of queries T."""
        return len(self.public_start)

    @property
    def keys(self) -> int:
        """Number of keys S."""
        return len(self.key_code)

    @property
    def of_queries(self) -> tuple[Codes, Codes, Codes, Codes]:
        """(public_start, public_stop, private_start, private_stop)."""
        return self.public_start, self.public_stop, self.private_start, self.private_stop

    def padded(self, count: int) -> "AttentionRanges":
        """The same mask with `count` more tokens at the end that see nothing and that nothing sees."""
        empty = np.zeros(count, np.int32)
        ranges = (np.concatenate([bound, empty]) for bound in self.of_queries)
        return AttentionRanges(np.concatenate([self.key_code, np.full(count, PADDING, np.int32)]), *ranges)

    def take(self, queries: npt.ArrayLike | None = None, keys: npt.ArrayLike | None = None) -> "AttentionRanges":
        """The same mask for chosen (or reordered) queries and keys, given by index; None keeps all of them."""
        q = slice(None) if queries is None else np.asarray(queries, dtype=np.int64)
        k = slice(None) if keys is None else np.asarray(keys, dtype=np.int64)
        return AttentionRanges(self.key_code[k], *(bound[q] for bound in self.of_queries))


def check(ranges: AttentionRanges) -> None:
    """Raise ValueError unless the arrays are int32 vectors of equal length and ranges stay among their own codes."""
    arrays = {name: getattr(ranges, name) for name in ("key_code", *RANGES)}
    for name, array in arrays.items():
        if array.dtype != np.int32 or array.ndim != 1:
            raise ValueError(f"{name}: expected a vector of int32, found {array.dtype} with shape {array.shape}")
        if name != "key_code" and len(array) != ranges.queries:
            raise ValueError(
                f"{name}: expected one entry per query ({ranges.queries}, as public_start), found {len(array)}"
            )
    key_code, (start, stop, private_start, private_stop) = ranges.key_code, ranges.of_queries
    public, private = ("public_start", "public_stop"), ("private_start", "private_stop")
    empty = private_start == private_stop
    _check_all(arrays, ("key_code",), key_code >= PADDING, f"codes are {PADDING} (padding) or more")
    _check_all(arrays, public, (start >= 0) & (start <= stop), "0 <= public_start <= public_stop")
    _check_all(arrays, public[1:], stop <= PRIVATE, f"public codes are below {PRIVATE}")
    _check_all(arrays, private, private_start <= private_stop, "private_start <= private_stop")
    _check_all(arrays, private, empty | (private_start >= PRIVATE), f"private codes start at {PRIVATE}")


def _check_all(arrays: dict[str, Codes], names: tuple[str, ...], good: npt.NDArray[np.bool_], rule: str) -> None:
    if good.all():
        return
    at = int(np.argmin(good))
    found = ", ".join(f"{name}[{at}] = {arrays[name][at]}" for name in names)
    raise ValueError(f"{found}: expected {rule}")


def dense_mask(ranges: AttentionRanges) -> npt.NDArray[np.bool_]:
    """The mask as bool [T, S]; for tests and small references only."""
    code = ranges.key_code[None, :]
    start, stop, private_start, private_stop = (bound[:, None] for bound in ranges.of_queries)
    return ((start <= code) & (code < stop)) | ((private_start <= code) & (code < private_stop))


def visible_per_query(ranges: AttentionRanges) -> npt.NDArray[np.int64]:
    """Number of keys that each query sees, int64 [T], in O((S + T) log S)."""
    ordered = np.sort(ranges.key_code)
    start, stop, private_start, private_stop = (np.searchsorted(ordered, bound) for bound in ranges.of_queries)
    return stop - start + private_stop - private_start


def visible_pairs(ranges: AttentionRanges) -> int:
    """Exact number of visible (query, key) pairs, on which FLOP counts and load balance rest."""
    return int(visible_per_query(ranges).sum())
