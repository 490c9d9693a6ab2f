"""RL steps on completions of an HTTP server with OpenAI's API, which samples from its own copy of the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastvst.config import ConfigError
from fastvst.rl.servers import served_model
from fastvst.rollout import RolloutError
from fastvst.rollout.openai_client import ServerConfig
from rl_run import load_rl, rl_arguments, write_parts
from vllm_server import Server

rl = load_rl()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return write_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def server(parts: tuple[Path, Path, Path]) -> Iterator[Server]:
    made = Server(parts[1]).start()
    yield made
    made.stop()


def run(server: Server, parts: tuple[Path, Path, Path], out: Path, *more: str) -> list[dict[str, Any]]:
    rl.main(rl_arguments(out, *parts, f"sampling.base_url={server.url}", "update.importance=token", *more))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_step_on_the_completions_of_a_server(server: Server, parts: tuple[Path, Path, Path], tmp_path: Path) -> None:
    first, second = run(server, parts, tmp_path / "run", "steps=2")
    sent = [p["type"] for b in server.bodies for m in b["messages"] for p in m["content"]]
    assert "image_url" in sent and {b["model"] for b in server.bodies} == {"mine"} and server.bodies[0]["n"] == 4
    assert len(server.bodies[0]["logit_bias"]) == 2
    # At step 0 the server has the trainer's weights, so images and template give equal log-probabilities.
    assert first["sampler_gap_max"] < 1e-4 and first["grad_norm"] > 0 and first["answer_tokens"] > 0
    assert second["sampler_gap_max"] > 1e-3, "the server still has the old weights"
    groups = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert len(groups[0]["answers"]) == 4 and any(a["text"] for g in groups for a in g["answers"])


def test_importance_weights_use_the_servers_log_probabilities(
    server: Server, parts: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    plain = run(server, parts, tmp_path / "plain", "steps=1", "optimizer.clip=1e9")
    server.shift = 0.5  # the server reports exp(0.5) times the probability: every weight is exp(-0.5)
    (shifted,) = run(server, parts, tmp_path / "shifted", "steps=1", "optimizer.clip=1e9")
    ratio = shifted["grad_norm"] / plain[0]["grad_norm"]
    assert abs(ratio - 0.60653) < 1e-3 and abs(shifted["sampler_gap"] - 0.5) < 1e-3


def test_the_served_model_is_the_first_in_the_servers_list(server: Server) -> None:
    assert served_model(ServerConfig(server.url)) == served_model(ServerConfig(server.url + "/")) == "mine"
    for wrong in (server.url.removesuffix("/v1"), "http://127.0.0.1:9/v1"):
        with pytest.raises(RolloutError, match=r"/models does not list a model .*sampling.base_url"):
            served_model(ServerConfig(wrong))


def test_another_prompt_ends_the_run_and_names_both_lengths(
    server: Server, parts: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    server.extra = [11]
    with pytest.raises(RolloutError, match=r"small/.* has \d+ tokens on http.* and \d+ in the trainer"):
        run(server, parts, tmp_path / "run", "steps=1")


def test_top_p_is_refused_with_a_server(server: Server, parts: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Its log-probabilities are those of the kept tokens: the importance ratio of an unchanged policy is below 1."""
    with pytest.raises(ConfigError, match=r"sampling\.top_p 0\.7.*would not be 1"):
        run(server, parts, tmp_path / "run", "steps=1", "sampling.top_p=0.7")


def test_a_refused_request_ends_the_run_and_names_the_prompt(
    server: Server, parts: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    server.status = 404
    with pytest.raises(RolloutError, match="small/.*chat/completions answers 404: .*no such model"):
        run(server, parts, tmp_path / "run", "steps=1")
