"""The generator of cases: every pair is there, in few cases, the same each time."""

from __future__ import annotations

import itertools

from tests.gpu_paths.pairwise import cover, pairs, product

AXES = {"a": [0, 1, 2, 3], "b": ["x", "y", "z"], "c": [False, True], "d": [False, True], "e": [None, 1]}


def test_every_pair_is_covered_by_few_cases() -> None:
    found = cover(AXES)
    assert set().union(*map(pairs, found)) == set().union(*map(pairs, product(AXES)))
    assert 12 <= len(found) <= 16  # 4 values times 3 are the fewest, of 96 in all
    assert found == cover(AXES)
    assert all(list(case) == list(AXES) for case in found)


def test_the_product_is_whole() -> None:
    assert len(product(AXES)) == 96 == len({tuple(case.values()) for case in product(AXES)})
    assert all(case[axis] in AXES[axis] for case, axis in itertools.product(product(AXES), AXES))


def test_what_is_not_allowed_is_left_out() -> None:
    def allowed(case: dict[str, object]) -> bool:
        return case.get("a") != 3 or case.get("b") != "z"

    found, every = cover(AXES, allowed), product(AXES, allowed)
    assert len(every) == 88 and all(map(allowed, found))
    assert set().union(*map(pairs, found)) == set().union(*map(pairs, every))
