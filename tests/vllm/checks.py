"""What is checked against a real vLLM. Each check returns its figures, and raises where they are wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastvst.batch import completion_sample, join
from fastvst.data import Processor, Sample, pack
from fastvst.data.sources import open_source
from fastvst.model import Qwen25VL
from fastvst.rl.rooms import RoomsOptions, make_rooms
from fastvst.rl.servers import check_temperature, served_model
from fastvst.rollout import Engine, SamplingParams
from fastvst.rollout.openai_client import OpenAIEngine, ServerConfig, ServerError
from fastvst.rollout.weight_sync import WeightRoutes, send_directory
from fastvst.train.distributed import ParallelConfig
from fastvst.train.distributed import start as start_world
from tests.vllm.environment import ROOT, SHIM, VllmServer

TOKENS = 48  # of a greedy completion
CLOSE = 1e-4  # largest difference of log-probabilities in float32
SYNC = 300.0  # seconds for new weights
GROUPS = {
    "embedding": "model.embed_tokens",
    "attention": "self_attn",
    "MLP": "layers.*mlp",
    "norms": "norm",
    "LM head": "lm_head",
    "patch embedding": "visual.patch_embed",
    "vision blocks": "visual.blocks",
    "merger": "visual.merger",
}


@dataclass
class Setting:
    """A server and the model that it was started with."""

    url: str
    model: Path
    folder: Path
    count: int

    @cached_property
    def config(self) -> ServerConfig:
        plain = ServerConfig(self.url)
        return dataclasses.replace(plain, model=served_model(plain))

    @cached_property
    def processor(self) -> Processor:
        return Processor.from_pretrained(self.model)

    @cached_property
    def client(self) -> OpenAIEngine:
        return OpenAIEngine(self.config, self.processor)

    @cached_property
    def samples(self) -> list[Sample]:
        return [*odd_prompts(), *rooms(self.count)][: self.count]


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8))


def ask(name: str, *parts: str | Image.Image, kind: str = "qa", **size: int) -> Sample:
    texts = [
        {"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p, **size} for p in parts
    ]
    return Sample.from_messages([{"role": "user", "content": texts}], id=name, kind=kind)


def odd_prompts() -> list[Sample]:
    """Text, blanks at the ends, one and several images of odd sizes, explicit sizes, thinking."""
    return [
        ask("text", "How many chairs are there?"),
        ask("blanks", "  How many chairs are there? \n"),
        ask("thinking", "How many chairs are there?", kind="thought_spatial"),
        ask("one image", noise(407, 301), "What is this?"),
        ask("a tiny image", noise(30, 20), " What? "),
        ask("two images", noise(200, 90), "and", noise(90, 200), "Which one is larger?"),
        ask("three images", noise(61, 90), noise(168, 126), noise(120, 61), "Which one is nearest?"),
        ask("an explicit size", noise(320, 240), "What is this?", resized_width=140, resized_height=56),
    ]


def rooms(count: int) -> list[Sample]:
    """Held-out rows of examples/rl.py: depth, distance, measurement, 3D boxes."""
    world = start_world(ParallelConfig(device="cpu", threads=1), environment={})
    _, rows = make_rooms(RoomsOptions(samples=40), 120, world)
    found = list(open_source(rows))
    boxes = [sample for sample in found if sample.kind == "bbox_3d"]
    others = [sample for sample in found if sample.kind != "bbox_3d"]
    return [*boxes[:6], *others][:count]


def untied_copy(model: Path, folder: Path) -> Path:
    """The model with an LM head of its own, a little away from the embedding."""
    tied = Qwen25VL.from_pretrained(model)
    free = Qwen25VL(dataclasses.replace(tied.config, tie_word_embeddings=False))
    free.load_state_dict(tied.state_dict(), strict=False)
    with torch.no_grad():
        torch.manual_seed(0)
        free.head_weight.copy_(tied.head_weight + 0.01 * torch.randn_like(tied.head_weight))
    free.save_pretrained(folder, processor=Processor.from_pretrained(model))
    return folder


def loads(server: VllmServer) -> dict[str, Any]:
    warned = server.warnings()
    assert not warned, warned
    return {"seconds to start": round(server.seconds, 1)}


# ------------------------------------------------------------------------------------------------------------- answers


def by_transformers(
    reference: Any, encoded: Any, completion: list[int], hidden_tokens: Sequence[int]
) -> tuple[list[int], list[float], list[float]]:
    """What transformers finds most likely after the prompt and each part of a completion: greedy if they agree.

    Returns:
        (most likely tokens; log-probabilities of the completion; those without the placeholders, which a server takes
        out of the softmax).
    """
    prompt = encoded.tokens.tolist()
    ids = torch.tensor([[*prompt, *completion[:-1]]])
    media = {"pixel_values": encoded.patches, "image_grid_thw": encoded.grid.long()} if len(encoded.grid) else {}
    with torch.no_grad():
        out = reference(input_ids=ids, mm_token_type_ids=(ids == reference.config.image_token_id).int(), **media)
    logits = out.logits[0, len(prompt) - 1 :].double()
    chosen = torch.tensor(completion)[:, None]
    plain = torch.log_softmax(logits, -1).gather(1, chosen).flatten().tolist()
    tokens = logits.argmax(-1).tolist()
    logits[:, list(hidden_tokens)] -= 100
    return tokens, plain, torch.log_softmax(logits, -1).gather(1, chosen).flatten().tolist()


def largest(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return max((abs(a - b) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def same_answers(setting: Setting) -> dict[str, Any]:
    """Engine, server and transformers: the tokens of all prompts, and their log-probabilities."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    reference = Qwen2_5_VLForConditionalGeneration.from_pretrained(setting.model, dtype=torch.float32).eval()
    engine = Engine(Qwen25VL.from_pretrained(setting.model), setting.processor, memory=1 << 28)
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS)
    ours = engine.generate(setting.samples, params)
    theirs = setting.client.generate(setting.samples, params)  # compares the ids of every prompt
    hidden = [setting.processor.token_id(name) for name in ("<|image_pad|>", "<|video_pad|>")]
    wrong = []
    gaps = {"engine": 0.0, "server": 0.0}
    for sample, (a,), (b,) in zip(setting.samples, ours, theirs, strict=True):
        encoded = setting.processor.encode(sample, add_generation_prompt=True)
        tokens, plain, biased = by_transformers(reference, encoded, a.tokens, hidden)
        whole = len(tokens) == TOKENS or tokens[-1] in reference.generation_config.eos_token_id
        if not (a.tokens == b.tokens == tokens and whole):
            wrong.append(sample.id)
            continue
        gaps["engine"] = max(gaps["engine"], largest(a.logprobs, plain))
        gaps["server"] = max(gaps["server"], largest(b.logprobs, biased))
    assert not wrong and len(setting.samples) == setting.count, wrong
    assert max(gaps.values()) < CLOSE, gaps
    kinds = {kind: sum(s.kind == kind for s in setting.samples) for kind in sorted({s.kind for s in setting.samples})}
    return {"prompts": len(setting.samples), "kinds": kinds, "largest difference": gaps}


