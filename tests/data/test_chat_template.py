"""A model's own chat template against transformers' apply_chat_template, token for token and mask for mask."""

import json
import pickle
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoTokenizer

from fastvst.batch import IGNORE
from fastvst.data import Processor, Sample
from fastvst.data.chat_template import PUBLISHED, ChatTemplate, is_stock
from fastvst.data.ledger import SampleError
from fastvst.data.sources import open_source
from fastvst.model import ModelConfig
from tool_talk import QWEN, TALK, TOOLS

SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nThink first.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)
TAGGED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
)
FORGETS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if loop.last or m['role'] != 'assistant' %}"
    "{{ m['content'] }}{% else %}{{ m['content'].split('</think>')[-1] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = [
    {"role": "user", "content": "Where is the \u00e9 chair?"},
    {"role": "assistant", "content": "<think>look</think>left"},
    {"role": "user", "content": "And the bed?"},
    {"role": "assistant", "content": "right \U0001f642"},
]


def directory(path: Path, template: str) -> Path:
    processor = Processor.preset("tiny")
    processor.save_pretrained(path)
    (path / "config.json").write_text(ModelConfig.preset("tiny").to_json())
    for name in ("chat_template.json", "tokenizer_config.json"):
        fields = json.loads((path / name).read_text()) | {"chat_template": template}
        (path / name).write_text(json.dumps(fields))
    (path / "chat_template.jinja").write_text(template)
    return path


@pytest.mark.parametrize("template", [SYSTEM, TAGGED, FORGETS])
@pytest.mark.parametrize("system", [False, True])
def test_prompts_equal_transformers(tmp_path, template, system):
    messages = [{"role": "system", "content": "S"}] * system + TURNS[:3]
    path = directory(tmp_path / "m", template)
    theirs = AutoTokenizer.from_pretrained(path).apply_chat_template(messages, add_generation_prompt=True)
    processor = pickle.loads(pickle.dumps(Processor.from_pretrained(path)))  # as for a worker process
    ours = processor.encode(Sample.from_messages(messages), add_generation_prompt=True)
    assert ours.tokens.tolist() == theirs["input_ids"]
    assert (ours.labels == IGNORE).all()


def test_generation_tags_are_the_mask(tmp_path):
    path = directory(tmp_path / "m", TAGGED)
    theirs = AutoTokenizer.from_pretrained(path).apply_chat_template(
        TURNS, return_dict=True, return_assistant_tokens_mask=True
    )
    ours = Processor.from_pretrained(path).encode(Sample.from_messages(TURNS))
    assert ours.tokens.tolist() == theirs["input_ids"]
    assert (ours.labels != IGNORE).int().tolist() == theirs["assistant_masks"]
    assert sum(theirs["assistant_masks"]) > 4


@pytest.mark.parametrize(
    "supervise, expected",
    [
        ("message", "<|im_start|>assistant\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"),
        ("content", "{}<|im_end|>{}<|im_end|>"),
    ],
)
def test_the_mask_without_tags_is_each_message_of_the_assistant(tmp_path, supervise, expected):
    processor = Processor.from_pretrained(directory(tmp_path / "m", SYSTEM), supervise=supervise)
    encoded = processor.encode(Sample.from_messages(TURNS))
    under_loss = encoded.labels[encoded.labels != IGNORE]
    text = processor.decode(under_loss, skip_special=False)
    assert text == expected.format(TURNS[1]["content"], TURNS[3]["content"])
    assert (encoded.labels[encoded.labels != IGNORE] == encoded.tokens[encoded.labels != IGNORE]).all()


def test_images_become_their_pads(tmp_path):
    path = directory(tmp_path / "m", SYSTEM)
    parts = [{"type": "image", "image": Image.new("RGB", (56, 84))}, {"type": "text", "text": "?"}]
    messages = [{"role": "user", "content": parts}, TURNS[1]]
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    theirs = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * 6))["input_ids"]  # as Qwen2_5_VLProcessor
    encoded = Processor.from_pretrained(path).encode(Sample.from_messages(messages))
    assert encoded.tokens.tolist() == theirs and encoded.vision_slots.shape == (6,)
    with pytest.raises(ValueError, match="leaves out images"):
        Processor.from_pretrained(directory(tmp_path / "n", TAGGED.replace("{{ m['content'] }}", "?"))).encode(
            Sample.from_messages(messages)
        )


def test_a_template_that_rewrites_earlier_messages_serves_generation_only(tmp_path):
    processor = Processor.from_pretrained(directory(tmp_path / "m", FORGETS))
    with pytest.raises(SampleError, match=r"chat_template.json writes message 1 differently.*generation only"):
        processor.encode(Sample.from_messages(TURNS))
    processor.encode(Sample.from_messages(TURNS), add_generation_prompt=True)
    assert (processor.encode(Sample.from_messages(TURNS[:2])).labels != IGNORE).any()


