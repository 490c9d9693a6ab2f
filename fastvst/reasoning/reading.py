"""What the names in a trace stand for: objects, marked points, images and cameras of the question."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal

from fastvst.data.sample import Sample
from fastvst.reasoning import geometric
from fastvst.scenes.scene import Scene
from fastvst.tasks.common import TaskConfig, prose

CONFIG = TaskConfig()
Verdict = Literal["true", "false", "unknown", "ambiguous", "unreadable", "plain", "repeated"]


class NoClaim(Exception):
    """A sentence that fits a template and yet makes no claim that can be checked; `verdict` says why."""

    def __init__(self, verdict: Verdict):
        super().__init__(verdict)
        self.verdict = verdict


class Reading:
    """The state of reading one trace: what names stand for, and which image the last description was about.

    Attributes:
        views: indices of the views of the question's images, in order.
        view: index of the view that is described; None as long as a trace about two images has named none.
        points: name of a marked point, in lower case -> u, v (pixels), depth (metres).
        titles: name that the question gives an object, in lower case -> its id.
    """

    def __init__(self, scene: Scene, sample: Sample):
        meta = sample.metadata
        self.scene = scene
        self.meta = meta
        if "frames" in meta or not {"view", "views"} & meta.keys():
            raise ValueError(f"{sample.id}: traces are read about one or two images; this row has {sorted(meta)}")
        self.views: list[int] = list(meta["views"]) if "views" in meta else [meta["view"]]
        self.view = self.views[0] if len(self.views) == 1 else None
        self.points = {geometric.point_name(p[3]).lower(): p[:3] for p in meta.get("points", [])}
        self.titles: dict[str, int] = {}
        titles = [(meta.get("titles", []), meta.get("objects", []))]
        titles += [(geometric.box_names(sample), meta["objects"])] if "distances" in meta else []
        for names, ids in titles:
            for name, i in zip(names, ids, strict=False):
                self.titles |= {name.lower(): i, prose(name).lower(): i}
        self._names: dict[int, dict[str, set[int]]] = {}

    def described(self) -> int:
        """The view that is described. Raises NoClaim if none is."""
        if self.view is None:
            raise NoClaim("unreadable")
        return self.view

    def pair(self) -> list[int]:
        """The two views of the question. Raises NoClaim if it has one image."""
        if len(self.views) != 2:
            raise NoClaim("unreadable")
        return self.views

    def camera(self, k: int) -> int:
        """The view of an image that is named by its number, from 1."""
        if k > len(self.views):
            raise NoClaim("unreadable")
        return self.views[k - 1]

    def fitting(self, name: str, view: int) -> set[int]:
        """Ids of the objects in a view that a class name describes: "chair" describes an office chair, too."""
        if view not in self._names:
            names: dict[str, set[int]] = {}
            for s in self.scene.views[view].sightings:
                if s.pixels >= CONFIG.ghost_pixels:
                    for each in names_of(self.scene.object(s.object_id).name):
                        names.setdefault(each, set()).add(s.object_id)
            self._names[view] = names
        return self._names[view].get(name, set())

    def thing(self, text: str, views: Iterable[int] | None = None) -> int:
        """Id of the object that a name stands for: a title of the question, or the only such object in these views.

        Args:
            views: None is the view that is described.

        Raises:
            NoClaim: there is none ("unknown"), or there are several ("ambiguous").
        """
        name = bare(text)
        if name in self.titles:
            return self.titles[name]
        return only(*(self.fitting(name, v) for v in ([self.described()] if views is None else views)))

    def shared(self, text: str) -> int:
        """Id of the object that a name stands for in both images; of the one that shows it if the other does not."""
        first, second = (self.fitting(bare(text), v) for v in self.pair())
        if len(first) > 1 or len(second) > 1:
            raise NoClaim("ambiguous")
        return only(first or second)

    def point(self, text: str) -> Any:
        """u, v (pixels) and depth (metres) of a marked point."""
        name = bare(text)
        if name not in self.points:
            raise NoClaim("unknown")
        return self.points[name]

    def place(self, here: str) -> int | dict[str, int]:
        """An object's id, or {"camera": view}."""
        for k in (1, 2):
            if here == geometric.CAMERA.format(k=k):
                return {"camera": self.camera(k)}
        return self.thing(here, self.views)


def only(*found: set[int]) -> int:
    ids = set().union(*found)
    if len(ids) != 1:
        raise NoClaim("ambiguous" if ids else "unknown")
    return ids.pop()


def names_of(name: str) -> set[str]:
    """What an object of a class can be called: "office chair", "chair"; "books", "stack of books"."""
    words = name.lower().split()
    ends = {" ".join(words[k:]) for k in range(len(words))}
    return ends | {prose(end) for end in ends}


def bare(text: str) -> str:
    """A name in lower case, without its article."""
    return re.sub(r"^(?:the|an?)\s+", "", text.strip().lower())


def listed_names(text: str) -> list[str]:
    """ "a, b and c" as its items."""
    return re.split(r", | and ", text)


def number(text: str) -> int | float:
    return float(text) if "." in text else int(text)
