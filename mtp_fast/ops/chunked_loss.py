"""The loop of the linear cross-entropies: logits, loss and gradient, a chunk of rows at a time.

The rows of all heads that count form one list, which is cut into chunks. For each chunk one GEMM
makes the logits, one kernel turns them into loss, statistics and, in place, gradient, and two
GEMMs take the gradient to d(hidden) and d(weight): 6 N d V FLOPs in all, as many as with whole
logits.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mtp_fast import _C
from mtp_fast.ops import _common
from mtp_fast.ops._loss_arguments import RowTerms
from mtp_fast.ops.cross_entropy import (
    allocate_rows,
    row_workspace,
    run_rows,
    sum_of_class_weights,
)
from mtp_fast.ops.gemm import gemm, new_workspace, scaled_add

# Products take longer over other numbers of rows: oneDNN's of bfloat16 for d(hidden) 6 % over 2043
# than over 2048, MKL's three of float32 4 % in chunks of 1365 than of 1024 or 2048.
ROWS_MULTIPLE = 64
# The default budget for the logits of a chunk: on the CPU, and bounds on CUDA.
CPU_CHUNK_BYTES = MIN_CUDA_CHUNK_BYTES = 256 << 20
MAX_CUDA_CHUNK_BYTES = 2 << 30


def default_chunk_bytes(weight: Tensor) -> int:
    """Budget for logits of the dtype of `weight` (V, d), once gradients have their memory."""
    if not weight.is_cuda:
        return CPU_CHUNK_BYTES
    vocab, dim = weight.shape
    return cuda_chunk_bytes(vocab, dim, weight.itemsize, _unused_bytes(weight.device))


def cuda_chunk_bytes(vocab: int, dim: int, itemsize: int, unused: float) -> int:
    """Budget for logits on CUDA: as many rows as make the products efficient, if they fit.

    4096 rows: whatever its size, a chunk reads the weight twice and reads and writes d(weight), in
    16 bits 12 V d bytes. That is a seventh of the time of its 6 rows V d FLOPs at the peaks of an
    H100 (989 TFLOP/s, 3.35 TB/s). 2**22 / d rows if that is more: d(hidden), rows x d, then has a
    tile of 128 x 256 for each of 128 multiprocessors. At least 256 MiB, below which launches take
    longer than what they launch, and at most 2 GiB.

    Halved until it is at most a quarter of what is unused: half the rows cost a little time, too
    many end the run. By halves, so that on a full device the order of summation and the size that
    the allocator is asked for seldom change from step to step. Never below one row.

    Parameters
    ----------
    vocab, dim : int
        V and d.
    itemsize : int
        Bytes of a logit.
    unused : float
        Bytes of the device's memory; inf if unknown.
    """
    row = vocab * itemsize
    rows = max(4096, 2**22 // max(dim, 1))
    budget = min(max(rows * row, MIN_CUDA_CHUNK_BYTES), MAX_CUDA_CHUNK_BYTES)
    while budget > max(unused / 4, row):
        budget //= 2
    return max(budget, row)


def _unused_bytes(device: torch.device) -> float:
    """Memory that the driver or torch's allocator could give; inf where they must not be asked."""
    if torch.cuda.is_current_stream_capturing():
        return math.inf
    unused, _ = torch.cuda.mem_get_info(device)
    if torch.cuda.get_allocator_backend() != "pluggable":  # which keeps no statistics
        unused += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return unused


