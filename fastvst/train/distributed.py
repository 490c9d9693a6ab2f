"""Distributed setup: rank, device, FSDP2/HSDP sharding.

A run is one process without a launcher, or N processes under torchrun. The model is sharded over all ranks (FSDP2), or
within each node and replicated between nodes (HSDP). Gradients are summed over ranks, not averaged: the loss is already
divided by the target weight of the whole global batch.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from fastvst.config import check_at_least, check_positive, not_an_option
from fastvst.train.cores import Cores
from fastvst_kernels.shared.tensors import send

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ParallelError(RuntimeError):
    """The requested processes or devices are not available; the message says what to pass instead."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the run is distributed over devices.

    Attributes:
        device: "auto" = the GPU if there is one.
        dtype: compute dtype ("auto" = bfloat16 on a GPU, else float32); optimizer.state has that of the weights.
        replicas: copies of the model (HSDP); 0 = one per node, so that weights are gathered within a node only.
        reshard: free the gathered weights after the forward pass (less memory, one more all-gather per block).
        threads: CPU threads of torch in each process; 0 = OMP_NUM_THREADS, or the process's share of the cores, less
            what other processes use (`fastvst.train.cores`). No core is reserved for loader workers: the default
            run's worker is busy a quarter of the time, and with 2 threads on 2 cores the run is 1.5 times as fast as
            with 1.
        timeout: seconds that a collective waits for the slowest rank.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    replicas: int = 0
    reshard: bool = not_an_option(True)
    threads: int = 0
    timeout: float = not_an_option(600.0)

    def __post_init__(self) -> None:
        check_at_least(0, replicas=self.replicas, threads=self.threads)
        check_positive(timeout=self.timeout)


