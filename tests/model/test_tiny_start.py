"""The aligned start of the tiny decoder: words find their marks, heads look back, other weights stay random."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from fastvst.batch import pack
from fastvst.data import Processor, Sample
from fastvst.model import Qwen25VL
from fastvst.model.tiny_start import DISTANCES, StartConfig, start_from_tower
from fastvst.scenes.scene import Scene
from fastvst.spatial import draw
from fastvst.train import distributed
from fastvst.train.distributed import ParallelConfig
from fastvst.train.run import build_model


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.preset("tiny", max_pixels=168 * 126)


@pytest.fixture(scope="module")
def model() -> Qwen25VL:
    torch.manual_seed(0)
    return Qwen25VL.fresh("tiny", start="aligned").eval()


@torch.no_grad()
def attention_inputs(model: Qwen25VL, sample: Sample, processor: Processor, layer: int) -> tuple:
    """The pack, and queries (T, 6, 32) and keys (T, 2, 32) of a layer whose input are the embeddings."""
    batch = pack([processor.encode(sample, add_generation_prompt=True)])
    block = model.model.layers[layer]
    x = block.input_layernorm(model.embed(batch))
    attn = block.self_attn
    query, key, _ = attn.rope(x @ attn.qkv_proj.weight.T, batch.positions)
    return batch, query, key


def reads(query: torch.Tensor, keys: torch.Tensor, columns: int, expected: tuple[float, float]) -> bool:
    """Whether the first head's best token is the one at `expected` (column, row)."""
    found = int((keys[:, 0] @ query[0]).argmax())
    return max(abs(found % columns - expected[0]), abs(found // columns - expected[1])) < 0.75


def test_the_word_of_a_colour_reads_the_token_with_its_mark(
    model: Qwen25VL, processor: Processor, scenes: list[Scene]
) -> None:
    """A random decoder finds one of 24 tokens by luck; a mark at a border of tokens may be read in either."""
    right = by_luck = count = 0
    torch.manual_seed(1)
    random = Qwen25VL.fresh("tiny")
    colours = list(draw.COLOURS)
    for number, scene in enumerate(scenes):
        view = scene.views[0]
        image = Image.fromarray(view.image.copy())
        wide, high = image.size
        marks = {}
        for k in range(4):
            at = (wide * (0.15 + 0.22 * k), high * (0.25 + 0.5 * ((k + number) % 2)))
            marks[colours[(k + 2 * number) % 7]] = at
            draw.dot(image, at, colours[(k + 2 * number) % 7])
        text = " ".join(f"the {colour} point," for colour in marks)
        content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
        sample = Sample.from_messages([{"role": "user", "content": content}])
        batch, query, key = attention_inputs(model, sample, processor, 0)
        others = attention_inputs(random, sample, processor, 0)
        slots = batch.vision_slots.long().sort().values  # reading order
        rows, columns = (int(n) // 2 for n in batch.grid[0, 1:])
        for colour, (x, y) in marks.items():
            (token,) = processor.tokenizer.encode(f" {colour}").ids
            (place,) = torch.nonzero(batch.tokens == token).flatten().tolist()
            expected = (x / wide * columns - 0.5, y / high * rows - 0.5)

            right += reads(query[place], key[slots], columns, expected)
            by_luck += reads(others[1][place], others[2][slots], columns, expected)
            count += 1
    assert count == 4 * len(scenes) and right > 0.9 * count and by_luck < 0.4 * count, (right, by_luck, count)


def test_heads_of_the_second_layer_look_a_fixed_distance_back(model: Qwen25VL, processor: Processor) -> None:
    text = "Which of these many words is at which distance from the last one of this sentence, and what is before it?"
    sample = Sample.from_messages([{"role": "user", "content": [{"type": "text", "text": text}]}])
    _, query, key = attention_inputs(model, sample, processor, 1)
    last = len(query) - 1
    for head, distance in enumerate(DISTANCES):
        weights = (key[:, head // 3] @ query[last, head] / 32**0.5).softmax(0)
        assert int(weights.argmax()) == last - distance and weights.max() > 0.4, (head, distance)


def test_only_what_the_start_names_changes() -> None:
    """The last two layers keep their random weights but for the scale of what writes to the stream."""
    torch.manual_seed(3)
    plain = Qwen25VL.fresh("tiny")
    torch.manual_seed(3)
    changed = Qwen25VL.fresh("tiny", start="aligned")
    stream = StartConfig().stream
    for (name, before), after in zip(plain.named_parameters(), changed.parameters(), strict=True):
        if name.startswith(("visual.", "model.norm", "model.layers.2", "model.layers.3")) or "layernorm" in name:
            writes = name.endswith(("o_proj.weight", "down_proj.weight")) and name.startswith("model.layers")
            torch.testing.assert_close(after, before * (stream if writes else 1.0), rtol=1e-6, atol=0)
    table = changed.model.embed_tokens.weight != plain.model.embed_tokens.weight
    assert 80 <= int(table.any(1).sum()) <= 160, "colours and classes, with and without a space"
    assert not torch.equal(
        plain.model.layers[0].self_attn.qkv_proj.weight, changed.model.layers[0].self_attn.qkv_proj.weight
    )


def test_the_training_scripts_start_aligned(model: Qwen25VL) -> None:
    world = distributed.start(ParallelConfig(device="cpu", threads=1), environment={})
    built = build_model(
        world,
        path=None,
        preset="tiny",
        seed=0,
        frozen=(),
        recompute="none",
        reshard=True,
        weights_dtype=torch.float32,
        vocab_size=4096,
    )
    for a, b in zip(built.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # the QR's last bits depend on the threads


def test_a_tower_without_words_is_an_error(model: Qwen25VL) -> None:
    with pytest.raises(KeyError, match="words.colour|directions"):
        start_from_tower(model.model, model.config, {"directions.colour": torch.zeros(8, 192)})
