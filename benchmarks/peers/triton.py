"""Forwards of our ops in Triton: one program per block of rows, masked loads, sums in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32  # rows per program in softmax_topk
COLUMNS = 256  # columns per program in `gather_rows` and `sum_slots`; a thread loads 16 bytes of 16-bit values at once
TOKENS = 8  # tokens or slots per program in these two kernels


@triton.jit
def _softmax_topk(logits, values, indices, n, E, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = row < n
    # Rows past the end read the last row again, because a row that is all -inf has no softmax.
    source = tl.minimum(row, n - 1).to(tl.int64) * E
    column = tl.arange(0, BLOCK_E)[None, :]
    x = tl.load(logits + source[:, None] + column, mask=column < E, other=float("-inf")).to(tl.float32)
    largest = tl.max(x, 1)
    total = tl.sum(tl.exp(x - largest[:, None]), 1)
    for k in tl.static_range(K):
        best, index = tl.max(x, 1, return_indices=True)
        target = row.to(tl.int64) * K + k
        tl.store(values + target, tl.exp(best - largest) / total, mask=is_row)
        tl.store(indices + target, index, mask=is_row)
        x = tl.where(column == index[:, None], float("-inf"), x)


def softmax_topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the k largest gates of every row of logits [..., E], and their experts as int32."""
    E = logits.shape[-1]
    n = logits.numel() // E
    values = logits.new_empty(*logits.shape[:-1], k)
    indices = torch.empty_like(values, dtype=torch.int32)
    block = triton.next_power_of_2(E)
    _softmax_topk[(triton.cdiv(n, ROWS),)](logits, values, indices, n, E, k, ROWS, block, num_warps=4)
    return values, indices


@triton.jit
def _gather_rows(x, rows, out, n, S, D, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    slot = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    row = tl.load(rows + slot, mask=slot < S, other=n)
    filled = (row < n)[:, None] & (column < D)
    value = tl.load(x + row[:, None] * D + column, mask=filled, other=0.0)
    tl.store(out + slot[:, None].to(tl.int64) * D + column, value, mask=(slot < S)[:, None] & (column < D))


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Gathers a row of x [n, D] per slot. `rows` [S] int64 is n for an empty slot, which gets zeros."""
    (n, D), S = x.shape, rows.shape[0]
    out = x.new_empty(S, D)
    grid = (triton.cdiv(S, TOKENS), triton.cdiv(D, COLUMNS))
    _gather_rows[grid](x, rows, out, n, S, D, TOKENS, COLUMNS, num_warps=4)
    return out


@triton.jit
def _sum_slots(y, gate, places, out, n, D, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for k in tl.static_range(K):
        place = tl.load(places + token.to(tl.int64) * K + k, mask=token < n, other=-1)
        weight = tl.load(gate + place, mask=place >= 0, other=0.0)
        filled = (place >= 0)[:, None] & (column < D)
        total += weight[:, None] * tl.load(y + place[:, None] * D + column, mask=filled, other=0.0)
    tl.store(out + token[:, None].to(tl.int64) * D + column, total, mask=(token < n)[:, None] & (column < D))


def sum_slots(y: Tensor, gate: Tensor, places: Tensor) -> Tensor:
    """Sums the rows of y [S, D], weighted by gate [S], per token. `places` [n, K] int64 is -1 for dropped requests."""
    (n, K), D = places.shape, y.shape[1]
    out = y.new_empty(n, D)
    grid = (triton.cdiv(n, TOKENS), triton.cdiv(D, COLUMNS))
    _sum_slots[grid](y, gate, places, out, n, D, K, TOKENS, COLUMNS, num_warps=4)
    return out
