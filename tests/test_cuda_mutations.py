"""The kernel tests notice faults: each of these single-token changes must make one of them fail."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import emulator

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not emulator.AVAILABLE, reason="needs the sources and x86-64"),
]


class Mutation(NamedTuple):
    file: str
    correct: str
    planted: str


ACCEPTANCE = "acceptance/cuda.cu"
ROW = "acceptance/cuda_row.cuh"
FILTERS = "acceptance/cuda_filters.cuh"
LANE = "cuda/lane.cuh"
TEAM = "cuda/team.cuh"
CROSS_ENTROPY = "cross_entropy/cuda.cu"
FORMULAS = "cross_entropy/math.h"
REDUCE = "cuda/reduce.cuh"
ARCH = "cuda/arch.cuh"
MUTATIONS = [
    # Where a slice is.
    Mutation(
        CROSS_ENTROPY, "head = misaligned == 0 ? 0 : kPack<T>", "head = misaligned == 0 ? 0 : 1"
    ),
    Mutation(CROSS_ENTROPY, "(vocab - head) / kPack<T>", "vocab / kPack<T>"),
    Mutation(CROSS_ENTROPY, "(vectors + size - 1)", "(vectors + size - 2)"),
    Mutation(CROSS_ENTROPY, "begin = rank * share", "begin = rank + share"),
    Mutation(CROSS_ENTROPY, "count > keep ? count - keep : 0", "count > keep ? keep : 0"),
    Mutation(CROSS_ENTROPY, "rank == 0 && thread < head", "rank == 0 && thread <= head"),
    Mutation(CROSS_ENTROPY, "const int in_tail = thread - head", "const int in_tail = thread"),
    Mutation(CROSS_ENTROPY, "in_tail < vocab - tail_begin", "in_tail < vocab - tail_begin - 1"),
    Mutation(CROSS_ENTROPY, "head + (begin + i) * kPack<T>", "head + i * kPack<T>"),
    # Loops over it.
    Mutation(CROSS_ENTROPY, "first += kBatch * stride", "first += stride"),
    Mutation(CROSS_ENTROPY, "if (i < count) f(", "if (i <= count) f("),
    Mutation(CROSS_ENTROPY, "kept[i] = vector", "kept[0] = vector"),
    Mutation(CROSS_ENTROPY, "element(slice.streamed + i), kept[i]", "element(i), kept[i]"),
    # Reductions.
    Mutation(CROSS_ENTROPY, "a.argmax < b.argmax ?", "a.argmax > b.argmax ?"),
    Mutation(CROSS_ENTROPY, "b.sum * fast_exp(b.max - max)", "b.sum * fast_exp(a.max - max)"),
    Mutation(CROSS_ENTROPY, "if (top > partial.max)", "if (top >= partial.max)"),
    Mutation(CROSS_ENTROPY, "for (int j = N - 1; j >= 0; --j)", "for (int j = N - 1; j > 0; --j)"),
    Mutation(REDUCE, "distance = kWarp / 2", "distance = kWarp / 4"),
    Mutation(REDUCE, "lane < warps ?", "lane < warps - 1 ?"),
    Mutation(REDUCE, "&scratch.of_block[cluster.rank]", "&scratch.of_block[0]"),
    Mutation(REDUCE, "block < cluster.size; ++block", "block < cluster.size - 1; ++block"),
    # Formulas and storage.
    Mutation(CROSS_ENTROPY, "c.on_probability / stats.sum", "c.on_probability * stats.sum"),
    Mutation(
        CROSS_ENTROPY,
        "static_cast<unsigned>(row.target - first)",
        "static_cast<unsigned>(row.target)",
    ),
    Mutation(CROSS_ENTROPY, "constant = -c.on_class", "constant = c.on_class"),
    Mutation(CROSS_ENTROPY, "% 16 == 0;", "% 16 != 0;"),
    # The gradient from saved statistics.
    Mutation(CROSS_ENTROPY, "p.saved[r]);", "p.saved[0]);"),
    Mutation(CROSS_ENTROPY, "blockIdx.x) / parts", "blockIdx.x) % parts"),
    Mutation(CROSS_ENTROPY, "static_cast<int>(blockIdx.x) % parts", "0"),
    Mutation(CROSS_ENTROPY, "row.vocab, 0, part, parts", "row.vocab, 0, part, parts + 1"),
    Mutation(
        CROSS_ENTROPY, "clear_slice(row.grad, row.vocab, part", "clear_slice(row.grad, row.vocab, 0"
    ),
    Mutation(CROSS_ENTROPY, "row.target < 0 ? NAN", "row.target < 0 ? 0.0f"),
    Mutation(CROSS_ENTROPY, "argmax == INT_MAX ? -1", "argmax == INT_MAX ? 0"),
    Mutation(FORMULAS, "if (std::isnan(row.target_logit)) row_weight", "if (false) row_weight"),
    Mutation(ARCH, "static_cast<uint16_t>(word)}", "static_cast<uint16_t>(word >> 16)}"),
    # The acceptance step: where a tile is, and who takes it.
    Mutation(ROW, "misaligned == 0 ? 0 : kPack<T>", "misaligned == 0 ? 0 : 1"),
    Mutation(ROW, "(lane < body - begin)", "(lane < body - begin - 1)"),
    Mutation(ROW, "(lane < end - tail)", "(lane < end - tail - 1)"),
    Mutation(ROW, "first += kBatch * kWarp", "first += 2 * kBatch * kWarp"),
    Mutation(ROW, "team.rank() * warps", "team.rank() + warps"),
    Mutation(TEAM, "lane < size())", "lane < size() - 1)"),
    Mutation(TEAM, "block * shared_bytes_", "shared_bytes_"),
    Mutation(TEAM, "image(words + i, rank())", "image(words + i, 0)"),
    Mutation(TEAM, "array && i < count;", "array && i < count - 1;"),
    Mutation(TEAM, "turn_ ^= 1;", ""),
    # Its searches.
    Mutation(
        ROW,
        "distance < kWarp; distance *= 2) {\n    const double",
        "distance < 16; distance *= 2) {\n    const double",
    ),
    Mutation(ROW, "if (lane == 0) before = 0.0;", ""),
    Mutation(ROW, "&& running <= target", "&& running < target - 1e-3"),
    Mutation(ROW, "target - tile.before", "target"),
    Mutation(ROW, "tile < first) first = tile", "tile > first) first = tile"),
    Mutation(ROW, "z == max && id < best", "z == max"),
    Mutation(ROW, "id <= last_tie", "id < last_tie"),
    Mutation(ROW, "weight(scratch.max[tile], max))", "1.0f)"),
    Mutation(FILTERS, "block < tiles.team.size()", "block < 1"),
    Mutation(FILTERS, "if (key > range.high) return;", ""),
    Mutation(FILTERS, "before + of_bin(bin) >= target", "before + of_bin(bin) > target"),
    Mutation(FILTERS, "if (rank == k) kth", "if (rank < k) kth"),
    Mutation(FILTERS, "static_cast<double>(n) - 0.5", "static_cast<double>(n) + 0.5"),
    Mutation(ACCEPTANCE, "id == draft ? 0.0f : p", "p"),
    Mutation(ACCEPTANCE, "Lane(q) * Lane(on_q)", "Lane(q) * Lane(on_p)"),
    Mutation(LANE, "static_cast<int>(n.v) + 127", "static_cast<int>(n.v) / 2 + 127"),
    # Its barriers, each line of them.
    Mutation(TEAM, "if (!is_grid()) sync();\n", "\n"),
    Mutation(TEAM, "f();\n    sync();", "f();"),
    Mutation(TEAM, "__syncthreads();\n    // The images", "// The images"),
    Mutation(TEAM, "__syncthreads();\n    const auto* words", "const auto* words"),
    Mutation(FILTERS, "__syncthreads();", ""),
    Mutation(FILTERS, "tiles.team.sync();\n", "\n"),
    Mutation(FILTERS, "tiles.team.sync();  //", "//"),
]


@pytest.fixture(scope="module")
def sources() -> Path:
    """A copy of csrc/ that the mutants share, so that each build compiles what it changed."""
    copy = emulator.ROOT / "build" / "emulator" / "mutated-csrc"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(emulator.ROOT / "csrc", copy)
    emulator.build("mutated", csrc=copy)
    return copy


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.planted or f"no {m.correct}")
def test_planted_fault_is_noticed(sources, mutation):
    path = sources / mutation.file
    original = path.read_text()
    assert original.count(mutation.correct) == 1, "the list does not fit the sources any more"
    path.write_text(original.replace(mutation.correct, mutation.planted))
    try:
        library = emulator.build("mutated", csrc=sources)
    finally:
        path.write_text(original)
    # In a process of its own, with a limit to its CPU time: a mutant may write anywhere, or never
    # end. Without a fault the tests take half a minute.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-m", "not cuda", "-k", "emulated or too_long"]
    acceptance = mutation.file in (ACCEPTANCE, ROW, FILTERS, LANE, TEAM)
    command += [f"tests/test_cuda_{'acceptance' if acceptance else 'cross_entropy'}.py"]
    environment = {**os.environ, "MTP_EMULATOR_LIBRARY": str(library)}
    done = subprocess.run(
        command,
        cwd=emulator.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (120, 120)),
    )
    assert done.returncode not in (0, 2, 3, 4, 5), done.stdout[-2000:]
