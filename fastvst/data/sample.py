"""Sample: one conversation with its images, before tokenisation."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Part = dict[str, Any]
Message = dict[str, Any]  # {"role": str, "content": list[Part]}

ROLES = ("system", "user", "assistant")


@dataclass
class Sample:
    """One training, evaluation or RL row. Every source yields Samples; `Processor.encode` takes them.

    Attributes:
        id: name of the row, unique within `source`; errors and the ledger contain it.
        source: data set name (a folder, a file stem or VST's `data_source`).
        kind: VST's `type` column ("bbox_3d", "depth", "thought_spatial", "video", "text", ...). It switches on the FoV
            unification ("bbox_3d") and selects the system prompt ("thought*").
        notes: keys of the row that nothing reads.
        changes: (code, detail) of every value that is written in an unusual way and was read as it was meant.
        messages: role and parts, "learn": False where the loss leaves an assistant message out, and "tools" where a
            source has written tools, calls or responses as text (see `fastvst.data.tool_turns`). A part is one of
            {"type": "text", "text": str},
            {"type": "image", "image": PIL.Image | path | encoded bytes, "min_pixels"?, "max_pixels"?,
             "resized_width"?, "resized_height"?},
            {"type": "video", "video": path | encoded bytes | list of images, "fps"?: of a list}.
        answer: the checkable form of the answer, or None. A dict with "type" ("choice", "text", "number", "boxes"),
            "value", and for some types "unit" and "tolerance".
        metadata: other JSON-able values of the row.
        row: the row as it was read, all columns; only in sources opened `with_whole_rows`, else None.
    """

    id: str
    source: str
    kind: str
    messages: list[Message]
    answer: dict[str, Any] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = field(default=(), compare=False, kw_only=True)
    changes: tuple[tuple[str, str], ...] = field(default=(), compare=False, kw_only=True)
    row: dict[str, Any] | None = field(default=None, repr=False)

    @classmethod
    def from_messages(
        cls,
        messages: list[Message],
        *,
        id: str = "0",
        source: str = "memory",
        kind: str = "qa",
        answer: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> Sample:
        """Build a sample from OpenAI-style messages; a string content becomes one text part.

        Raises:
            ValueError: an unknown role or part type, or a part without its content.
        """
        clean: list[Message] = []
        for index, message in enumerate(messages):
            role = message.get("role")
            content = message.get("content")
            if role not in ROLES:
                raise ValueError(f"{source}/{id}: message {index} has role {role!r}; expected one of {ROLES}")
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            if not isinstance(content, list):
                raise ValueError(
                    f"{source}/{id}: message {index} has content of type {type(content).__name__}; "
                    "expected a string or a list of parts"
                )
            for part in content:
                kind_of_part = part.get("type") if isinstance(part, dict) else None
                if kind_of_part not in ("text", "image", "video") or part.get(kind_of_part) is None:
                    raise ValueError(
                        f"{source}/{id}: message {index} has a part {_short(part)}; expected "
                        '{"type": "text"|"image"|"video", <that type>: ...}'
                    )
            kept: Message = {"role": role, "content": [dict(part) for part in content]}
            if message.get("learn") is False:
                kept["learn"] = False
            if message.get("tools"):
                kept["tools"] = message["tools"]
            clean.append(kept)
        return cls(str(id), source, kind, clean, answer, dict(metadata or {}))

    def parts(self, kind: str) -> list[Part]:
        """All parts of one type ("text", "image", "video") in reading order."""
        return [p for m in self.messages for p in m["content"] if p["type"] == kind]

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict; images become base64 (PNG, or the original encoded bytes). Inverse of `from_json`."""
        messages = [{**m, "content": [_part_to_json(p) for p in m["content"]]} for m in self.messages]
        return {
            "id": self.id,
            "source": self.source,
            "kind": self.kind,
            "messages": messages,
            "answer": self.answer,
            "metadata": self.metadata,
        }

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Sample:
        """Inverse of `to_json`; base64 contents become bytes."""
        messages = [{**m, "content": [_part_from_json(p) for p in m["content"]]} for m in row["messages"]]
        return cls.from_messages(
            messages,
            id=row["id"],
            source=row["source"],
            kind=row["kind"],
            answer=row.get("answer"),
            metadata=row.get("metadata"),
        )


def _short(part: Any) -> str:
    text = repr(part)
    return text if len(text) <= 120 else text[:117] + "..."


def _media_to_json(media: Any) -> Any:
    from PIL import Image  # not at the top: the engine and the kernels' benches run without Pillow

    if isinstance(media, (list, tuple)):
        return [_media_to_json(m) for m in media]
    if isinstance(media, Image.Image):
        buffer = io.BytesIO()
        media.save(buffer, format="PNG")
        media = buffer.getvalue()
    if isinstance(media, (bytes, bytearray)):
        return {"base64": base64.b64encode(bytes(media)).decode("ascii")}
    if isinstance(media, Path):
        return str(media)
    return media


def _media_from_json(media: Any) -> Any:
    if isinstance(media, list):
        return [_media_from_json(m) for m in media]
    return base64.b64decode(media["base64"]) if isinstance(media, dict) else media


def _part_to_json(part: Part) -> Part:
    return {k: _media_to_json(v) if k in ("image", "video") else v for k, v in part.items()}


def _part_from_json(part: Part) -> Part:
    return {k: _media_from_json(v) if k in ("image", "video") else v for k, v in part.items()}