def same_filters(setting: Setting) -> dict[str, Any]:
    """processed_logprobs: temperature, then min-p, then top-p, then renormalised, without the placeholders."""
    check_temperature(setting.config, 0.5)
    model = Qwen25VL.from_pretrained(setting.model)
    hidden = [setting.processor.token_id(name) for name in ("<|image_pad|>", "<|video_pad|>")]
    gaps = {}
    for temperature, top_p, min_p in (
        (1.0, 1.0, 0.0),
        (0.6, 1.0, 0.0),
        (1.3, 0.8, 0.0),
        (1.3, 0.7, 0.1),
        (0.8, 1.0, 0.2),
    ):
        params = SamplingParams(temperature=temperature, top_p=top_p, min_p=min_p, max_tokens=16, seed=3)
        gap = 0.0
        for sample in setting.samples[:4]:
            ((rollout,),) = setting.client.generate([sample], params)
            expected = kept_logprobs(model, setting.processor, sample, rollout.tokens, params, hidden)
            gap = max(gap, largest(rollout.logprobs, expected))
        gaps[f"T {temperature}, top_p {top_p}, min_p {min_p}"] = gap
    assert max(gaps.values()) < CLOSE, gaps
    return {"largest difference": gaps}


def kept_logprobs(
    model: Qwen25VL, processor: Processor, sample: Sample, tokens: list[int], params: SamplingParams, hidden: list[int]
) -> list[float]:
    prompt = processor.encode(sample, add_generation_prompt=True)
    whole = join(prompt, completion_sample(prompt, torch.tensor(tokens, dtype=torch.int32)))
    with torch.no_grad():
        states = model(pack([whole])).reshape(-1, model.config.hidden_size)
        logits = (states[len(prompt) - 1 : len(whole) - 1] @ model.head_weight.t()).double()
    logits[:, hidden] -= 100
    found = []
    for row, token in zip(torch.softmax(logits / params.temperature, -1), tokens, strict=True):
        kept = torch.where(row >= params.min_p * row.max(), row, 0.0)
        values, order = (kept / kept.sum()).sort(descending=True)
        values = torch.where(values.cumsum(0) - values < params.top_p, values, 0.0)
        share: Tensor = torch.zeros_like(values).scatter(0, order, values)
        found.append((share[token] / share.sum()).log().item())
    return found