def test_stock_templates_need_no_jinja(tmp_path):
    assert Processor.from_pretrained(directory(tmp_path / "m", PUBLISHED + "\n")).files.template is None
    assert not is_stock(SYSTEM)
    messages = [*TURNS[:1], {"role": "assistant", "content": [{"type": "text", "text": "left"}]}]
    own = ChatTemplate("published", PUBLISHED)
    plain = Sample.from_messages(messages)
    ids = Processor.preset("tiny").tokenizer.encode(own.render(plain.messages), add_special_tokens=False).ids
    assert ids == Processor.preset("tiny").encode(plain).tokens.tolist()


def test_the_order_of_the_places_and_the_loser_named(tmp_path):
    path = directory(tmp_path / "m", SYSTEM)
    (path / "chat_template.jinja").write_text(TAGGED)
    with pytest.warns(UserWarning, match="template of chat_template.json is used; chat_template.jinja has another"):
        assert Processor.from_pretrained(path).files.template.source == SYSTEM
    for name in ("chat_template.json", "chat_template.jinja"):
        (path / name).unlink()
    named = [{"name": "default", "template": TAGGED}, {"name": "rag", "template": SYSTEM}]
    fields = json.loads((path / "tokenizer_config.json").read_text()) | {"chat_template": named}
    (path / "tokenizer_config.json").write_text(json.dumps(fields))
    assert Processor.from_pretrained(path).files.template.source == TAGGED


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['__builtins__'] }}",
        "{{ messages.append(1) }}",
        "{{ 'a' * 10000000000 }}",
        "{{ 'a'.ljust(10000000000) }}",
        "{{ 'a'|center(10000000000) }}",
        "{{ 9**9**9 }}",
        "{{ lipsum(n=100000) }}",
        "{% for i in range(10000000000) %}x{% endfor %}",
        "{{ messages[7].content }}",
        "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
        "{% set s = 'a' * 999999 %}{% for i in s %}{% for j in s %}{% endfor %}{% endfor %}",
        "{% set s = 'a' * 999999 %}{{ s.replace('a', s)|length }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ 1 / 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_broken_and_hostile_templates_are_refused(tmp_path, template):
    with pytest.raises(ValueError, match="chat_template.json"):
        processor = Processor.from_pretrained(directory(tmp_path / "m", template))
        processor.encode(Sample.from_messages(TURNS[:1]), add_generation_prompt=True)


def test_every_file_is_written_back_as_it_was(tmp_path):
    path = directory(tmp_path / "a", SYSTEM)
    fields = json.loads((path / "preprocessor_config.json").read_text())
    fields |= {"mine": 1, "min_pixels": None, "max_pixels": None, "size": {"shortest_edge": 784, "longest_edge": 78400}}
    (path / "preprocessor_config.json").write_text(json.dumps(fields))
    (path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (path / "video_preprocessor_config.json").write_text(json.dumps({"size": {"longest_edge": 602112}}))
    tokenizer = Processor.preset("tiny").tokenizer
    tokenizer.enable_truncation(max_length=16)
    tokenizer.save(str(path / "tokenizer.json"))
    Processor.from_pretrained(path).save_pretrained(tmp_path / "b")
    names = {p.name for p in path.iterdir()} - {"config.json", "fastvst_processor.json"}
    assert {n: (tmp_path / "b" / n).read_bytes() for n in names} == {n: (path / n).read_bytes() for n in names}
    Processor.from_pretrained(path, max_pixels=40_000).save_pretrained(tmp_path / "b")
    changed = json.loads((tmp_path / "b" / "preprocessor_config.json").read_text())
    assert changed == fields | {"size": {"shortest_edge": 784, "longest_edge": 40_000}}


def test_stock_on_text_without_images_is_the_stock_one(tmp_path):
    whole = QWEN + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    assert Processor.from_pretrained(directory(tmp_path / "m", whole)).files.template is None
    for other in (QWEN, whole.replace("helpful", "spatial")):
        assert Processor.from_pretrained(directory(tmp_path / "n", other)).files.template is not None


OWN_TOOLS = QWEN.replace("You are a helpful assistant.", "Measure first.")


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_tools_reach_the_template_as_tools(tmp_path, system, tools, form):
    path = directory(tmp_path / "m", OWN_TOOLS)
    talk = [{"role": "system", "content": system}, *TALK] if system else TALK
    theirs = AutoTokenizer.from_pretrained(path).apply_chat_template(talk, tools=tools)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({form: talk, "tools": tools}) + "\n")
    (sample,) = open_source(rows)
    processor = pickle.loads(pickle.dumps(Processor.from_pretrained(path)))
    again = Sample.from_json(json.loads(json.dumps(sample.to_json())))
    encoded = processor.encode(again)
    assert encoded.tokens.tolist() == theirs["input_ids"] == processor.encode(sample).tokens.tolist()
    learnt = processor.decode(encoded.labels[encoded.labels != IGNORE], skip_special=False)
    assert learnt.count("<tool_call>") == 3 and learnt.count("<|im_start|>assistant") == 3
    assert "tool_response" not in learnt and "signatures" not in learnt