def new_buffer(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory on the device of `like`; large pages where that makes it cheaper."""
    buffer = like.new_empty(shape, dtype=dtype)
    if buffer.device.type == "cpu":
        _C.advise_huge_pages(buffer.data_ptr(), buffer.nbytes)
    return buffer


class Arguments(NamedTuple):
    """The arguments of the op, `_INPUTS`."""

    hidden: list[Tensor]
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    document_ids: Tensor | None
    class_weight: Tensor | None
    token_weight: Tensor | None
    head_weights: Tensor | None
    num_items: Tensor | None
    shift: int
    reduction: str
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
    compute_dtype: torch.dtype
    chunk_bytes: int | None

    @property
    def terms(self) -> RowTerms:
        return RowTerms(self.ignore_index, self.label_smoothing, self.z_loss, self.softcap)

    @property
    def stacked(self) -> bool:
        """Whether `hidden` is one (n, B, T, d)."""
        return self.hidden[0].dim() == 4

    @property
    def n(self) -> int:
        return len(self.hidden[0]) if self.stacked else len(self.hidden)

    def flat_heads(self) -> list[Tensor]:
        """n tensors (B * T, d)."""
        hidden = self.hidden[0].unbind() if self.stacked else self.hidden
        return [h.reshape(-1, h.shape[-1]) for h in hidden]

    def shifted(self, tensor: Tensor, head: int, fill: float) -> Tensor:
        """(B, T) aligned with labels -> (B * T,) aligned with the head's rows."""
        shift = self.shift + head
        if shift == 0:
            return tensor.reshape(-1)
        out = torch.full_like(tensor, fill)
        kept = max(tensor.shape[1] - shift, 0)
        out[:, :kept] = tensor[:, shift:]
        return out.view(-1)

    def targets(self, head: int) -> Tensor:
        """(B * T,), int64: what each row of the head is scored on, or ignore_index."""
        labels = self.labels.to(torch.int64)
        target = self.shifted(labels, head, self.ignore_index)
        if self.document_ids is None:
            return target
        ends = self.shifted(self.document_ids, head, -1)
        return torch.where(ends == self.document_ids.reshape(-1), target, self.ignore_index)

    def row_weights(self, head: int) -> Tensor | None:
        """(B * T,), float32: the weight of each row of the head."""
        if self.token_weight is None:
            return None
        return self.shifted(self.token_weight, head, 0.0)


class _Piece(NamedTuple):
    """Rows of one head that belong to one chunk."""

    head: int
    rows: slice | Tensor
    target: Tensor  # (r,)
    row_weight: Tensor | None  # (r,)


def _chunks(a: Arguments, counts: list[int], size: int) -> Iterator[list[_Piece]]:
    """Cut the rows that count, `counts[k]` of head k, into chunks of `size`, across heads."""
    chunk: list[_Piece] = []
    room = size
    for head, count in enumerate(counts):
        if count == 0:
            continue
        target, row_weight = a.targets(head), a.row_weights(head)
        dense = count == len(target)
        valid = None if dense else (target != a.ignore_index).nonzero()[:, 0]
        start = 0
        while start < count:
            stop = min(start + room, count)
            rows = slice(start, stop) if valid is None else valid[start:stop]
            weights = None if row_weight is None else row_weight[rows]
            chunk.append(_Piece(head, rows, target[rows], weights))
            room -= stop - start
            start = stop
            if room == 0:
                yield chunk
                chunk, room = [], size
    if chunk:
        yield chunk


def _chunk_rows(total: int, most: int) -> int:
    """Rows a chunk, at most `most`: few chunks of about one size, in multiples that GEMMs like."""
    if total == 0:
        return 0
    multiple = ROWS_MULTIPLE if most >= ROWS_MULTIPLE else 1
    most -= most % multiple
    chunks = -(-total // most)
    even = -(-total // chunks)
    return -(-even // multiple) * multiple


def _gather(chunk: list[_Piece], values: Tensor | list[Tensor]) -> Tensor:
    """Rows of the chunk, (r, ...), from values (n, B * T, ...); a view where that can be."""
    parts = [values[piece.head][piece.rows] for piece in chunk]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _scatter(chunk: list[_Piece], values: Tensor, out: Tensor) -> None:
    """Write values (r, ...) to the chunk's places in (n, B * T, ...)."""
    start = 0
    for piece in chunk:
        stop = start + len(piece.target)
        out[piece.head, piece.rows] = values[start:stop]
        start = stop


class _Gradients:
    """d(hidden), d(weight), d(bias): summed up chunk by chunk, empty where none is due."""

    def __init__(self, a: Arguments, needs_grad: list[bool]) -> None:
        self.weight = a.weight.to(a.compute_dtype)
        self.workspace = new_workspace(self.weight)  # of all products
        vocab, dim = a.weight.shape
        rows = (a.n, a.labels.numel(), dim)
        self.needs_grad = needs_grad
        of_hidden, of_weight, of_bias = needs_grad
        self.hidden = new_buffer(a.weight, rows if of_hidden else (0,), a.compute_dtype).zero_()
        self.linear = new_buffer(a.weight, (vocab, dim) if of_weight else (0,), torch.float32)
        self.bias = a.weight.new_zeros((vocab,) if of_bias else (0,), dtype=torch.float32)
        # The first product overwrites `linear`; it is zeroed only if none comes.
        self.started = False

    def add(self, chunk: list[_Piece], x: Tensor, d_logits: Tensor) -> None:
        """Take in the gradient (r, V) of the logits of a chunk with inputs x (r, d)."""
        of_hidden, of_weight, of_bias = self.needs_grad
        if of_hidden:
            first = chunk[0]
            if len(chunk) == 1 and isinstance(first.rows, slice):
                d_hidden = self.hidden[first.head, first.rows]
                gemm(d_logits, self.weight, d_hidden, workspace=self.workspace)
            else:
                d_x = torch.empty_like(x)
                gemm(d_logits, self.weight, d_x, workspace=self.workspace)
                _scatter(chunk, d_x, self.hidden)
        if of_weight:
            gemm(d_logits.t(), x, self.linear, accumulate=self.started, workspace=self.workspace)
            self.started = True
        if of_bias:
            self.bias += d_logits.sum(0, dtype=torch.float32)

    def finish(self, a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
        if not self.started:
            self.linear.zero_()
        hidden = self.hidden
        if self.needs_grad[0]:
            hidden = hidden.view(a.n, *a.labels.shape, hidden.shape[-1])
        return hidden, self.linear, self.bias


def sweep(
    a: Arguments,
    counts: list[int],
    needs_grad: list[bool],
    row_grad: Tensor | None,  # (n, B * T), float32: upstream gradients of the rows' losses
    outputs: tuple[Tensor | None, ...] = (),  # (n, B * T) each: loss, lse, correct
) -> tuple[Tensor, Tensor, Tensor]:
    """Go over the rows that count: logits, kernel, outputs, gradients (returned)."""
    gradients = _Gradients(a, needs_grad)
    weight, heads = gradients.weight, a.flat_heads()
    vocab = len(weight)
    # Asked now that the gradients have their memory, and at run time: a compiled graph is kept.
    chunk_bytes = default_chunk_bytes(weight) if a.chunk_bytes is None else a.chunk_bytes
    size = _chunk_rows(sum(counts), max(chunk_bytes // (vocab * weight.itemsize), 1))
    bias = None if a.bias is None else a.bias.to(a.compute_dtype)
    class_weight_sum = sum_of_class_weights(a.class_weight)
    buffer = new_buffer(weight, (size, vocab), weight.dtype)
    workspace = row_workspace(buffer)
    for chunk in _chunks(a, counts, size):
        x = _gather(chunk, heads).to(a.compute_dtype)
        target = torch.cat([piece.target for piece in chunk])
        if _common.on_cuda(x) and needs_grad[1]:
            # Ignored rows are among these; their gradient is 0, but 0 * NaN is NaN.
            x = x.masked_fill((target == a.ignore_index)[:, None], 0.0)
        logits = buffer[: len(x)]
        gemm(x, weight.t(), logits, bias=bias, workspace=gradients.workspace)
        row_weights = [piece.row_weight for piece in chunk if piece.row_weight is not None]
        results = allocate_rows(logits)
        run_rows(
            logits,
            target,
            a.terms,
            row_weight=torch.cat(row_weights) if row_weights else None,
            class_weight=a.class_weight,
            class_weight_sum=class_weight_sum,
            grad=logits if any(needs_grad) else None,
            grad_output=None if row_grad is None else _gather(chunk, row_grad).contiguous(),
            workspace=workspace,
            results=results,
        )
        for out, values in zip(outputs, results, strict=False):
            if out is not None:
                _scatter(chunk, values, out)
        gradients.add(chunk, x, logits)
    return gradients.finish(a)


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor (0-d) in `dtype`, multiplied in float32."""
    if gradient.is_cuda:  # one dimension, since a 0-d factor would be rounded to 16 bits first
        return torch.mul(gradient, factor.reshape(1)).to(dtype)
    out = new_buffer(gradient, gradient.shape, dtype)
    scaled_add(gradient, out, float(factor), accumulate=False)
    return out