# -------------------------------------------------------------------------------------------------------- new weights


def compare(setting: Setting, model: Qwen25VL) -> tuple[float, list[list[float]]]:
    """(largest difference of engine and server over four prompts, the engine's log-probabilities)."""
    chosen = [setting.samples[i] for i in (0, 3, 5, 8)]
    params = SamplingParams(temperature=0.0, max_tokens=12)
    ours = Engine(model, setting.processor, memory=1 << 26).generate(chosen, params)
    theirs = setting.client.generate(chosen, params)
    assert [r.tokens for (r,) in ours] == [r.tokens for (r,) in theirs], "other tokens"
    return max(largest(a.logprobs, b.logprobs) for (a,), (b,) in zip(ours, theirs, strict=True)), [
        r.logprobs for (r,) in ours
    ]


def follows(setting: Setting) -> dict[str, Any]:
    """Every group of weights alone, and then all together, twice: the server's answers are those of the new weights."""
    model = Qwen25VL.from_pretrained(setting.model)
    routes = WeightRoutes(setting.config, SYNC)
    _, before = compare(setting, model)
    gaps = {}
    generator = torch.Generator().manual_seed(1)
    steps = [*GROUPS.items(), ("all", ""), ("all again", "")]
    for number, (group, pattern) in enumerate(steps):
        chosen = [
            tensor
            for name, tensor in model.state_dict().items()
            if all(part in name for part in pattern.split("*")) and (pattern != "norm" or "visual" not in name)
        ]
        if not chosen:
            assert group == "LM head" and model.config.tie_word_embeddings
            continue
        with torch.no_grad():
            for tensor in chosen:
                tensor += 0.1 * tensor.abs().mean() * torch.randn(tensor.shape, generator=generator)
        folder = setting.folder / f"version-{number}"
        model.save_pretrained(folder)
        version = f"check-{number}"
        routes.take(version, lambda folder=folder: send_directory(routes, str(folder)))
        setting.client.weights = version
        gap, after = compare(setting, model)
        assert after != before, f"{group}: nothing changed"
        gaps[group] = gap
        before = after
        shutil.rmtree(folder)
    # The placeholders' share, which only the trainer keeps, is in these differences.
    assert max(gaps.values()) < 1e-3, gaps
    return {"largest difference": gaps}


