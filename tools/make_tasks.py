"""Write docs/tasks.html: an example of every task, and of every reasoning trace with the plan of the room.

python tools/make_tasks.py            # one renderer backend always gives the same page
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from fastvst import atomic, html
from fastvst.data.gallery import STYLE, media
from fastvst.data.sample import Sample
from fastvst.generate.presets import ALL_TASKS
from fastvst.generate.rooms import RoomsConfig, scene_samples
from fastvst.reasoning import geometric, walks
from fastvst.reasoning.bev import draw_bev
from fastvst.scenes.rooms.render import open_renderer
from fastvst.scenes.rooms.shoot import ShotConfig, WalkConfig, shoot
from fastvst.scenes.scene import Scene
from fastvst.spatial import draw
from fastvst.spatial.boxes import parse_boxes
from fastvst.tasks import PAIRS, SINGLE, VST_P, WALKS, TaskConfig

PAGE = Path(__file__).parents[1] / "docs" / "tasks.html"
SEEDS = range(40, 60)
SHOTS = ShotConfig(width=448, height=336, views=2, overlap=1.0)
# The two images of a pair go below each other: next to each other their labels are too small to read.
PAIRS_BELOW = "<style>.pair{grid-template-columns:1fr}</style>"
GROUPS = {"Single image": SINGLE, "Two images": PAIRS, "Video": WALKS}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path, nargs="?", default=PAGE, help="file to write (default: docs/tasks.html)")
    target = parser.parse_args(arguments).target
    cards, thoughts = examples()
    sections = []
    for title, tasks in GROUPS.items():
        style = STYLE + PAIRS_BELOW if not sections else ""
        body = "".join(cards[task] for task in tasks)
        sections.append((f"{title}: {len(tasks)} tasks", f'{style}<div class="grid">{body}</div>'))
    body = "".join(thoughts[task] for task in geometric.TRACES)
    sections.append(("Reasoned rows: what the geometry says, and the plan of the room", body))
    lead = "One rendered example of each of the nineteen tasks, as a training row holds it. Green: the answer."
    atomic.write_text(target, html.page("fastvst: the spatial tasks", lead, sections))
    print(f"{target}: {target.stat().st_size / 1e6:.2f} MB")


def examples() -> tuple[dict[str, str], dict[str, str]]:
    """The first card of every task, and the first card of every task's reasoning, from the rooms SEEDS."""
    wanted = {*SINGLE, *PAIRS, *WALKS}
    traces = set(geometric.TRACES)
    cards: dict[str, str] = {}
    thoughts: dict[str, str] = {}
    config = RoomsConfig(shots=SHOTS, tasks=TaskConfig(easy=0.3), rows=ALL_TASKS.rows, walk=WalkConfig())
    renderer = open_renderer()
    for seed in SEEDS:
        scene = shoot(seed, renderer, SHOTS, config.walk)
        rng = np.random.default_rng(seed)
        of_this_room = 0  # at most four, so that the page shows different rooms
        for sample in scene_samples(scene, seed, config):
            task = sample.metadata["task"]
            if task not in cards and of_this_room < 4:
                cards[task] = card(sample)
                of_this_room += 1
            if task in traces and task not in thoughts:
                made = geometric.compose(scene, sample, rng)
                if made is not None:
                    thoughts[task] = thought_card(scene, made)
        if set(cards) == wanted and set(thoughts) == traces:
            return cards, thoughts
    missing = sorted((wanted - set(cards)) | (traces - set(thoughts)))
    raise SystemExit(f"make_tasks.py: no example of {missing} in rooms {SEEDS}")


def card(sample: Sample) -> str:
    """HTML of a row: the stored images, with the boxes of 3D tasks drawn in; the question without the camera text."""
    task = sample.metadata["task"]
    share = VST_P[task]
    head = f'<p class="task"><b>{task}</b> · type {escape(sample.kind)} · {share} K rows in VST-P</p>'
    shown = sample
    if sample.kind == "bbox_3d":
        shown = _with_boxes(sample)
    turns = []
    for number in range(0, len(sample.messages), 2):
        question = "".join(p["text"] for p in sample.messages[number]["content"] if p["type"] == "text")
        if sample.kind == "bbox_3d":
            question = "[camera, box format] " + question.rsplit("\n", 1)[1]
        reply = sample.messages[number + 1]["content"][0]["text"]
        turns.append(f'<p>{escape(question)}</p><p class="right">{escape(reply)}</p>')
    return f'<div class="card">{media(shown, 10**8, 330)}{head}{"".join(turns)}</div>'


def _with_boxes(sample: Sample) -> Sample:
    """The sample with its boxes drawn on the first image."""
    first = sample.parts("image")[0]["image"]
    boxes, labels = parse_boxes(sample.messages[-1]["content"][0]["text"])
    front = boxes[:, 2] > 0
    names = [label for label, ahead in zip(labels, front, strict=True) if ahead]
    image = draw.boxes_3d(first, boxes[front], names, tuple(sample.metadata["intrinsics"]))
    others = [part["image"] for part in sample.parts("image")[1:]]
    return _with_images(sample, [image, *others])


def _with_images(sample: Sample, images: list[Image.Image]) -> Sample:
    content = [{"type": "image", "image": image} for image in images]
    return Sample(sample.id, sample.source, sample.kind, [{"role": "user", "content": content}])


def thought_card(scene: Scene, sample: Sample) -> str:
    """HTML of a reasoned row: its images and the plan of the room."""
    if "frames" in sample.metadata:  # of a video only the frames that the trace describes
        keys = walks.key_frames(scene, sample)
        views = [scene.walk[k] for k in keys]
        images = [(sample.parts("video")[0]["video"][k], f"Frame {k + 1}") for k in keys]
    else:
        views = list(sample.metadata.get("views", [sample.metadata.get("view")]))
        images = [(part["image"], "") for part in sample.parts("image")]
    tags = [
        html.image_tag(image, "view", width=300, quality=80) + (f'<p class="task">{title}</p>' if title else "")
        for image, title in images
    ]
    plan = html.image_tag(draw_bev(scene, views, 440), "plan", width=440, quality=90)
    question = "".join(p["text"] for p in sample.messages[0]["content"] if p["type"] == "text")
    reply = sample.messages[-1]["content"][0]["text"]
    style = "display:grid;grid-template-columns:300px 1fr;gap:1rem;margin-bottom:1rem"
    return (
        f'<div class="card" style="{style}"><div>{"".join(tags)}</div><div><p class="task"><b>'
        f"{sample.metadata['task']}</b> · type {sample.kind}</p><p>{escape(question)}</p>"
        f'<p class="right">{escape(reply)}</p><div style="width:440px">{plan}</div></div></div>'
    )


if __name__ == "__main__":
    main()
