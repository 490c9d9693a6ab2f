"""A vLLM plugin: the weight-transfer backend "directory", which reads a Hugging Face directory into a running server.

vLLM finds it by the entry point `vllm.general_plugins` of this package, which must be installed in its environment, and
uses it with --weight-transfer-config '{"backend": "directory"}'. The trainer writes one directory for each version
(`fastvst.rl.servers`) and names it through vLLM's own routes.

All of a directory is checked before the first tensor of the server changes: names, shapes and dtypes against the
server's own configuration, the sizes of the files, and that all values are finite. Tried with vLLM 0.32 on a CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

BACKEND = "directory"


def register() -> None:
    """Make the backend known to vLLM, once in a process; vLLM calls it in each of its processes."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    try:
        WeightTransferEngineFactory.register_engine(BACKEND, "fastvst.vllm_plugin", "directory_engine")
    except ValueError as error:  # vLLM calls a plugin more than once in a process
        logging.getLogger(__name__).debug("%s", error)


def read_checked(directory: str, served: dict[str, Any]) -> dict[Path, list[str]]:
    """The safetensors files of a directory and their tensors, all of which the server can take.

    Args:
        served: content of the config.json that the server has loaded.

    Raises:
        FileNotFoundError: no such directory, or no safetensors files in it; the message has the path.
        ValueError: tensors are missing, unexpected, of another shape, truncated or not finite.
    """
    import torch
    from safetensors import safe_open

    from fastvst.model import ModelConfig, Qwen25VL
    from fastvst.model.weights import check_files

    path = Path(directory)
    if not path.is_dir():
        raise FileNotFoundError(
            f"{directory} is no directory on this server; trainer and servers must see it under the same path"
        )
    with torch.device("meta"):
        model = Qwen25VL(ModelConfig.from_dict(served))
    found = check_files(path, model, tied=model.config.tie_word_embeddings)
    for file, names in found.items():
        with safe_open(file, "pt", device="cpu") as tensors:
            for name in names:
                if not torch.isfinite(tensors.get_tensor(name).sum(dtype=torch.float32)):
                    raise ValueError(f"{file}: {name} contains NaN or infinite values")
    return found


def pack_tied_head(model: nn.Module) -> None:
    """Give a tied LM head the new embedding.

    On a CPU vLLM keeps a packed copy of the LM head's weight. It makes a new copy only for layers whose own tensors
    arrive, and a tied head has none: the server would sample from the old head in silence.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def directory_engine(config: Any, vllm_config: Any, device: Any, model: Any) -> Any:
    """The worker's end of the transfer; a function, so that this module imports without vLLM."""
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )

    @dataclass
    class InitInfo(WeightTransferInitInfo):
        """Nothing has to be agreed on."""

    @dataclass
    class UpdateInfo(WeightTransferUpdateInfo):
        """The directory, and the name of its version for the log."""

        path: str
        version: str = ""

    class DirectoryEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
        """Reads all weights in `receive_weights`; the other steps have nothing to do."""

        init_info_cls = InitInfo
        update_info_cls = UpdateInfo

        def init_transfer_engine(self, init_info: InitInfo) -> None:
            pass

        def start_weight_update(self) -> None:
            pass  # nothing changes before the directory is known to be good

        def update_weights(self, update_info: dict[str, Any]) -> None:
            self.receive_weights(self.parse_update_info(update_info))

        def receive_weights(self, update_info: UpdateInfo) -> None:
            from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
            from vllm.platforms import current_platform

            served = self.model_config.hf_config
            found = read_checked(update_info.path, served.to_dict())
            initialize_layerwise_reload(self.model)
            self.model.load_weights(_tensors(found))
            finalize_layerwise_reload(self.model, self.model_config)
            if current_platform.is_cpu() and served.get_text_config().tie_word_embeddings:
                pack_tied_head(self.model)
            logging.getLogger("vllm").info("weights %s read from %s", update_info.version, update_info.path)

        def finish_weight_update(self) -> None:
            pass

        def shutdown(self) -> None:
            pass

    return DirectoryEngine(config, vllm_config, device, model)


def _tensors(found: dict[Path, list[str]]) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    for file, names in found.items():
        with safe_open(file, "pt", device="cpu") as tensors:
            for name in names:
                yield name, tensors.get_tensor(name)
