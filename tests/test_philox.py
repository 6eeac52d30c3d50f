"""Philox 4x32-10 against the known answers of Random123, in the kernel and in the reference."""

import pytest
import torch

from mtp_fast import _C
from mtp_fast.ops import reference

# counter, key, result: kat_vectors of Random123.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    assert _C.philox4x32_10(words(counter), *words(key)) == words(expected)
    tensors = [[torch.tensor(word) for word in words(text)] for text in (counter, key)]
    assert [int(word) for word in reference.philox4x32_10(*tensors)] == words(expected)


def test_uniforms_exclude_both_ends() -> None:
    low, high = _C.uniform_of(0), _C.uniform_of(2**32 - 1)
    assert (low, high) == (2.0**-25, 1.0 - 2.0**-25)


def test_reference_agrees_with_the_kernel_on_wide_keys_and_counters() -> None:
    generator = torch.Generator().manual_seed(0)
    seed, position = torch.randint(-(2**63), 2**63 - 1, (2, 100), generator=generator)
    u = reference.uniform(seed, position, torch.full_like(seed, 7), 3)
    for i in range(100):
        key, at = int(seed[i]) % 2**64, int(position[i]) % 2**64
        counter = [at % 2**32, at >> 32, 7, 3]
        word = _C.philox4x32_10(counter, key % 2**32, key >> 32)[0]
        assert u[i].item() == _C.uniform_of(word)
