"""The compiled module (csrc/bindings.cpp): pointers, sizes and codes as integers."""

from collections.abc import Callable, Sequence
from typing import Any

def cross_entropy(
    threads: int,
    dtype: int,
    logits: int,
    ld: int,
    grad: int,
    grad_ld: int,
    rows: int,
    vocab: int,
    target: int,
    row_weight: int,
    class_weight: int,
    class_weight_sum: int,
    grad_output: int,
    saved: int,
    workspace: int,
    loss: int,
    lse: int,
    correct: int,
    argmax: int,
    stats: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> None: ...
def scaled_add(
    threads: int, x_dtype: int, x: int, y_dtype: int, y: int, n: int, alpha: float, accumulate: bool
) -> None: ...
def few_row_linear(
    threads: int,
    dtype: int,
    x: int,
    weight: int,
    weight_ld: int,
    y: int,
    rows: int,
    in_: int,
    out: int,
) -> None: ...
def gemm_amx(*arguments: int) -> None: ...
def has_amx() -> bool: ...
def decode_sizes(
    dtype: int,
    dim: int,
    ffn_dim: int,
    n_queries: int,
    n_keys: int,
    head_dim: int,
    capacity: int,
) -> tuple[int, int, int]: ...
def decode_pack(*arguments: int) -> None: ...

class Workspace: ...

class Call:
    def __call__(self) -> tuple[str, int]: ...

# Each of them a Call.
def in_sequence(calls: Sequence[Callable[[], tuple[str, int] | None]]) -> Call: ...
def bind_decode_layers(*arguments: Any) -> Call: ...
def bind_decode_heads(*arguments: Any) -> Call: ...
def bind_speculative_accept(*arguments: Any) -> Call: ...
def bind_sample(*arguments: Any) -> Call: ...
def bind_commit(*arguments: int) -> Call: ...
def philox4x32_10(counter: list[int], key0: int, key1: int) -> list[int]: ...
def uniform_of(word: int) -> float: ...
def advise_huge_pages(address: int, bytes: int) -> None: ...
def simd_function(tanh_instead: bool, x: int, y: int, n: int) -> None: ...
def build_info() -> dict[str, Any]: ...
def set_simd_level(level: int) -> None: ...
