"""IsolatedProcessor: a Processor whose decoders run in a process of their own.

A decoder is a large program in C, and its input comes from strangers. Where it crashes or hangs, its process is
replaced and the sample is rejected ("worker_died", "worker_hung"), as in a worker of the training loader. `fastvst data
check`, `generate`, `evaluate`, the evaluation during training and the prompts of reinforcement learning measure and
encode with it, and the planner measures videos with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from PIL import Image, ImageFile

from fastvst.batch import Cost, EncodedSample
from fastvst.data.file_range import VideoFrame
from fastvst.data.ledger import SampleError
from fastvst.data.processor import Processor, TokenizedSample
from fastvst.data.sample import Sample
from fastvst.helper import Helper, HelperLost

T = TypeVar("T")
MEDIA = ("image", "video")  # kinds of parts


class IsolatedProcessor(Processor):
    """The results of `plain`, from another process for samples with images or videos; text is encoded here.

    Attributes:
        plain: the processor that does the work.
        kinds: kinds of parts whose samples are sent to the other process. An image that is a frame of a video file
            always is.
        helper: the other process.
    """

    def __init__(self, plain: Processor, kinds: Sequence[str] = MEDIA, helper: Helper | None = None) -> None:
        super().__init__(plain.tokenizer, plain.model_config, plain.config, plain.files)
        self.plain = plain
        self.kinds = tuple(kinds)
        self.helper = helper or Helper(plain)

    def with_uint8_patches(self) -> IsolatedProcessor:
        """As `Processor.with_uint8_patches`."""
        return IsolatedProcessor(self.plain.with_uint8_patches(), self.kinds)

    def measure(self, sample: Sample, *, add_generation_prompt: bool = False) -> Cost:
        """As `Processor.measure`; raises SampleError also where its process is lost."""
        return self.do(self.plain.measure, sample, add_generation_prompt=add_generation_prompt)

    def inspect(self, sample: Sample, *, add_generation_prompt: bool = False) -> TokenizedSample:
        """As `Processor.inspect`; raises SampleError also where its process is lost."""
        return self.do(self.plain.inspect, sample, add_generation_prompt=add_generation_prompt)

    def encode(self, sample: Sample, *, add_generation_prompt: bool = False) -> EncodedSample:
        """As `Processor.encode`; raises SampleError also where its process is lost."""
        return self.do(self.plain.encode, sample, add_generation_prompt=add_generation_prompt)

    def do(self, function: Callable[..., T], sample: Sample, **kwargs: Any) -> T:
        """`function(sample, **kwargs)`, in the other process if a decoder works for it. Raises as `call`."""
        parts = [(kind, one) for kind in MEDIA for part in sample.parts(kind) for one in _each(part[kind])]
        media = [one for kind, one in parts if kind in self.kinds or isinstance(one, VideoFrame)]
        # Pickling would decode an image that the caller has opened.
        opened = any(isinstance(one, ImageFile.ImageFile) for one in media)
        if opened or all(isinstance(one, Image.Image) for one in media):
            return function(sample, **kwargs)
        return self.call(function, sample, **kwargs)

    def call(self, function: Callable[..., T], sample: Sample, *args: Any, **kwargs: Any) -> T:
        """`function(sample, *args, **kwargs)` in the other process, whatever the sample holds.

        Raises:
            SampleError: the process was lost.
        """
        sent = dataclasses.replace(sample, row=None)  # the row as it was read holds the media once more
        try:
            return self.helper.call(function, sent, *args, **kwargs)
        except HelperLost as lost:
            raise SampleError(lost.reason, sample.source, sample.id, lost.detail) from lost

    def __enter__(self) -> IsolatedProcessor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process; another use starts one again."""
        self.helper.close()


def _each(media: Any) -> Sequence[Any]:
    """The images of a list of frames, or the one medium."""
    return media if isinstance(media, (list, tuple)) else (media,)


def isolate(processor: Any, kinds: Sequence[str] = MEDIA) -> Any:
    """An IsolatedProcessor for a Processor that is not one; anything else as it is."""
    if isinstance(processor, Processor) and not isinstance(processor, IsolatedProcessor):
        return IsolatedProcessor(processor, kinds)
    return processor


@contextmanager
def isolated(processor: Processor) -> Iterator[IsolatedProcessor]:
    """`processor` with its decoders in another process, which ends with the block; an isolated one as it is."""
    if isinstance(processor, IsolatedProcessor):
        yield processor
        return
    with IsolatedProcessor(processor) as found:
        yield found