@dataclass(frozen=True)
class World:
    """This process and the others of the run.

    Attributes:
        rank: of this process.
        size: number of processes.
        local_rank: rank among the processes of this node.
        local_size: number of processes of this node.
        device: of the model.
        dtype: compute dtype.
        mesh: the mesh to shard over, or None when the model is a plain module (one process, weights in the compute
            dtype float32).
        store: key-value store that all ranks share, or None for one process.
        host: address of rank 0's node.
        cores: chooses the CPU threads of this process; none = they stay as they are.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    dtype: torch.dtype
    mesh: DeviceMesh | None
    store: dist.Store | None
    host: str
    cores: Cores | None = None

    def use_free_cores(self) -> None:
        """Adapt the number of CPU threads to what else runs here; once a step."""
        if self.cores is not None:
            self.cores.adapt()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over all ranks, in place, and return it; does not wait for the device."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_of(self, values: Sequence[float]) -> Tensor:
        """(n,) float64 on the device: the sum of each of the host's values over all ranks."""
        return self.sum(send(torch.tensor(values, dtype=torch.float64), self.device))

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def say(self, *lines: object) -> None:
        """Print the lines on rank 0."""
        if self.is_main and lines:
            print(*lines, sep="\n", flush=True)

    def once_per_node(self, key: str, make: Callable[[], str]) -> str:
        """The result of `make`, which runs in the first process of this node while the node's other processes wait."""
        if self.store is None:
            return make()
        place = f"{key}/{self.rank // self.local_size}"
        if self.local_rank == 0:
            self.store.set(place, make())
        return self.store.get(place).decode()

    def describe(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        shape = "not sharded" if self.mesh is None else f"sharded over {tuple(self.mesh.shape)}"
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        return f"{self.size} process(es) on {name}, {str(self.dtype).removeprefix('torch.')}, {shape}{threads}"


def start(
    config: ParallelConfig, *, environment: Mapping[str, str] | None = None, weights: torch.dtype = torch.float32
) -> World:
    """Join the other processes of the run.

    Args:
        weights: dtype of the weights between steps.
        environment: the variables of torchrun (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR,
            MASTER_PORT); default `os.environ`. Without RANK the run has one process. INIT_FILE, a path on a shared
            disk, replaces MASTER_ADDR and MASTER_PORT.

    Raises:
        ParallelError: no GPU, more processes than GPUs, a port in use, or replicas that do not divide the ranks.
    """
    env = os.environ if environment is None else environment
    rank = int(env.get("RANK", 0))
    size = int(env.get("WORLD_SIZE", 1))
    local_rank = int(env.get("LOCAL_RANK", 0))
    local_size = int(env.get("LOCAL_WORLD_SIZE", size))
    device = pick_device(config.device, local_rank, local_size)
    name = config.dtype if config.dtype != "auto" else ("bfloat16" if device.type == "cuda" else "float32")
    cores = _cores(config, env, local_size, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = False  # float32 means float32; bfloat16 is unaffected

    store = mesh = None
    replicas = config.replicas or max(1, size // local_size)
    if size > 1:
        check_replicas(replicas, size)  # before ranks connect: one that leaves then breaks the connection of another
        store = _rendezvous(env, rank, size, config.timeout)
    if size > 1 or {DTYPES[name], weights} != {torch.float32}:
        # A single process shards over itself: FSDP2 then only casts the weights to the compute dtype, block by block.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=dist.HashStore() if store is None else dist.PrefixStore("group", store),
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=config.timeout),
        )
        mesh = make_mesh(device.type, size, replicas)
    host = env.get("MASTER_ADDR", "127.0.0.1")
    return World(rank, size, local_rank, local_size, device, DTYPES[name], mesh, store, host, cores)


def _cores(config: ParallelConfig, env: Mapping[str, str], local_size: int, device: torch.device) -> Cores:
    """The threads of the configuration, else OMP_NUM_THREADS, else this process's share of the cores that are free.

    torchrun sets OMP_NUM_THREADS to 1 for several processes on a node if the user has not set it, which is no choice.
    """
    chosen = env.get("OMP_NUM_THREADS", "")
    by_torchrun = chosen == "1" and local_size > 1 and "TORCHELASTIC_RUN_ID" in env
    asked = config.threads or (int(chosen) if chosen.isdigit() and not by_torchrun else 0)
    cores = len(os.sched_getaffinity(0))
    share = asked or max(1, cores // local_size)
    # /proc/stat counts all cores of the machine: with a part of them, what is free there is not free here.
    return Cores(share, cores, fixed=asked > 0 or device.type == "cuda" or cores != os.cpu_count())


def stop(world: World) -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def pick_device(wanted: str, local_rank: int = 0, local_size: int = 1) -> torch.device:
    """The device of this process. Raises ParallelError if a GPU is requested and there is none."""
    available = torch.cuda.is_available()
    if wanted == "cpu" or (wanted == "auto" and not available):
        return torch.device("cpu")
    if not available:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        raise ParallelError(
            f"parallel.device is 'cuda', but torch {torch.__version__} ({built}) finds no GPU. Pass --parallel.device "
            "cpu, or check nvidia-smi and install a CUDA build of torch"
        )
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ParallelError(
            f"{local_size} processes were started on this node, which has {count} GPU(s); pass --nproc-per-node "
            f"{count} to torchrun"
        )
    return torch.device("cuda", local_rank)


def make_mesh(device_type: str, size: int, replicas: int) -> DeviceMesh:
    """1-D mesh of all ranks, or a 2-D mesh (replicas, ranks per replica) whose last axis is sharded."""
    if replicas <= 1:
        return init_device_mesh(device_type, (size,), mesh_dim_names=("shard",))
    check_replicas(replicas, size)
    return init_device_mesh(device_type, (replicas, size // replicas), mesh_dim_names=("replicate", "shard"))


def check_replicas(replicas: int, size: int) -> None:
    """Raises ParallelError if `replicas` does not divide the number of processes."""
    if size % replicas:
        raise ParallelError(f"parallel.replicas is {replicas}, which does not divide {size} processes")


def place(source: nn.Module | None, skeleton: Any, world: World, *, reshard: bool = True) -> Any:
    """The model on its device, sharded over the mesh, with the weights of rank 0.

    Every pack goes through the vision tower, even without images: the collectives of all ranks must match, and the
    optimizer must see the same gradients (zeros, not None) for any number of ranks.

    Args:
        source: the whole model on the CPU of rank 0; None on the other ranks.
        skeleton: the same model on the meta device, with requires_grad set.

    Returns:
        The skeleton, sharded and with weights. Without a mesh: `source` on the device, with the skeleton's
        requires_grad.
    """
    if world.mesh is None:
        assert source is not None
        for ours, theirs in zip(source.parameters(), skeleton.parameters(), strict=True):
            ours.requires_grad_(theirs.requires_grad)
        model: Any = source.to(world.device)
        model.vision_on_every_rank = True
        return model
    shard(skeleton, world, reshard=reshard)
    skeleton.to_empty(device=world.device)
    skeleton.vision_on_every_rank = True
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=world.size > 1)
    # By parameter, not by published name: sharded parameters have no views of their published parts.
    whole: dict[str, Any] = {} if source is None else {name: p.detach() for name, p in source.named_parameters()}
    set_model_state_dict(skeleton, whole, options=options)
    return skeleton


def shard(model: Any, world: World, *, reshard: bool = True) -> None:
    """Shard the model over `world.mesh`, in place: vision blocks, merger, decoder blocks, then the rest as the root.

    Afterwards parameters are DTensors and gradients sum over ranks. Does nothing without a mesh.
    """
    if world.mesh is None:
        return
    # Inputs are not cast: the blocks need the rotary tables in float32.
    policy = MixedPrecisionPolicy(
        param_dtype=None if {p.dtype for p in model.parameters()} == {world.dtype} else world.dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    parts: list[nn.Module] = [*model.visual.blocks, model.visual.merger, *model.model.layers]
    for module in parts:
        fully_shard(module, mesh=world.mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=world.mesh, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum


def _rendezvous(env: Mapping[str, str], rank: int, size: int, timeout: float) -> dist.Store:
    if "INIT_FILE" in env:
        return dist.FileStore(env["INIT_FILE"], size)
    missing = " and ".join(k for k in ("MASTER_ADDR", "MASTER_PORT") if k not in env)
    if missing:
        raise ParallelError(f"WORLD_SIZE is {size}, but {missing} is not set; start the run with torchrun")
    host = env["MASTER_ADDR"]
    port = int(env["MASTER_PORT"])
    # Under torchrun its agent process may serve the store; otherwise rank 0 serves it.
    serves = rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        return dist.TCPStore(host, port, size, serves, datetime.timedelta(seconds=timeout), wait_for_workers=False)
    except dist.DistNetworkError as error:
        if serves and "EADDRINUSE" in str(error):
            raise ParallelError(
                f"port {port} on {host} is used by another program; pass another one (torchrun --master-port "
                f"{port + 1}), or omit the option on a single node: torchrun then chooses a free port"
            ) from None
        raise ParallelError(f"rank {rank} cannot reach rank 0 at {host}:{port}: {error}") from None
