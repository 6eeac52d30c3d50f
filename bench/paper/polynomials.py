"""Random expressions over the ring F7[X]/(X^degree), and their values, as tokens.

An element is the tuple of its coefficients, the constant first. Operations are negation, addition,
multiplication and composition, written before their operands, each operand coefficient by
coefficient: "+ 3 1 - 0 5 = 3 3" says (3 + X) + -(5 X) = 3 + 3 X, at degree 2.
"""

from __future__ import annotations

import random

PRIME = 7
SEPARATOR, EQUALS, PAUSE = 0, 1, 2
FIRST_DIGIT = 3
OPERATIONS = "-+*o"  # negation, addition, multiplication, composition
FIRST_OPERATION = FIRST_DIGIT + PRIME
VOCAB_SIZE = FIRST_OPERATION + len(OPERATIONS)

Element = tuple[int, ...]


def negate(a: Element) -> Element:
    return tuple(-x % PRIME for x in a)


def add(a: Element, b: Element) -> Element:
    return tuple((x + y) % PRIME for x, y in zip(a, b, strict=True))


def multiply(a: Element, b: Element) -> Element:
    degree = len(a)
    return tuple(sum(a[i] * b[k - i] for i in range(k + 1)) % PRIME for k in range(degree))


def compose(a: Element, b: Element) -> Element:
    """Put `b` for X in the polynomial of degree below len(a) that stands for `a`."""
    value = (0,) * len(a)
    for coefficient in reversed(a):  # Horner
        value = multiply(value, b)
        value = ((value[0] + coefficient) % PRIME, *value[1:])
    return value


BINARY = {"+": add, "*": multiply, "o": compose}


def expression(operations: int, degree: int, rng: random.Random) -> tuple[list[int], Element]:
    """Draw an expression; operators, coefficients and sizes of operands are uniform.

    Parameters
    ----------
    operations : int
        How many it has.
    degree : int
        The ring's: elements have so many coefficients.
    rng : random.Random
        Source of randomness.

    Returns
    -------
    (list of int, tuple of int)
        Its tokens, and its value.
    """
    if operations == 0:
        value = tuple(rng.randrange(PRIME) for _ in range(degree))
        return [FIRST_DIGIT + x for x in value], value
    symbol = rng.choice(OPERATIONS)
    token = FIRST_OPERATION + OPERATIONS.index(symbol)
    if symbol == "-":
        tokens, value = expression(operations - 1, degree, rng)
        return [token, *tokens], negate(value)
    on_the_left = rng.randrange(operations)
    left, a = expression(on_the_left, degree, rng)
    right, b = expression(operations - 1 - on_the_left, degree, rng)
    return [token, *left, *right], BINARY[symbol](a, b)


def problem(
    operations: int, degree: int, pauses: int, rng: random.Random
) -> tuple[list[int], list[int]]:
    """Draw a problem: its tokens up to the answer, `pauses` pause tokens last, and the answer's."""
    tokens, value = expression(operations, degree, rng)
    return [*tokens, EQUALS, *[PAUSE] * pauses], [FIRST_DIGIT + x for x in value]
