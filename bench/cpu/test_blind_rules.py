"""How often each task is answered right without the image: about 2,000 questions of each of the nineteen tasks."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from blind import EXCEPTIONS, battery, excess, gather, table
from fastvst.scenes.rooms.render import open_renderer


@pytest.mark.full
@pytest.mark.needs(("moderngl", "embreex"))
def test_blind_rules(record: Callable[..., None]) -> None:
    results = battery(gather(open_renderer(), range(250)))
    print("\n" + table(results))
    for result in results:
        shares = {f"{rule}_percent": 100 * share for rule, share in result.rules.items()}
        record(result.task, questions=result.count, majority_percent=100 * result.majority, **shares)
    named = {(r.task, rule) for r in results for rule in excess(r)}
    assert named <= set(EXCEPTIONS), named - set(EXCEPTIONS)
