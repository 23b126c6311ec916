"""Triton kernels of attention under the mask of `mask.py`: tile access, forward, and the row statistics of backward.

One source serves sm_80 (pointers), sm_90 and sm_100 (host descriptors, which become TMA copies) and the interpreter.

A program of the forward kernel computes one block of queries of one head. It goes through its list of key blocks
(`schedule.BlockLists`), full blocks first, for which no mask is evaluated, with the online softmax of FlashAttention-2
(arXiv 2307.08691, algorithm 1) in base 2. Nothing is accumulated across programs, so equal inputs give equal bits.

Tensors: Q, OUT [T, N, H]; K, V [K, M, H]; LSE [N, T]. RANGES [4, T_pad] holds public_start, public_stop, private_start
and private_stop of the queries, CODE [S_pad] the key codes; both are padded to whole blocks with entries that see
nothing. STATS [2 N, T_pad] holds lse in base 2 of each head, then delta of each head.

Letters: T queries, K keys, N query heads, M key/value heads, GROUP = N / M, H head dim, HP the next power of two.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def load_tile(
    X, row, head, length, stride, ROWS: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, DESCRIPTOR: tl.constexpr
):
    """Tile [ROWS, HP] of one head from `row` on; zeros beyond `length` rows or H columns.

    X is a pointer to rows `stride` elements apart, or a descriptor of the matrix [length, heads H], which needs HP = H.
    """
    if DESCRIPTOR:
        tile = X.load([row, head * H])
    else:
        rows = row + tl.arange(0, ROWS)
        columns = tl.arange(0, HP)
        inside = (rows < length)[:, None]
        if HP != H:
            inside = inside & (columns < H)[None, :]
        tile = tl.load(X + rows[:, None] * stride + (head * H + columns)[None, :], mask=inside, other=0.0)
    return tile


@triton.jit
def store_tile(
    X, tile, row, head, length, stride, ROWS: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, DESCRIPTOR: tl.constexpr
):
    """The counterpart of `load_tile`: rounds to the dtype of X and writes nothing beyond its ends."""
    if DESCRIPTOR:
        X.store([row, head * H], tile.to(X.dtype))
    else:
        rows = row + tl.arange(0, ROWS)
        columns = tl.arange(0, HP)
        inside = (rows < length)[:, None]
        if HP != H:
            inside = inside & (columns < H)[None, :]
        to = X + rows[:, None] * stride + (head * H + columns)[None, :]
        tl.store(to, tile.to(X.dtype.element_ty), mask=inside)


@triton.jit
def load_ranges(RANGES, rows, T_pad):
    """The public range [a0, a1) and the private range [b0, b1) of some queries."""
    a0 = tl.load(RANGES + rows)
    a1 = tl.load(RANGES + T_pad + rows)
    b0 = tl.load(RANGES + 2 * T_pad + rows)
    b1 = tl.load(RANGES + 3 * T_pad + rows)
    return a0, a1, b0, b1


@triton.jit
def visible(a0, a1, b0, b1, code):
    """The mask: whether a query sees a key with this code; arguments broadcast against each other."""
    return ((a0 <= code) & (code < a1)) | ((b0 <= code) & (code < b1))


@triton.jit
def load_work(WORK, place):
    """(block, full_start, full_stop, partial_start, partial_stop) of `schedule.BlockLists.work`.

    partial_start equals full_stop, but is read separately: when the compiler can prove this, it ties the two
    loops together so that sm_90 waits for every matrix product (ptxas: "wgmma instructions are serialized").
    """
    row = WORK + 5 * place
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)


@triton.jit
def _forward_blocks(
    total, peak, out, q, a0, a1, b0, b1,
    K, V, CODE, BLOCKS, start, stop, kv_head, S, k_stride, v_stride, scale_2,
    MASKED: tl.constexpr, COLS: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """Continue the online softmax over the key blocks BLOCKS[start:stop]; MASKED for partial blocks."""
    block = tl.load(BLOCKS + start)
    for place in tl.range(start, stop):
        column = block * COLS
        block = tl.load(BLOCKS + place + 1)  # one iteration ahead, so that no copy waits for its address
        k = load_tile(K, column, kv_head, S, k_stride, COLS, H, HP, DESCRIPTOR)
        score = tl.dot(q, k.T, input_precision="ieee")
        if MASKED:
            code = tl.load(CODE + column + tl.arange(0, COLS))
            seen = visible(a0[:, None], a1[:, None], b0[:, None], b1[:, None], code[None, :])
            score = tl.where(seen, score * scale_2, -INFINITY)
            new_peak = tl.maximum(peak, tl.max(score, 1))
            # The peak of a row that has seen nothing yet is -inf, and -inf minus -inf would be NaN.
            base = tl.where(new_peak == -INFINITY, 0.0, new_peak)
            weight = tl.math.exp2(score - base[:, None])
        else:
            new_peak = tl.maximum(peak, tl.max(score, 1) * scale_2)
            base = new_peak
            weight = tl.math.exp2(score * scale_2 - base[:, None])
        shrink = tl.math.exp2(peak - base)
        total = total * shrink + tl.sum(weight, 1)
        v = load_tile(V, column, kv_head, S, v_stride, COLS, H, HP, DESCRIPTOR)
        out = tl.dot(weight.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
        peak = new_peak
    return total, peak, out


@triton.jit(do_not_specialize=["T", "S"])
def forward(
    Q, K, V, OUT, LSE, WORK, BLOCKS, RANGES, CODE,
    T, S, T_pad, N, q_stride, k_stride, v_stride, out_stride, scale_2,
    GROUP: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """OUT and LSE of one block of queries of one head. `scale_2` is the softmax scale times log2(e), positive."""
    program = tl.program_id(0)
    head = program % N  # heads are fastest: neighbouring programs share K and V in the L2 cache
    block, full_start, full_stop, partial_start, partial_stop = load_work(WORK, program // N)
    kv_head = head // GROUP
    row = block * ROWS
    rows = row + tl.arange(0, ROWS)
    a0, a1, b0, b1 = load_ranges(RANGES, rows, T_pad)
    q = load_tile(Q, row, head, T, q_stride, ROWS, H, HP, DESCRIPTOR)

    total = tl.zeros((ROWS,), tl.float32)
    peak = tl.full((ROWS,), -INFINITY, tl.float32)
    out = tl.zeros((ROWS, HP), tl.float32)
    total, peak, out = _forward_blocks(
        total, peak, out, q, a0, a1, b0, b1, K, V, CODE, BLOCKS, full_start, full_stop, kv_head, S, k_stride,
        v_stride, scale_2, False, COLS, H, HP, DESCRIPTOR,
    )  # fmt: skip
    total, peak, out = _forward_blocks(
        total, peak, out, q, a0, a1, b0, b1, K, V, CODE, BLOCKS, partial_start, partial_stop, kv_head, S,
        k_stride, v_stride, scale_2, True, COLS, H, HP, DESCRIPTOR,
    )  # fmt: skip

    saw = total > 0.0
    divisor = tl.where(saw, total, 1.0)
    lse = tl.where(saw, (peak + tl.math.log2(divisor)) * LN_2, -INFINITY)
    store_tile(OUT, out / divisor[:, None], row, head, T, out_stride, ROWS, H, HP, DESCRIPTOR)
    tl.store(LSE + head * T + rows, lse, mask=rows < T)


@triton.jit(do_not_specialize=["T"])
def statistics(
    OUT, GRAD, LSE, GRAD_LSE, STATS, T, T_pad, N,
    HAS_GRAD_LSE: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """STATS for backward: lse in base 2, and delta = sum(out * grad) - grad_lse, of ROWS queries of one head.

    Queries that saw nothing, and rows beyond T, get delta 0, also if the gradient of their lse (-inf) is NaN.
    """
    row = tl.program_id(0) * ROWS
    head = tl.program_id(1)
    rows = row + tl.arange(0, ROWS)
    real = rows < T
    out = load_tile(OUT, row, head, T, N * H, ROWS, H, HP, False).to(tl.float32)
    grad = load_tile(GRAD, row, head, T, N * H, ROWS, H, HP, False).to(tl.float32)
    delta = tl.sum(out * grad, 1)
    if HAS_GRAD_LSE:
        delta -= tl.load(GRAD_LSE + head * T + rows, mask=real, other=0.0)
    lse = tl.load(LSE + head * T + rows, mask=real, other=-INFINITY)
    tl.store(STATS + head * T_pad + rows, lse * LOG2_E)
    tl.store(STATS + (N + head) * T_pad + rows, tl.where(lse == -INFINITY, 0.0, delta))
