"""The ops on a GPU: against a measured copy and GEMM ceiling, eager PyTorch and the peers.

The row kernels move 2 s V bytes a row (one read and one write of V logits of s bytes), s V without
a gradient; their ceiling is a device copy. The linear loss makes 6 N d V FLOPs; its ceiling is the
three GEMMs alone. The acceptance step reads each judged row once from memory; its ceiling is
torch's maximum of the same bytes, and it is timed as a replayed CUDA graph too. Writes JSON to the
path in the first argument.
"""

import functools
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import bench_acceptance
import mtp_fast
from mtp_fast.ops import reference
from mtp_fast.ops._loss_arguments import RowTerms
from mtp_fast.ops.cross_entropy import allocate_rows, allocate_stats, run_rows


def milliseconds(run: Callable[[], Any], repeats: int = 15) -> float:
    """Median time of `run` on the device, after two runs that warm it up."""
    times = []
    for repeat in range(2 + repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if repeat >= 2:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def row_kernel(rows: int, vocab: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    logits = torch.randn(rows, vocab, device="cuda", dtype=dtype)
    target = torch.randint(vocab, (rows,), device="cuda")
    outputs, stats = allocate_rows(logits), allocate_stats(logits)
    call = functools.partial(
        run_rows,
        logits,
        target,
        RowTerms(ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=0.0),
        row_weight=None,
        class_weight=None,
        class_weight_sum=None,
    )
    copy = torch.empty_like(logits)
    size = logits.nbytes
    runs = {
        "copy": (2 * size, lambda: copy.copy_(logits)),
        "ours, statistics": (size, lambda: call(results=outputs, stats=stats)),
        "ours, gradient from them": (2 * size, lambda: call(grad=logits, saved=stats)),
        "ours, both at once": (2 * size, lambda: call(grad=logits, results=outputs)),
    }
    results = []
    for name, (moved, run) in runs.items():
        ms = milliseconds(run)
        results.append(
            {
                "bench": f"row kernel {rows} x {vocab} {dtype}",
                "name": name,
                "ms": ms,
                "GB/s": moved / ms / 1e6,
            }
        )
    return results


def linear_loss(
    rows: int, dim: int, vocab: int, dtype: torch.dtype, *, peers: bool = True
) -> list[dict[str, Any]]:
    """Ours with its default chunk and with others, by which `cuda_chunk_bytes` is to be tuned."""
    x = torch.randn(rows, dim, device="cuda", dtype=dtype, requires_grad=True)
    weight = (torch.randn(vocab, dim, device="cuda") * 0.02).to(dtype).requires_grad_()
    target = torch.randint(vocab, (rows,), device="cuda")
    chunk = torch.empty(rows // 8, vocab, device="cuda", dtype=dtype)

    def floor() -> None:
        with torch.no_grad():
            for part in x.split(rows // 8):
                torch.mm(part, weight.t(), out=chunk)
                torch.mm(chunk, weight)
                torch.mm(chunk.t(), part)

    def step(loss: Callable[..., torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            x.grad = weight.grad = None
            loss(x, weight, target).backward()

        return run

    runs = {"three GEMMs alone": floor, "ours": step(mtp_fast.linear_cross_entropy)}
    for n in (r for r in (512, 1024, 2048, 4096, 8192, 16384) if r <= rows):
        options = {"chunk_bytes": n * vocab * dtype.itemsize}
        runs[f"ours, {n} rows"] = step(functools.partial(mtp_fast.linear_cross_entropy, **options))
    if peers:
        runs["eager"] = step(reference.linear_cross_entropy)
        runs["torch.compile"] = step(torch.compile(reference.linear_cross_entropy))
    if peers and hasattr(F, "linear_cross_entropy"):
        runs["F.linear_cross_entropy"] = step(F.linear_cross_entropy)
    if peers and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        runs["liger"] = step(lambda x, w, t: liger(w, x, t))
    if peers and importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        runs["cut-cross-entropy"] = step(linear_cross_entropy)
    results = []
    for name, run in runs.items():
        entry: dict[str, Any] = {"bench": f"linear loss {rows} x {dim} x {vocab} {dtype}"}
        entry["name"] = name
        try:
            torch.cuda.reset_peak_memory_stats()
            entry["ms"] = milliseconds(run, repeats=7)
            entry["TFLOP/s"] = 6 * rows * dim * vocab / entry["ms"] / 1e9
            entry["peak MiB"] = torch.cuda.max_memory_allocated() / 2**20
        except Exception as error:  # a peer that fails must not end the bench
            if name.startswith("ours"):
                raise
            entry["error"] = repr(error)[:200]
        results.append(entry)
    return results


def acceptance(batch: int, case: str) -> list[dict[str, Any]]:
    """One step over B x 4 rows of 128256 logits, all of them judged."""
    problem = bench_acceptance.Problem((batch, 3, 128_256), "cuda")
    runs = bench_acceptance.comparison(problem, case).runs
    runs.pop("transformers", None)  # waits for the device: its time would be the host's
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = runs["ours"]()
    expected = runs["ours"]()
    captured.zero_()
    graph.replay()
    if not torch.equal(captured, expected):
        raise RuntimeError("the replayed graph gives other tokens")
    runs["ours, graph"] = graph.replay
    if importlib.util.find_spec("flashinfer") and case == "sampled, draft logits":
        from flashinfer.sampling import chain_speculative_sampling

        # It takes probabilities, so the softmax belongs to its time.
        runs["flashinfer"] = lambda: chain_speculative_sampling(
            problem.draft.float().softmax(-1),
            problem.drafts.int(),
            problem.target.float().softmax(-1),
        )
    moved = problem.target.nbytes
    if bench_acceptance.CASES[case][1]:
        moved += problem.draft.nbytes
    results = []
    for name, run in runs.items():
        entry: dict[str, Any] = {"bench": f"acceptance B={batch}, {case}", "name": name}
        try:
            entry["ms"] = milliseconds(run)
            entry["GB/s"] = moved / entry["ms"] / 1e6
        except Exception as error:  # a peer that fails must not end the bench
            if name.startswith("ours"):
                raise
            entry["error"] = repr(error)[:200]
        results.append(entry)
    return results


def main() -> None:
    results = []
    for batch in (1, 32, 128):
        for case in bench_acceptance.CASES:
            results += acceptance(batch, case)
    for vocab in (32_000, 50_257, 128_256):
        results += row_kernel(8192, vocab, torch.bfloat16)
    results += row_kernel(4096, 50_257, torch.float32)
    results += linear_loss(8192, 4096, 128_256, torch.bfloat16)
    for dim, vocab in ((4096, 128_256), (2048, 32_000), (576, 49_152)):
        results += linear_loss(32_768, dim, vocab, torch.bfloat16, peers=False)
    for entry in results:
        numbers = (f"{k} {v:.4g}" for k, v in entry.items() if isinstance(v, float))
        print(f"{entry['bench']:52} {entry['name']:24}", *numbers, entry.get("error", ""))
    device = torch.cuda.get_device_name()
    report = {"device": device, "torch": torch.__version__, "build": mtp_fast.build_info()}
    with open(sys.argv[1], "w") as file:
        json.dump({**report, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
