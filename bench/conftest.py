"""How `pytest bench/ --benchmark-only` measures: the competitors of a group in turn.

pytest-benchmark alone times one test after another, so that a disturbance of the machine meets
one competitor and not the next. Here the first test of a group runs all of its competitors,
interleaved, and every test hands its own times to pytest-benchmark, whose timer replays them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from harness import Comparison, keep_freed_memory, machine, timings

# Seconds a group is measured for, and its fewest and most rounds.
FULL, QUICK = (5.0, 5, 200), (1.0, 3, 50)
_clock = [0.0]


def replayed() -> float:
    """The timer: seconds of replayed runs."""
    return _clock[0]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small shapes, few rounds")


def pytest_sessionstart() -> None:
    keep_freed_memory()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=replayed))


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """The date stays out: it would make every saved run another machine's."""
    machine_info["mtp_fast"] = {k: v for k, v in machine().items() if k != "date"}


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--quick"))


@pytest.fixture(scope="session")
def measured() -> dict[str, tuple[Comparison, dict[str, list[float]]] | None]:
    """Comparisons and times of the groups that have run, without the competitors themselves."""
    return {}


@pytest.fixture
def compare(benchmark: Any, quick: bool, measured: dict[Any, Any]) -> Callable[..., None]:
    """Report one competitor of a comparison that is made, and measured, once for its group.

    The fixture is report(group, competitor, build, memory=None, **about): `build` makes the
    comparison, `memory` gives a competitor's peak in MiB, `about` is saved beside the times.
    """

    def report(
        group: str,
        competitor: str,
        build: Callable[[], Comparison],
        memory: Callable[[str], float] | None = None,
        **about: Any,
    ) -> None:
        if group not in measured:
            measured[group] = None  # until it has succeeded
            comparison = build()
            measured[group] = comparison._replace(runs={}), _times(comparison, quick)
        if measured[group] is None:
            pytest.skip("its group has failed")
        comparison, seconds = measured[group]
        if competitor not in seconds:
            pytest.skip(comparison.left_out.get(competitor, "not installed, or has no such case"))
        benchmark.group, benchmark.name = group, competitor
        benchmark.extra_info.update(
            about,
            bound_factor=comparison.bounds.get(competitor),
            left_out=comparison.left_out,
            peak_mib=memory(competitor) if memory is not None else None,
        )
        times = iter(seconds[competitor])

        def replay() -> None:
            _clock[0] += next(times, 0.0)

        benchmark.pedantic(replay, rounds=len(seconds[competitor]))

    return report


def _times(comparison: Comparison, quick: bool) -> dict[str, list[float]]:
    seconds, fewest, most = QUICK if quick else FULL
    start = time.perf_counter()
    timings(comparison.runs, 1, warmup=0)
    one = time.perf_counter() - start
    return timings(comparison.runs, min(max(int(seconds / one), fewest), most), warmup=0)
