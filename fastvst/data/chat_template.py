"""A model's own chat template: found in its files, rendered as transformers does, with an exact loss mask."""

from __future__ import annotations

import functools
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from fastvst import jsonl
from fastvst.batch import IGNORE
from fastvst.data.chat import JINJA_TEMPLATE
from fastvst.data.sample import Message
from fastvst.model.json_values import chat_templates, checked

# The template of the published checkpoints; text for text the same conversation as JINJA_TEMPLATE.
PUBLISHED = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPEN = "\ufdd0"  # noncharacters around what a `generation` tag encloses
CLOSE = "\ufdd1"
MOST = 1_000_000  # characters or steps that one operation of a template may make
TAG = re.compile(r"{%-?\s*generation\s*-?%}")


class TemplateError(ValueError):
    """The template cannot be used for this purpose; the message names its file."""


def find_template(read: Callable[[str], str | None], extra: Mapping[str, str]) -> tuple[str, str] | None:
    """(file name, template) in the files of a model directory, in the order of transformers' processors; None if none.

    Args:
        read: file name -> text of the file, or None.
        extra: templates of the folder additional_chat_templates by name.
    """
    found: list[tuple[str, str]] = []
    for name in ("processor_config.json", "chat_template.json", "chat_template.jinja", "tokenizer_config.json"):
        text = read(name)
        if text is None:
            continue
        value: Any = text
        if not name.endswith(".jinja"):
            value = checked(jsonl.loads(text), {"chat_template": chat_templates}, f"{name}: ").get("chat_template")
        if isinstance(value, dict):
            value = value.get("default")
        if isinstance(value, str):
            found.append((name, value))
    if not found and "default" in extra:
        found.append(("additional_chat_templates/default.jinja", extra["default"]))
    losers = sorted({name for name, value in found[1:] if value.strip() != found[0][1].strip()})
    if losers:
        warnings.warn(f"the chat template of {found[0][0]} is used; {', '.join(losers)} has another one", stacklevel=4)
    return found[0] if found else None


def is_stock(template: str) -> bool:
    """True for the template of `fastvst.data.chat` and for the published one, which need no jinja."""
    return template.strip() in (JINJA_TEMPLATE.strip(), PUBLISHED.strip())


def is_stock_without_images(template: ChatTemplate) -> bool:
    """True for a template that is the stock one on text and cannot write images: the one in tokenizer_config.json of
    the published checkpoints. transformers uses it where the folder has no template of the processor."""
    stock = ChatTemplate("stock", JINJA_TEMPLATE)
    asks = _text_message("user", "\ue000?")
    answers = _text_message("assistant", "\ue001 <think>a</think> b")
    system = _text_message("system", "\ue002")
    try:
        for talk in ([asks], [asks, answers], [system, asks], [system, asks, answers, asks, answers], [asks, asks]):
            for prompt in (False, True):
                if template.render(talk, add_generation_prompt=prompt) != stock.render(
                    talk, add_generation_prompt=prompt
                ):
                    return False
    except TemplateError:
        return False
    try:
        return "<|image_pad|>" not in template.render([{"role": "user", "content": [{"type": "image", "image": True}]}])
    except TemplateError:
        return True


