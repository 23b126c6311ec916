"""Triton kernels of the backward pass: one for dq, one for dk and dv; tensors and letters as in `triton_forward`.

With P = exp2(scale_2 q k^T - lse) and dS = P * (grad v^T - delta), both computed again by blocks (FlashAttention-2,
arXiv 2307.08691, algorithm 2): dq = scale dS k, dk = scale dS^T q, dv = P^T grad. Two kernels compute 7 matrix products
where one kernel would compute 5, but a single kernel would have to add up dq with atomics, in no fixed order.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from megabagel_kernels.attention.triton_forward import load_ranges, load_tile, load_work, store_tile, visible


@triton.jit
def _dq_blocks(
    dq, q, grad, lse_2, delta, a0, a1, b0, b1,
    K, V, CODE, BLOCKS, start, stop, kv_head, S, k_stride, v_stride, scale_2,
    MASKED: tl.constexpr, COLS: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """Add dS k of the key blocks BLOCKS[start:stop]."""
    block = tl.load(BLOCKS + start)
    for place in tl.range(start, stop):
        column = block * COLS
        block = tl.load(BLOCKS + place + 1)
        k = load_tile(K, column, kv_head, S, k_stride, COLS, H, HP, DESCRIPTOR)
        v = load_tile(V, column, kv_head, S, v_stride, COLS, H, HP, DESCRIPTOR)
        score = tl.dot(q, k.T, input_precision="ieee")
        weight = tl.math.exp2(score * scale_2 - lse_2[:, None])
        if MASKED:
            code = tl.load(CODE + column + tl.arange(0, COLS))
            seen = visible(a0[:, None], a1[:, None], b0[:, None], b1[:, None], code[None, :])
            weight = tl.where(seen, weight, 0.0)
        dweight = tl.dot(grad, v.T, input_precision="ieee")
        dscore = weight * (dweight - delta[:, None])
        dq = tl.dot(dscore.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["T", "S"])
def backward_dq(
    Q, K, V, GRAD, DQ, STATS, WORK, BLOCKS, RANGES, CODE,
    T, S, T_pad, N, q_stride, k_stride, v_stride, grad_stride, scale_2, scale,
    GROUP: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """DQ of one block of queries of one head; GRAD and DQ share a row stride."""
    program = tl.program_id(0)
    head = program % N
    block, full_start, full_stop, partial_start, partial_stop = load_work(WORK, program // N)
    kv_head = head // GROUP
    row = block * ROWS
    rows = row + tl.arange(0, ROWS)
    a0, a1, b0, b1 = load_ranges(RANGES, rows, T_pad)
    lse_2 = tl.load(STATS + head * T_pad + rows)
    delta = tl.load(STATS + (N + head) * T_pad + rows)
    q = load_tile(Q, row, head, T, q_stride, ROWS, H, HP, DESCRIPTOR)
    grad = load_tile(GRAD, row, head, T, grad_stride, ROWS, H, HP, DESCRIPTOR)

    dq = tl.zeros((ROWS, HP), tl.float32)
    dq = _dq_blocks(
        dq, q, grad, lse_2, delta, a0, a1, b0, b1, K, V, CODE, BLOCKS, full_start, full_stop, kv_head, S, k_stride,
        v_stride, scale_2, False, COLS, H, HP, DESCRIPTOR,
    )  # fmt: skip
    dq = _dq_blocks(
        dq, q, grad, lse_2, delta, a0, a1, b0, b1, K, V, CODE, BLOCKS, partial_start, partial_stop, kv_head, S,
        k_stride, v_stride, scale_2, True, COLS, H, HP, DESCRIPTOR,
    )  # fmt: skip
    store_tile(DQ, dq * scale, row, head, T, grad_stride, ROWS, H, HP, DESCRIPTOR)


@triton.jit
def load_statistic(STATS, line, row, T_pad, ROWS: tl.constexpr, DESCRIPTOR: tl.constexpr):
    """ROWS numbers of one line of STATS."""
    if DESCRIPTOR:
        statistic = STATS.load([line, row]).reshape(ROWS)
    else:
        statistic = tl.load(STATS + line * T_pad + row + tl.arange(0, ROWS))
    return statistic


@triton.jit
def _dkv_blocks(
    dk, dv, k, v, code,
    Q, GRAD, STATS, RANGES, BLOCKS, start, stop, first_head, T, T_pad, N, q_stride, grad_stride, scale_2,
    MASKED: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, H: tl.constexpr, HP: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """Add dS^T q and P^T grad of the query blocks BLOCKS[start:stop] of HEADS heads.

    One flat loop, so that the copies of one head overlap with the arithmetic of the head before. Scores are computed
    transposed: P^T and dS^T then stay in registers as left operands.
    """
    next_place = start
    next_head = first_head
    next_block = tl.load(BLOCKS + start)
    for _ in tl.range(0, (stop - start) * HEADS):
        row = next_block * ROWS
        head = next_head
        wraps = next_place + 1 == stop
        next_place = tl.where(wraps, start, next_place + 1)
        next_head = tl.where(wraps, next_head + 1, next_head)
        next_block = tl.load(BLOCKS + next_place)
        q = load_tile(Q, row, head, T, q_stride, ROWS, H, HP, DESCRIPTOR)
        grad = load_tile(GRAD, row, head, T, grad_stride, ROWS, H, HP, DESCRIPTOR)
        lse_2 = load_statistic(STATS, head, row, T_pad, ROWS, DESCRIPTOR)
        score = tl.dot(k, q.T, input_precision="ieee")
        weight = tl.math.exp2(score * scale_2 - lse_2[None, :])
        if MASKED:
            a0, a1, b0, b1 = load_ranges(RANGES, row + tl.arange(0, ROWS), T_pad)
            seen = visible(a0[None, :], a1[None, :], b0[None, :], b1[None, :], code[:, None])
            weight = tl.where(seen, weight, 0.0)
        dv = tl.dot(weight.to(grad.dtype), grad, dv, input_precision="ieee")
        dweight = tl.dot(v, grad.T, input_precision="ieee")
        delta = load_statistic(STATS, N + head, row, T_pad, ROWS, DESCRIPTOR)  # this late, to save registers
        dscore = weight * (dweight - delta[None, :])
        dk = tl.dot(dscore.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["T", "S"])
def backward_dkv(
    Q, K, V, GRAD, DK, DV, STATS, WORK, BLOCKS, RANGES, CODE,
    T, S, T_pad, N, q_stride, k_stride, v_stride, grad_stride, out_stride, scale_2, scale,
    GROUP: tl.constexpr, HEADS: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """DK and DV [S, N / HEADS, H] of one block of keys, summed over HEADS query heads of a group.

    With HEADS = GROUP these are the gradients. With fewer, the caller sums the parts of a group: more programs, for
    ranks with few key/value heads.
    """
    program = tl.program_id(0)
    parts = N // HEADS
    part = program % parts
    block, full_start, full_stop, partial_start, partial_stop = load_work(WORK, program // parts)
    first_head = part * HEADS
    kv_head = first_head // GROUP
    column = block * COLS
    code = tl.load(CODE + column + tl.arange(0, COLS))
    k = load_tile(K, column, kv_head, S, k_stride, COLS, H, HP, DESCRIPTOR)
    v = load_tile(V, column, kv_head, S, v_stride, COLS, H, HP, DESCRIPTOR)

    dk = tl.zeros((COLS, HP), tl.float32)
    dv = tl.zeros((COLS, HP), tl.float32)
    dk, dv = _dkv_blocks(
        dk, dv, k, v, code, Q, GRAD, STATS, RANGES, BLOCKS, full_start, full_stop, first_head, T, T_pad, N, q_stride,
        grad_stride, scale_2, False, HEADS, ROWS, H, HP, DESCRIPTOR,
    )  # fmt: skip
    dk, dv = _dkv_blocks(
        dk, dv, k, v, code, Q, GRAD, STATS, RANGES, BLOCKS, partial_start, partial_stop, first_head, T, T_pad, N,
        q_stride, grad_stride, scale_2, True, HEADS, ROWS, H, HP, DESCRIPTOR,
    )  # fmt: skip
    store_tile(DK, dk * scale, column, part, S, out_stride, COLS, H, HP, DESCRIPTOR)
    store_tile(DV, dv, column, part, S, out_stride, COLS, H, HP, DESCRIPTOR)