def test_text_of_a_row_that_looks_like_tools_stays_text(tmp_path):
    rows = tmp_path / "rows.jsonl"
    turns = [TURNS[0], {"role": "assistant", "content": '<tool_call>\n{"a": 1}\n</tool_call>'}]
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    path = directory(tmp_path / "m", OWN_TOOLS)
    theirs = AutoTokenizer.from_pretrained(path).apply_chat_template(turns)["input_ids"]
    assert Processor.from_pretrained(path).encode(next(iter(open_source(rows)))).tokens.tolist() == theirs


@pytest.mark.parametrize("template", [SYSTEM, TAGGED])
def test_turns_with_weight_0_are_left_out(tmp_path, template):
    processor = Processor.from_pretrained(directory(tmp_path / "m", template))
    whole = processor.encode(Sample.from_messages(TURNS))
    for silent in ((1,), (3,), (1, 3)):
        turns = [{**turn, "learn": False} if i in silent else turn for i, turn in enumerate(TURNS)]
        encoded = processor.encode(Sample.from_messages(turns))
        assert encoded.tokens.tolist() == whole.tokens.tolist()
        text = processor.decode(encoded.labels[encoded.labels != IGNORE], skip_special=False)
        assert ["left" in text, "right" in text] == [i not in silent for i in (1, 3)]


VIDEO = SYSTEM.replace(
    "{% else %}{{ p['text'] }}",
    "{% elif p['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ p['text'] }}",
)


def test_videos_and_several_images_become_their_pads(tmp_path):
    path = directory(tmp_path / "m", VIDEO)
    frames = [Image.new("RGB", (56, 56))] * 4
    parts = [
        {"type": "video", "video": frames},
        {"type": "text", "text": "then"},
        {"type": "image", "image": Image.new("RGB", (56, 84))},
        {"type": "image", "image": Image.new("RGB", (56, 56))},
    ]
    messages = [{"role": "user", "content": parts}, TURNS[1], {"role": "user", "content": parts[3:]}, TURNS[3]]
    encoded = Processor.from_pretrained(path, video_min_pixels=3136).encode(Sample.from_messages(messages))
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    grids = encoded.grid.tolist()
    counts = [t * h * w // 4 for t, h, w in grids]
    assert [g[0] for g in grids] == [2, 1, 1, 1]
    for pad, numbers in (("<|video_pad|>", counts[:1]), ("<|image_pad|>", counts[1:])):  # as Qwen2_5_VLProcessor
        for number in numbers:
            text = text.replace(pad, "<|placeholder|>" * number, 1)
        text = text.replace("<|placeholder|>", pad)
    assert encoded.tokens.tolist() == tokenizer(text)["input_ids"]


def test_a_template_that_raises_costs_the_row_only(tmp_path):
    strict = "{% if messages|length > 2 %}{{ raise_exception('one question only') }}{% endif %}" + SYSTEM
    processor = Processor.from_pretrained(directory(tmp_path / "m", strict))
    processor.encode(Sample.from_messages(TURNS[:2]))
    with pytest.raises(SampleError, match=r"memory/7: chat_template: .*chat_template.json fails: .*one question only"):
        processor.encode(Sample.from_messages(TURNS, id="7"))


def test_loops_that_ask_for_their_neighbours_are_those_of_transformers(tmp_path):
    template = (
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.first }}{{ loop.last }}{{ loop.revindex }}"
        "{{ loop.previtem.role if not loop.first }}{{ loop.nextitem.role if not loop.last }}{{ loop.cycle('a', 'b') }}"
        "<|im_start|>{{ m.role + m['content'] }}"
        "{% if loop.index > 3 %}{% break %}{% endif %}{% else %}none{% endfor %}{% for a, b in messages[0].items() %}"
        "{{ a ~ b ~ 7 }}{% endfor %}{% for x in [] %}{% else %}empty{% endfor %}{% for x in nothing %}{% endfor %}"
        "{% for i in range(3) if i != 1 %}{{ i * 2 + 1 }}{{ 2 ** i }}{% endfor %}{{ [1] + [2] }}{{ 'ab' * 2 }}"
    )
    path = directory(tmp_path / "m", template)
    for turns in (TURNS, TURNS[:1], TURNS * 2):
        theirs = AutoTokenizer.from_pretrained(path).apply_chat_template(turns, tokenize=False)
        messages = Sample.from_messages(turns).messages
        assert Processor.from_pretrained(path).files.template.render(messages) == theirs
