"""The text normalisation of VQA's evaluation server."""

from __future__ import annotations

from fastvst.rl.rewards.vqa import normalise


def test_the_evaluation_servers_normalisation() -> None:
    assert normalise("The  Two,  dogs.") == "2 dogs"
    assert normalise("1,000") == "1000"
    assert normalise("3.5 m") == "3.5 m"
    assert normalise("left/right") == "left right"