class ChatTemplate:
    """A compiled template. Can be pickled: worker processes compile it again.

    Attributes:
        name: its file.
        source: its text.
    """

    def __init__(self, name: str, source: str) -> None:
        """Raises TemplateError if the template is not valid jinja."""
        self.name = name
        self.source = source
        try:
            self._environment = _environment()
            self._template = self._environment.from_string(self._environment.bounded(source))
        except jinja2.TemplateError as error:
            raise TemplateError(f"{name} is not a valid chat template: {error}") from error
        self._strings = self._takes_strings()

    def __reduce__(self) -> tuple[type[ChatTemplate], tuple[str, str]]:
        return ChatTemplate, (self.name, self.source)

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The text of a conversation, each image and video as one pad.

        Args:
            messages: as in `Sample.messages`, and those of `tool_turns.take_apart`.
            tools: the tools that the model may call.

        Raises:
            TemplateError: the template raises, e.g. for an order of roles that it does not allow.
        """
        return self._run(messages, tools, add_generation_prompt).replace(OPEN, "").replace(CLOSE, "")

    def render_supervised(
        self, messages: Sequence[Message], supervise: str, tools: Sequence[Any] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text and the character ranges under the loss: those of the template's `generation` tags, else the
        assistant's messages. Messages with "learn": False are left out.

        A message is the text by which the conversation grows when the message is added. `supervise` is that of
        `fastvst.data.chat.render`.

        Raises:
            TemplateError: a later message changes the text of an earlier one, so that no exact mask exists.
        """
        spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        silent = [i for i in spoken if messages[i].get("learn") is False]
        if TAG.search(self.source):
            text, spans = _take_marks(self._run(messages, tools, False))
            left_out = [self._message_span(messages, i, text, tools) for i in silent]
            return text, [span for span in spans if not any(a <= span[0] < b for a, b in left_out)]
        text = self.render(messages, tools=tools)
        spans = []
        for index in [i for i in spoken if i not in silent]:
            start, end = self._message_span(messages, index, text, tools)
            if supervise == "content":
                start += len(self._header(messages, index, start, tools))
                closing = text.rfind("<|im_end|>", start, end)
                end = closing + len("<|im_end|>") if closing >= 0 else end
            spans.append((start, end))
        return text, spans

    def _message_span(
        self, messages: Sequence[Message], index: int, text: str, tools: Sequence[Any] | None
    ) -> tuple[int, int]:
        before = self.render(messages[:index], tools=tools) if index else ""
        after = self.render(messages[: index + 1], tools=tools)
        if not after.startswith(before) or not text.startswith(after):
            raise TemplateError(
                f"{self.name} writes message {index} differently when other messages follow, so the loss mask would "
                "not be exact. Such a template serves generation only; put {% generation %} tags into it to train"
            )
        return len(before), len(after)

    def _header(self, messages: Sequence[Message], index: int, start: int, tools: Sequence[Any] | None) -> str:
        """What precedes the content of an assistant's message."""
        one, two = [
            self.render([*messages[:index], _text_message("assistant", t)], tools=tools)[start:]
            for t in ("\ue000", "\ue001")
        ]
        same = next((i for i, (a, b) in enumerate(zip(one, two)) if a != b), 0)
        return one[:same]

    def _run(self, messages: Sequence[Message], tools: Sequence[Any] | None, prompt: bool) -> str:
        turns = [self._plain(message) for message in messages]
        self._environment.steps = MOST
        try:
            return self._template.render(messages=turns, tools=tools, documents=None, add_generation_prompt=prompt)
        except (Exception, RecursionError) as error:  # a template may raise anything
            raise TemplateError(f"{self.name} fails: {type(error).__name__}: {error}") from error

    def _plain(self, message: Message) -> dict[str, Any]:
        """A message as transformers gives it to the template; a content of texts only is one string if possible."""
        kept = {key: value for key, value in message.items() if key in ("role", "tool_calls")}
        parts = [{k: v if k in ("type", "text") else True for k, v in part.items()} for part in message["content"]]
        if self._strings and all(part["type"] == "text" for part in parts):
            return {**kept, "content": "".join([str(part["text"]) for part in parts])}
        return {**kept, "content": parts}

    def _takes_strings(self) -> bool:
        self._strings = True
        try:
            return "\ue000" in self.render([_text_message("user", "\ue000")])
        except TemplateError:
            return True


def tokens_and_labels(
    tokenizer: Tokenizer,
    text: str,
    spans: Sequence[tuple[int, int]],
    pads: Mapping[int, Sequence[int]],
    vision: set[int],
) -> tuple[np.ndarray, np.ndarray]:
    """(L,) int32 tokens and labels of a rendered conversation.

    Args:
        spans: character ranges under the loss.
        pads: id of a pad -> tokens of each image or video that it represents, in reading order.
        vision: token ids that are never under the loss.

    Raises:
        TemplateError: the template did not write every image and video once.
    """
    encoding = tokenizer.encode(text, add_special_tokens=False)
    left = {pad: list(counts) for pad, counts in pads.items()}
    tokens: list[int] = []
    labels: list[int] = []
    for token, (start, _) in zip(encoding.ids, encoding.offsets):
        count = 1
        if token in left:
            if not left[token]:
                raise TemplateError("the chat template writes more images or videos than the sample has")
            count = left[token].pop(0)
        inside = token not in vision and any(a <= start < b for a, b in spans)
        tokens += [token] * count
        labels += [token if inside else IGNORE] * count
    if any(left.values()):
        raise TemplateError("the chat template leaves out images or videos of the sample")
    return np.asarray(tokens, dtype=np.int32), np.asarray(labels, dtype=np.int32)


