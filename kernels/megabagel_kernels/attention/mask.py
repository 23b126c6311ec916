"""The mask as plain integers: one code per key, two half-open code intervals per query.

A public key (text, clean images) carries its sequence position. A private key (an image being noised) carries
`PRIVATE + group`, with group ids unique in the pack. Padding carries -1. Query i sees key j iff

    a0[i] <= key_code[j] < a1[i]   or   b0[i] <= key_code[j] < b1[i]

where A ranges over public and B over private codes:

    split of query i                          A                              B
    causal (text)                             [sample start, i + 1)          empty
    full (ViT, clean latents)                 [sample start, split end)      empty
    noise, group g                            [sample start, split start)    [PRIVATE + g, PRIVATE + g + 1)
    noise, in a chain that began at group f   [sample start, split start)    [PRIVATE + f, PRIVATE + g + 1)
    padding                                   empty                          empty

An interval is empty when both ends are equal. The codes carry the sequence order, so tokens may lie in any order, and
queries and keys may be any subset of the pack (a context-parallel rank, a KV cache): 20 bytes per token, no dense mask.

Letters: T queries, S keys.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PRIVATE = 2**30
"""First private code. Sequence positions of public keys stay below it."""

PADDING = -1
"""Code of a key that no query sees."""

Codes = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class AttentionCodes:
    """Who sees whom in one pack (or part of one); see the top of this file for the rule."""

    key_code: Codes  # [S]
    a0: Codes  # [T] public keys from here ...
    a1: Codes  # [T] ... to here, exclusive
    b0: Codes  # [T] private keys from here ...
    b1: Codes  # [T] ... to here, exclusive

    @property
    def queries(self) -> int:
        """Number of queries T."""
        return len(self.a0)

    @property
    def keys(self) -> int:
        """Number of keys S."""
        return len(self.key_code)

    def padded(self, count: int) -> "AttentionCodes":
        """The same mask with `count` more tokens at the end that neither see nor are seen."""
        blind = np.zeros(count, np.int32)
        intervals = (np.concatenate([bound, blind]) for bound in (self.a0, self.a1, self.b0, self.b1))
        return AttentionCodes(np.concatenate([self.key_code, np.full(count, PADDING, np.int32)]), *intervals)

    def take(self, queries: npt.ArrayLike | None = None, keys: npt.ArrayLike | None = None) -> "AttentionCodes":
        """The same mask for chosen (or reordered) queries and keys, given by index; None keeps all of them."""
        q = slice(None) if queries is None else np.asarray(queries, dtype=np.int64)
        k = slice(None) if keys is None else np.asarray(keys, dtype=np.int64)
        return AttentionCodes(self.key_code[k], self.a0[q], self.a1[q], self.b0[q], self.b1[q])


def check(codes: AttentionCodes) -> None:
    """Raise ValueError unless the arrays are int32 vectors of equal length with intervals in their own code range."""
    arrays = {name: getattr(codes, name) for name in ("key_code", "a0", "a1", "b0", "b1")}
    for name, array in arrays.items():
        if array.dtype != np.int32 or array.ndim != 1:
            raise ValueError(f"{name}: expected a vector of int32, found {array.dtype} with shape {array.shape}")
        if name != "key_code" and len(array) != codes.queries:
            raise ValueError(f"{name}: expected one entry per query ({codes.queries}, as a0), found {len(array)}")
    _check_rows("key_code", codes.key_code >= PADDING, f"codes are {PADDING} (padding) or more", arrays)
    _check_rows("a0, a1", (codes.a0 >= 0) & (codes.a0 <= codes.a1), "0 <= a0 <= a1", arrays)
    _check_rows("a1", codes.a1 <= PRIVATE, f"public codes lie below {PRIVATE}", arrays)
    _check_rows("b0, b1", codes.b0 <= codes.b1, "b0 <= b1", arrays)
    _check_rows("b0, b1", (codes.b0 == codes.b1) | (codes.b0 >= PRIVATE), f"private codes start at {PRIVATE}", arrays)


def _check_rows(names: str, good: npt.NDArray[np.bool_], rule: str, arrays: dict[str, Codes]) -> None:
    if good.all():
        return
    at = int(np.argmin(good))
    found = ", ".join(f"{name}[{at}] = {arrays[name][at]}" for name in names.split(", "))
    raise ValueError(f"{found}: expected {rule}")


def dense_mask(codes: AttentionCodes) -> npt.NDArray[np.bool_]:
    """The mask as bool [T, S]; for tests and tiny references only."""
    code = codes.key_code[None, :]
    in_a = (codes.a0[:, None] <= code) & (code < codes.a1[:, None])
    in_b = (codes.b0[:, None] <= code) & (code < codes.b1[:, None])
    return in_a | in_b


def visible_per_query(codes: AttentionCodes) -> npt.NDArray[np.int64]:
    """Number of keys that each query sees, int64 [T], in O((S + T) log S)."""
    ordered = np.sort(codes.key_code)

    def count(start: Codes, stop: Codes) -> npt.NDArray[np.int64]:
        return np.searchsorted(ordered, stop) - np.searchsorted(ordered, start)

    return count(codes.a0, codes.a1) + count(codes.b0, codes.b1)


def visible_pairs(codes: AttentionCodes) -> int:
    """Exact number of (query, key) pairs that attention computes: the area behind FLOP counts and load balance."""
    return int(visible_per_query(codes).sum())
