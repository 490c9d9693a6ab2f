"""RL on several servers that follow the trainer, fail, hang, forget, and want a key."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvst.config import ConfigError, load_config
from fastvst.model import Qwen25VL
from fastvst.rl.rollouts import SamplingConfig
from fastvst.rl.servers import NcclFollower, ServersLost, check_temperature
from fastvst.rollout.http_call import check_url, read_key
from fastvst.rollout.openai_client import ServerConfig, ServerError
from fastvst.rollout.weight_sync import PublishedWeights, WeightRoutes, send_directory
from fastvst.train.distributed import ParallelConfig, World
from fastvst.train.distributed import start as start_world
from ranks import run_ranks
from rl_run import load_rl, rl_arguments, run_rl, write_parts
from small_run import rows_of
from vllm_server import Server

rl = load_rl()
Make = Callable[[], Server]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return write_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def make(parts: tuple[Path, Path, Path]) -> Iterator[Make]:
    made = []

    def one() -> Server:
        made.append(Server(parts[1]).start())
        return made[-1]

    yield one
    for server in made:
        server.stop()


def arguments(servers: list[Server], parts: tuple[Path, Path, Path], out: Path, *more: str) -> list[str]:
    urls = ",".join(server.url for server in servers)
    return rl_arguments(out, *parts, f"sampling.base_url={urls}", "sampling.follow=directory", *more)


def groups_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]


def test_servers_share_the_prompts_and_follow(make: Make, parts: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """No importance weights, and the log-probabilities of step 3 are still those of the trainer."""
    servers = [make(), make()]
    out = tmp_path / "run"
    rl.main(arguments(servers, parts, out, "steps=3", "evaluation.every=1", f"evaluation.path={parts[0]}"))
    rows = rows_of(out)
    assert len(rows) == 3 and max(row["sampler_gap_max"] for row in rows) < 1e-4
    assert all(row["servers"] == 2 and row["sync_seconds"] > 0 for row in rows)
    assert min(len(server.bodies) for server in servers) >= 0.3 * max(len(server.bodies) for server in servers)
    order = [route for route, _ in servers[0].routes]
    caches = ["/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"]
    update = ["/start_weight_update", "/update_weights", "/finish_weight_update"]
    assert order == ["/pause?mode=wait", *update, *caches, "/resume"] * 4, (
        "a phase for each step and the last evaluation"
    )
    groups = groups_of(out)
    versions = {group["step"]: group["weights"] for group in groups}
    assert len(set(versions.values())) == 3 and all(v.startswith("fastvst-") for v in versions.values())
    assert {group["server"] for group in groups} == {server.url for server in servers}
    held_out = [json.loads(line)["reward"] for line in (out / "evaluation.jsonl").read_text().splitlines()]
    assert len(held_out) == 4 and len(set(held_out)) > 1, "asked of the new weights"
    assert list((out / "weights").iterdir()) == [], "a directory is gone when the servers have it"


def test_without_following_the_trainers_own_engine_is_judged(
    make: Make, parts: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    server = make()
    more = ["steps=2", "sampling.follow=none", "update.importance=token", "evaluation.every=1"]
    rl.main(arguments([server], parts, tmp_path / "run", *more, f"evaluation.path={parts[0]}"))
    groups = groups_of(tmp_path / "run")
    assert len(server.bodies) == len(groups), "held-out prompts went to the engine"
    assert {(g["server"], g["weights"]) for g in groups} == {(server.url, None)} and server.routes == []
    rows = (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()
    assert len({json.loads(line)["reward"] for line in rows}) > 1


@pytest.mark.parametrize("fault", ["breaks", "forgets", "is not there"])
def test_a_server_that_fails_is_left_out(
    make: Make,
    parts: tuple[Path, Path, Path],
    tmp_path: Path,
    fault: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = make()
    bad = make()
    reason = {"breaks": "answers 400", "forgets": "has the weights 'default'; expected 'fastvst-"}
    if fault == "breaks":
        bad.breaks_after = 1
    elif fault == "is not there":
        bad.stop()
    else:
        bad.forgets = True
    rl.main(arguments([bad, good], parts, tmp_path / "run", "steps=2"))
    said = capsys.readouterr().out
    assert f"server {bad.url} is left out: " in said and reason.get(fault, "") in said
    groups = groups_of(tmp_path / "run")
    assert max(row["sampler_gap_max"] for row in rows_of(tmp_path / "run")) < 1e-4
    assert sum(group["server"] == good.url for group in groups) >= len(groups) - 1
    asked = [
        p["text"] for b in [*good.bodies, *bad.bodies] for p in b["messages"][-1]["content"] if p["type"] == "text"
    ]
    assert {group["question"] for group in groups} <= set(asked)


def test_without_any_server_the_run_ends_with_a_checkpoint(
    make: Make, parts: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    servers = [make(), make()]
    command = arguments(servers, parts, tmp_path / "run", "steps=4", "checkpoint.every=0")
    servers[0].breaks_after = servers[1].breaks_after = 3
    with pytest.raises(ServersLost, match=f"{servers[0].url}: .*answers 400.*{servers[1].url}: .*answers 400"):
        rl.main(command)
    done = len(rows_of(tmp_path / "run"))
    assert 1 <= done < 4 and f"after step {done}; continue with --resume auto" in capsys.readouterr().out
    servers[0].breaks_after = servers[1].breaks_after = None
    rl.main([*command, "resume=auto"])
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and max(row["sampler_gap_max"] for row in rows) < 1e-4


def lose_the_servers(environment: dict[str, str], command: list[str]) -> str:
    try:
        run_rl(environment, command)
    except ServersLost as error:
        return str(error)
    return "finished"


@pytest.mark.slow
def test_two_ranks_follow_and_end_together(make: Make, parts: tuple[Path, Path, Path], tmp_path: Path) -> None:
    servers = [make(), make()]
    command = arguments(servers, parts, tmp_path / "run", "steps=2")
    assert run_ranks(run_rl, 2, command) == ["finished", "finished"]
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 2 and max(row["sampler_gap_max"] for row in rows) < 1e-4
    servers[0].breaks_after = servers[1].breaks_after = 0
    ends = run_ranks(lose_the_servers, 2, [*command, "steps=4", "resume="])
    assert all("answers 400" in end for end in ends), ends


def test_a_key_goes_to_the_servers_and_nowhere_else(
    make: Make,
    parts: tuple[Path, Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = make()
    server.key = "sk-very-secret"
    (tmp_path / "key").write_text("sk-very-secret\n")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-from-the-environment")
    out = tmp_path / "run"
    rl.main(arguments([server], parts, out, "steps=1", f"sampling.api_key_file={tmp_path / 'key'}"))
    assert set(server.keys) == {"Bearer sk-very-secret"}
    server.key = "another"
    with pytest.raises(ServersLost, match=r"answers 401.*wrong key: Bearer \(key\)") as caught:
        rl.main(arguments([server], parts, tmp_path / "env", "steps=1"))
    assert server.keys[-1] == "Bearer sk-from-the-environment"
    said = capsys.readouterr()
    texts = [said.out, said.err, str(caught.value), repr(ServerConfig("http://x/v1", api_key="sk-very-secret"))]
    texts += [path.read_bytes().decode("latin-1") for path in tmp_path.glob("*/**/*") if path.is_file()]
    assert len(texts) > 8 and not any("sk-very-secret" in text or "sk-from" in text for text in texts)


def test_a_key_that_cannot_be_sent_is_refused_without_showing_it(tmp_path: Path) -> None:
    for content in ("", "two words", "sk-\u00e9"):
        (tmp_path / "key").write_text(content)
        with pytest.raises(ValueError, match="holds no API key") as caught:
            read_key(str(tmp_path / "key"))
        assert not content or content not in str(caught.value)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_key(str(tmp_path / "lost"))
    with pytest.raises(ValueError, match="OPENAI_API_KEY holds no API key"):
        read_key("", "a\nb")
    assert read_key("", "") == "" and read_key("", " k ") == "k"


def test_addresses() -> None:
    config = load_config(SamplingConfig, ["--base_url", "http://a:1/v1/,https://b/v1"])
    assert config.servers == ("http://a:1/v1", "https://b/v1") and SamplingConfig().servers == ()
    assert SamplingConfig(base_url=("http://a/v1",)).servers == ("http://a/v1",)
    for wrong in (
        "http://me:secret@host/v1",
        "http://host/v1?key=secret",
        "host:8000/v1",
        "ftp://host/v1",
        "http:///v1",
    ):
        with pytest.raises(ValueError, match="address") as caught:
            check_url(wrong)
        assert "secret" not in str(caught.value)
    for options, words in (
        (["base_url=http://a/v1,http://a/v1"], "more than once"),
        (["follow=directory"], "names no server"),
        (["base_url=http://me:secret@a/v1"], "user name"),
        (["base_url=a", "follow=ipc"], "follow must be"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_config(SamplingConfig, options)


# ----------------------------------------------------------------------------------------------------- parts of a sync


def test_a_bad_directory_leaves_the_old_weights(make: Make, parts: tuple[Path, Path, Path], tmp_path: Path) -> None:
    server = make()
    routes = WeightRoutes(ServerConfig(server.url), 60.0)
    model = Qwen25VL.from_pretrained(parts[1])
    model.save_pretrained(tmp_path / "good")
    routes.take("one", lambda: send_directory(routes, str(tmp_path / "good")))
    before = server.engine
    file = tmp_path / "cut" / "model.safetensors"
    model.save_pretrained(file.parent)
    file.write_bytes(file.read_bytes()[:-100])
    with torch.no_grad():
        model.model.norm.weight[3] = math.nan
    model.save_pretrained(tmp_path / "nan")
    for name, words in (("cut", "truncated"), ("nan", "NaN"), ("lost", "no directory on this server")):
        with pytest.raises(ServerError, match=words):
            routes.take("two", lambda name=name: send_directory(routes, str(tmp_path / name)))
        assert server.engine is before and routes.weight_version() == "one" and server.routes[-1][0] == "/resume"
    server.active = True  # a trainer was killed in the middle of an update
    routes.take("three", lambda: send_directory(routes, str(tmp_path / "good")))
    assert server.version == "three"


class Sender:
    """vLLM's NCCLTrainerWeightTransferEngine without NCCL: the same calls in the same order."""

    def __init__(self, client: WeightRoutes, source: PublishedWeights) -> None:
        self.client = client
        self.source = source
        self.sent: dict[str, torch.Tensor] = {}
        client.init_weight_transfer_engine({"world_size": 1 + client.world_size(), "rank_offset": 1})

    def send_weights(self) -> None:
        meta = self.source.metadata()
        self.client.start_weight_update()
        self.client.update_weights({"path": "", "names": [m.name for m in meta]})
        for m, (name, tensor) in zip(meta, self.source, strict=True):
            assert (m.name, m.shape, m.dtype) == (name, tuple(tensor.shape), tensor.dtype)
            self.sent[name] = tensor
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        pass