def _text_message(role: str, text: str) -> Message:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _take_marks(marked: str) -> tuple[str, list[tuple[int, int]]]:
    text = ""
    spans: list[tuple[int, int]] = []
    for number, piece in enumerate(re.split(f"[{OPEN}{CLOSE}]", marked)):
        if number % 2:
            spans.append((len(text), len(text) + len(piece)))
        text += piece
    return text, spans


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: marks the text that the assistant wrote."""

    tags = {"generation"}

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return OPEN + caller() + CLOSE


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja's sandbox, in which a short template cannot make a huge text or number, or loop for ever, either.

    Attributes:
        steps: steps of loops that the current rendering may still take.
    """

    intercepted_binops = frozenset(["*", "**", "+"])
    steps = MOST

    def bounded(self, source: str) -> jinja2.nodes.Template:
        """The syntax tree of a template whose loops are counted and whose concatenated texts are measured."""
        tree = self.parse(source)
        for loop in tree.find_all(jinja2.nodes.For):
            loop.iter = jinja2.nodes.Filter(loop.iter, "_counted", [], [], None, None, lineno=loop.lineno)
        for text in tree.find_all(jinja2.nodes.Concat):
            text.nodes = [
                jinja2.nodes.Filter(n, "_measured", [], [], None, None, lineno=text.lineno) for n in text.nodes
            ]
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        texts = [isinstance(v, (str, bytes, list, tuple)) for v in (left, right)]
        sizes = [len(v) if text else abs(v) for v, text in zip((left, right), texts, strict=True)]
        most = sum(sizes) if operator == "+" else sizes[0] * sizes[1] if operator == "*" else 0
        if operator == "**":
            most = sizes[0] ** min(sizes[1], 100)
        if most > MOST and (any(texts) or operator != "+"):
            raise jinja2.exceptions.SecurityError(f"the result of {operator} is too large")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, called: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(called, "__self__", None)
        if isinstance(owner, str) and called.__name__ in ("replace", "join"):
            _check_sizes(owner, *args)
        _check_numbers(*args, *kwargs.values())
        return super().call(context, called, *args, **kwargs)

    def counted(self, values: Iterable[Any]) -> Iterator[Any]:
        """The values of a loop; raises SecurityError after MOST steps of all loops of a rendering."""
        for value in values:
            self.steps -= 1
            if self.steps < 0:
                raise jinja2.exceptions.SecurityError(f"its loops take more than {MOST} steps")
            yield value


def _check_numbers(*values: Any) -> None:
    if any(isinstance(value, int) and abs(value) > MOST for value in values):
        raise jinja2.exceptions.SecurityError(f"a function is called with a number above {MOST}")


def _check_sizes(*values: Any) -> None:
    sizes = [len(value) for value in values if isinstance(value, (str, list, tuple))]
    if math.prod(sizes) > 10 * MOST:
        raise jinja2.exceptions.SecurityError("replace or join would make a text that is too large")


def _bounded(function: Callable[..., str], *args: Any, **kwargs: Any) -> str:
    _check_numbers(*args, *kwargs.values())
    return function(*args, **kwargs)


def _measured(value: Any) -> str:
    text = str(value)
    if len(text) > MOST:
        raise jinja2.exceptions.SecurityError(f"a text has more than {MOST} characters")
    return text


def _environment() -> _Sandbox:
    """The environment of transformers' `apply_chat_template`."""
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment.filters["tojson"] = tojson
    for name in ("center", "indent", "wordwrap"):
        environment.filters[name] = functools.partial(_bounded, environment.filters[name])
    environment.filters["_counted"] = environment.counted
    environment.filters["_measured"] = _measured
    del environment.globals["lipsum"]
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
