"""New weights for a vLLM server that runs: its own routes for RL, and what travels through them.

The routes exist with VLLM_SERVER_DEV_MODE=1, which also opens routes that end or read the server: on private networks
only. The order of an update is pause, start, update, finish with a version, empty the caches, resume; then the server
must name the version. Tried with vLLM 0.32 on a CPU (directory); NCCL has not been run.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastvst.model import Qwen25VL
from fastvst.model.published import layout_of, publish
from fastvst.rollout.http_call import Call, CallCancelled
from fastvst.rollout.openai_client import ServerConfig, ServerError, get_json, root_of

# vLLM keeps keys and values of prompts, and features of images by their content: of the old weights.
CACHES = ("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache")


class WeightRoutes:
    """vLLM's routes for new weights, with the four methods of its VLLMWeightSyncClient.

    Attributes:
        version: the name of the next weights, which `finish_weight_update` sends if it is given none.
        call: another thread can end what is in progress.
    """

    def __init__(self, config: ServerConfig, seconds: float) -> None:
        """`seconds`: for a whole update."""
        self.config = config
        self.seconds = seconds
        self.version = ""
        self.call = Call()
        self._end = 0.0

    def take(self, version: str, send: Callable[[], object]) -> None:
        """Let `send` bring new weights while the server is paused, and confirm that it has them.

        After an error the server samples again, from the weights that it had if `send` has changed none.

        Raises:
            ServerError: the server refuses, does not answer in time, or has other weights afterwards.
        """
        self.version = version
        self._end = time.monotonic() + self.seconds
        # Requests in progress end first. Those that nobody waits for have been cancelled by closing their connections.
        self._post("/pause?mode=wait")
        try:
            send()
            for route in CACHES:
                self._post(route)
        except BaseException:
            with contextlib.suppress(ServerError, CallCancelled):
                self._post("/resume")
            raise
        self._post("/resume")
        found = self.weight_version()
        if found != version:
            raise ServerError(f"{self.config.base_url} has the weights {found!r} after an update to {version!r}")

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._post("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        """Begin an update; one that a killed trainer has left open is ended first."""
        try:
            self._post("/start_weight_update")
        except ServerError as error:
            with contextlib.suppress(ServerError):
                self._post("/finish_weight_update")
                self._post("/start_weight_update")
                return
            raise error

    def update_weights(self, update_info: Any) -> None:
        self._post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._post("/finish_weight_update", {"weight_version": weight_version or self.version})

    def weight_version(self) -> str | None:
        """The version that the server names."""
        found = self._ask("/weight_info")
        return found.get("weight_version") if isinstance(found, dict) else None

    def world_size(self) -> int:
        """Number of the server's processes that hold weights."""
        found = self._ask("/get_world_size")
        size = found.get("world_size") if isinstance(found, dict) else None
        if not isinstance(size, int) or size < 1:
            raise ServerError(f"{self.config.base_url} says that its world size is {size!r}; expected 1 or more")
        return size

    def _post(self, route: str, body: Any = None) -> None:
        self._ask(route, {} if body is None else body)

    def _ask(self, route: str, body: Any = None) -> Any:
        left = max(1.0, self._end - time.monotonic())
        url = root_of(self.config.base_url) + route
        try:
            return get_json(self.config, url, self.call, body, timeout=left)
        except ServerError as error:
            if " answers 404" not in str(error):
                raise
            raise ServerError(
                f"{error}. Start vLLM with VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config (docs/rollout.md)"
            ) from None


def send_directory(routes: WeightRoutes, directory: str) -> None:
    """Tell a server with the backend "directory" (`fastvst.vllm_plugin`) to read a Hugging Face directory."""
    routes.start_weight_update()
    routes.update_weights({"path": directory, "version": routes.version})
    routes.finish_weight_update(routes.version)


# ----------------------------------------------------------------------------------------------------------------- NCCL


@dataclass(frozen=True)
class TensorInfo:
    """As vLLM's ParamMeta."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class PublishedWeights:
    """The tensors of a model under their published names, as vLLM's WeightSource: whole, one at a time.

    Sharded parameters are gathered when their turn comes, so all ranks must take the same steps.
    """

    def __init__(self, model: Qwen25VL, dtype: torch.dtype) -> None:
        """`dtype`: of the tensors that are sent."""
        self.model = model
        self.dtype = dtype
        self._layout = layout_of(model)
        self._pass: Iterator[tuple[str, Tensor]] | None = None

    def metadata(self) -> list[TensorInfo]:
        """What an iteration yields, without gathering anything."""
        found = []
        for name, parameter in self.model.named_parameters():  # one by one, as they are sent
            shape = {name: torch.empty(parameter.shape, device="meta")}
            parts = publish(shape, self._layout).items()
            found += [TensorInfo(published, self.dtype, tuple(tensor.shape)) for published, tensor in parts]
        return found

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self._pass = self._tensors()
        return self._pass

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            whole = parameter.detach().to(self.dtype)
            if isinstance(whole, DTensor):
                whole = whole.full_tensor()
            for published, tensor in publish({name: whole}, self._layout).items():
                yield published, tensor.contiguous()

    def finish_pass(self) -> None:
        """Take the steps that are left of the newest iteration, or all of them if there was none.

        After an error on the sending rank the other ranks still gather, and wait for it.
        """
        for _ in self if self._pass is None else self._pass:
            pass
        self._pass = None


def nccl_sender(routes: WeightRoutes, source: PublishedWeights) -> Any:
    """vLLM's own trainer end of its NCCL transfer, connected to one server. Needs the package vllm, and a GPU.

    Raises:
        ServerError: vllm is not installed, or the server does not join.
    """
    try:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
    except ImportError as error:
        raise ServerError(
            f"sampling.follow is nccl, which needs the package vllm in the trainer's environment ({error}); "
            "sampling.follow directory needs it on the servers only"
        ) from None
    address, port = free_address(routes.config.base_url)
    info = NCCLTrainerInitInfo(rank=0, master_address=address, master_port=port, world_size=1 + routes.world_size())
    return WeightTransferTrainerFactory.trainer_init(info, client=routes, source=source)


def free_address(base_url: str) -> tuple[str, int]:
    """This machine's address on the way to a server, and a free port."""
    parts = urlsplit(base_url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname or "", port), timeout=10.0) as to_server:
            host = to_server.getsockname()[0]
    except OSError as error:
        raise ServerError(f"{base_url} does not answer ({error})") from None
    with socket.create_server((host, 0)) as server:
        return host, server.getsockname()[1]