def alone() -> World:
    return start_world(ParallelConfig(device="cpu"), environment={})


def test_nccl_sends_published_tensors_in_vllms_order(
    make: Make, parts: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make()
    monkeypatch.setattr("vllm_server.read_checked", lambda path, config: None)
    monkeypatch.setattr("vllm_server.Qwen25VL.from_pretrained", lambda path: server.engine.model)
    model = server.engine.model
    senders: list[Sender] = []

    def connect(routes: WeightRoutes, source: PublishedWeights) -> Sender:
        senders.append(Sender(routes, source))
        return senders[-1]

    follower = NcclFollower(model, alone(), connect)
    routes = [WeightRoutes(ServerConfig(server.url), 60.0)]
    assert follower.send("one", routes) == [""] and follower.send("two", routes) == [""] and server.version == "two"
    state = model.state_dict()
    assert len(senders) == 1 and senders[0].sent.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in senders[0].sent.items())
    names = [route for route, _ in server.routes]
    assert names[:4] == ["/pause?mode=wait", "/init_weight_transfer_engine", "/start_weight_update", "/update_weights"]
    server.active = False
    server.status = 500
    server.stop()
    (problem,) = follower.send("three", routes)
    assert "does not answer" in problem


def test_nccl_without_vllm_says_what_it_needs(make: Make) -> None:
    server = make()
    (problem,) = NcclFollower(server.engine.model, alone()).send("one", [WeightRoutes(ServerConfig(server.url), 60.0)])
    assert "needs the package vllm" in problem and server.routes[-1][0] == "/resume"


def test_a_rank_that_cannot_send_still_gathers_with_the_others(parts: tuple[Path, Path, Path]) -> None:
    source = PublishedWeights(Qwen25VL.from_pretrained(parts[1]), torch.float32)
    steps = iter(source)
    first = [next(steps) for _ in range(3)]
    source.finish_pass()
    assert len(first) == 3 and next(steps, None) is None, "the begun pass is finished, not another one"


def test_log_probabilities_of_another_temperature_are_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    server = make()
    for processed in (True, False):

        def answer(body: dict[str, Any], processed: bool = processed) -> dict[str, Any]:
            divided = body["temperature"] if processed else 1.0
            top = [{"logprob": value / divided} for value in (-0.5, -2.0, -4.0)]
            return {"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]}

        monkeypatch.setattr(server, "complete", answer)
        for temperature in (0.5, 0.9, 1.7):
            if processed:
                check_temperature(ServerConfig(server.url, "mine"), temperature)
                continue
            with pytest.raises(ServerError, match="--logprobs-mode processed_logprobs"):
                check_temperature(ServerConfig(server.url, "mine"), temperature)