def bad_directories(setting: Setting) -> dict[str, Any]:
    """Each is refused, and the old weights, their version and their answers stay."""
    model = Qwen25VL.from_pretrained(setting.model)
    routes = WeightRoutes(setting.config, SYNC)
    folder = setting.folder / "good"
    model.save_pretrained(folder)
    routes.take("good", lambda: send_directory(routes, str(folder)))
    setting.client.weights = "good"
    _, before = compare(setting, model)
    bad = {name: setting.folder / name for name in ("truncated", "NaN", "another shape", "incomplete", "missing")}
    model.save_pretrained(bad["truncated"])
    cut = bad["truncated"] / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1000])
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_tensors(state | {"model.norm.weight": state["model.norm.weight"] * math.nan}, bad["NaN"])
    save_tensors(state | {"model.norm.weight": state["model.norm.weight"][:-1]}, bad["another shape"])
    save_tensors({name: tensor for name, tensor in state.items() if name != "model.norm.weight"}, bad["incomplete"])
    said = {}
    for name, path in bad.items():
        try:
            routes.take(name, lambda path=path: send_directory(routes, str(path)))
        except ServerError as error:
            said[name] = str(error).replace(str(path), "DIR")[:300]
        else:
            raise AssertionError(f"{name}: the server took it")
        assert routes.weight_version() == "good"
        gap, after = compare(setting, model)
        assert after == before and gap < 1e-3, (name, gap)
    return {"refused": said}


def save_tensors(state: dict[str, Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")


def rl_steps(setting: Setting) -> dict[str, Any]:
    """Two steps of examples/rl.py without importance weights."""
    out = setting.folder / "rl"
    options = {
        "model.path": setting.model,
        "out": out,
        "steps": 2,
        "rooms.samples": 40,
        "sampling.prompts": 8,
        "sampling.base_url": setting.url,
        "sampling.follow": "directory",
        "evaluation.every": 1,
        "evaluation.questions": 120,
        "parallel.device": "cpu",
    }
    command = [
        sys.executable,
        str(ROOT / "examples" / "rl.py"),
        *(f"{name}={value}" for name, value in options.items()),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    groups = [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]
    held_out = [json.loads(line)["reward"] for line in (out / "evaluation.jsonl").read_text().splitlines()]
    gaps = [row["sampler_gap_max"] for row in rows]
    assert len(rows) == 2 and max(gaps) < 1e-3, gaps
    assert len({group["weights"] for group in groups}) == 2 and None not in {group["weights"] for group in groups}
    assert len(set(held_out)) > 1, "held-out rewards do not move"
    return {"sampler_gap_max": gaps, "sync_seconds": [row["sync_seconds"] for row in rows], "held out": held_out}


def nccl_source(environment: Path, model: Path) -> dict[str, Any]:
    """vLLM's own code takes our source of tensors; without a GPU nothing is sent."""
    code = f"""
import torch
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine
from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient
from fastvst.model import Qwen25VL
from fastvst.rollout.openai_client import ServerConfig
from fastvst.rollout.weight_sync import PublishedWeights, WeightRoutes
source = PublishedWeights(Qwen25VL.from_pretrained({str(model)!r}), torch.bfloat16)
routes = WeightRoutes(ServerConfig("http://127.0.0.1:9/v1"), 1.0)
assert isinstance(routes, VLLMWeightSyncClient)
NCCLTrainerInitInfo(rank=0, master_address="127.0.0.1", master_port=1, world_size=2)
sent = list(NCCLTrainerWeightTransferEngine._checked_iter(source, source.metadata()))
print(len(sent))
"""
    variables = {"PYTHONPATH": str(SHIM), "PATH": "/usr/bin:/bin", "HOME": "/tmp"}
    done = subprocess.run(
        [str(environment / "bin" / "python"), "-c", code], capture_output=True, text=True, env=variables
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {"tensors": int(done.stdout.split()[-1]), "sent over NCCL": "not run"}
