"""`fastvst chat --model DIR` and `fastvst generate --model DIR --input FILE --output FILE`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvst.cli.data import add_source_arguments, source_of
from fastvst.cli.generate_rows import describe, generate_file
from fastvst.data.sample import Message, Part, Sample
from fastvst.evaluate.boxes_2d import boxes_2d
from fastvst.rollout.request import RolloutError, SamplingParams

if TYPE_CHECKING:
    from fastvst.data.processor import Processor
    from fastvst.rollout.engine import Engine

BASE_WIDTH = 960
BASE_HFOV = 69.16  # degrees; the virtual camera of VST (arXiv 2511.05491), used if the prompt names no camera
HELP = "/image PATH  /video PATH  /think on|off  /reset  /quit; a line ends a message"


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fastvst chat`."""
    _add_model_arguments(parser)
    parser.add_argument("--think", action="store_true", help="start with the thinking prompt")
    parser.add_argument("--out", default="chat", help="folder for images with drawn boxes (default: chat)")


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fastvst generate`."""
    _add_model_arguments(parser)
    parser.add_argument("--input", required=True, help="rows in any format that training reads, e.g. JSON Lines")
    parser.add_argument("--output", required=True, help="JSON Lines in the order of the rows; a stopped run resumes")
    add_source_arguments(parser)
    parser.add_argument("--n", type=int, default=1, help="answers per prompt")
    parser.add_argument("--batch", type=int, default=256, help="answers decoded together")


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="Hugging Face directory, as training writes it")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the most likely token")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling; 1 (default) keeps all tokens")
    parser.add_argument("--max-tokens", type=int, default=1024, help="longest answer in tokens")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")


def load(arguments: argparse.Namespace, **options: Any) -> Engine:
    """The engine of a model directory: float32 on the CPU, bfloat16 on a GPU."""
    import torch

    from fastvst.data.processor import Processor
    from fastvst.model import Qwen25VL
    from fastvst.rollout.engine import Engine

    dtype = torch.float32 if arguments.device == "cpu" else torch.bfloat16
    model = Qwen25VL.from_pretrained(arguments.model, dtype=dtype, device=arguments.device)
    return Engine(model, Processor.from_pretrained(arguments.model), **options)


def run_generate(arguments: argparse.Namespace) -> int:
    """Answer every row of the input that the output does not answer; returns the exit status."""
    params = SamplingParams(
        n=arguments.n,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        max_tokens=arguments.max_tokens,
        seed=arguments.seed,
    )
    source = source_of(arguments.input, arguments)
    engine = load(arguments, max_sequences=arguments.batch)
    output = Path(arguments.output)
    settings = describe(arguments.model, engine, params, arguments.input)

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        counts = generate_file(engine, source, output, params, settings, log=log)
    except RolloutError as error:  # of the checkpoint, not of the program
        raise ValueError(str(error)) from error
    print(f"{output}: {counts.answered} answered, {counts.failed} failed, {counts.skipped} were there", file=sys.stderr)
    return 0


@dataclass
class Chat:
    """A conversation: its messages, the images for the next message, the thinking mode."""

    messages: list[Message] = field(default_factory=list)
    media: list[Part] = field(default_factory=list)
    think: bool = False
    drawn: int = 0

    def sample(self) -> Sample:
        return Sample.from_messages(self.messages, id="chat", source="chat", kind="thought" if self.think else "qa")


def run_chat(arguments: argparse.Namespace) -> int:
    """Answer lines from the terminal until /quit or the end of the input."""
    params = SamplingParams(
        temperature=arguments.temperature, top_p=arguments.top_p, max_tokens=arguments.max_tokens, seed=arguments.seed
    )
    engine = load(arguments)
    state = Chat(think=arguments.think)
    print(HELP)
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if line == "/quit":
            return 0
        if line:
            converse(engine, state, line, params, Path(arguments.out), lambda text: print(text, end="", flush=True))


def converse(
    engine: Engine, state: Chat, line: str, params: SamplingParams, out: Path, write: Callable[[str], Any]
) -> None:
    """Handle one line of a chat: a command, or a message. `write` receives the answer piece by piece."""
    word, _, rest = line.partition(" ")
    if word in ("/image", "/video"):
        path = Path(rest.strip()).expanduser()
        if not path.exists():
            write(f"{path} does not exist\n")
            return
        kind = word[1:]
        state.media.append({"type": kind, kind: path})
        write(f"{path.name} goes with your next message\n")
    elif word == "/think":
        state.think = rest.strip() != "off"
        write(f"thinking is {'on' if state.think else 'off'}\n")
    elif word == "/reset":
        state.messages = []
        state.media = []
        write("forgotten\n")
    elif word.startswith("/"):
        write(HELP + "\n")
    else:
        _answer(engine, state, line, params, out, write)


def _answer(
    engine: Engine, state: Chat, line: str, params: SamplingParams, out: Path, write: Callable[[str], Any]
) -> None:
    before = list(state.messages)
    media = state.media
    content = [*media, {"type": "text", "text": line}]
    state.messages = [*before, {"role": "user", "content": content}]
    state.media = []
    pieces: list[str] = []
    try:
        for piece in engine.stream(state.sample(), params):
            pieces.append(piece)
            write(piece)
    except KeyboardInterrupt:
        write(" ...")  # the part that was written remains in the conversation
    except (ValueError, RolloutError, OSError) as error:
        write(f"{error}\n")
        state.messages = before
        state.media = []  # an unreadable image must not fail every later turn
        return
    write("\n")
    answer = "".join(pieces)
    state.messages.append({"role": "assistant", "content": [{"type": "text", "text": answer or " "}]})
    path = draw_boxes(state.messages, answer, out / f"boxes-{state.drawn}.png", processor=engine.processor)
    if path is not None:
        state.drawn += 1
        write(f"boxes drawn: {path}\n")


def draw_boxes(
    messages: Sequence[Message], answer: str, path: Path, *, processor: Processor | None = None
) -> Path | None:
    """Save the conversation's last image with the answer's 3D or 2D boxes; None without boxes or without an image.

    2D boxes are in the pixels of the image as it was resized for the model. They are drawn in the image that the user
    gave, as displayed.

    Args:
        processor: the model's processor, which tells the resized size. Without it, the size at which this process
            encoded the image last is used; an image that it did not encode has its own size.
    """
    from fastvst.data.image_modes import AS_DISPLAYED
    from fastvst.data.images import load_rgb
    from fastvst.data.vision_inputs import to_source_pixels
    from fastvst.spatial import draw
    from fastvst.spatial.boxes import parse_boxes
    from fastvst.spatial.prompts import read_camera

    images = [p["image"] for m in messages for p in m["content"] if p["type"] == "image"]
    boxes, labels = parse_boxes(answer)
    flat = boxes_2d(answer)
    if not images or not (len(boxes) or flat):
        return None
    rules = processor.config.rules if processor is not None else AS_DISPLAYED
    image = load_rgb(images[-1], max_source_pixels=1 << 28, time_limit=60.0, rules=rules).copy()
    if len(boxes):
        texts = [p["text"] for m in messages for p in m["content"] if p["type"] == "text" and m["role"] == "user"]
        camera = next((c for c in map(read_camera, reversed(texts)) if c), None)
        focal = BASE_WIDTH / 2 / math.tan(math.radians(BASE_HFOV / 2)) * image.width / BASE_WIDTH
        intrinsics = (focal, focal, image.width / 2, image.height / 2)
        if camera:  # its numbers are in the pixels of an image of its width and height
            x = image.width / camera["width"] if camera["width"] > 0 else 1.0
            y = image.height / camera["height"] if camera["height"] > 0 else 1.0
            intrinsics = (camera["fx"] * x, camera["fy"] * y, camera["cx"] * x, camera["cy"] * y)
        image = draw.boxes_3d(image, boxes, labels, intrinsics)
    source_size, size = _sizes(messages, images[-1], image.size, processor)
    for box, label in flat:
        draw.box_2d(image, to_source_pixels(box, size, source_size), "green", label)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def _sizes(
    messages: Sequence[Message], image: Any, own: tuple[int, int], processor: Processor | None
) -> tuple[tuple[int, int], tuple[int, int]]:
    """((width, height) as displayed, (width, height) as the model saw it) of the conversation's last image."""
    from fastvst.data.vision_inputs import encoded_sizes, measure_vision_inputs

    if processor is None:
        return encoded_sizes(image) or (own, own)
    inputs = measure_vision_inputs(messages, processor.config, processor.geometry)
    last = [one for one in inputs if one.frames is None][-1]
    return last.source_size, last.size
