"""DeepSpeed ZeRO 0 to 3 as an ``Engine``. The only file that imports deepspeed.

DeepSpeed is told nothing of the mesh: it takes all ranks for data-parallel ones and shards over
all of them. The loss carries the factor that makes its mean the wanted sum, which is exact at
every stage; telling it of sequence parallelism is not.
"""

from __future__ import annotations

import io
import logging
import math
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, redirect_stdout
from functools import partial
from typing import Any

import torch
from torch import nn

# DeepSpeed sets its logger to INFO while it is imported, so a level set before or after would miss
# some of its lines; a filter holds. Its collectives use names that torch is about to retire.
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module=r"(deepspeed|torch\.distributed)")

import deepspeed  # noqa: E402
import deepspeed.comm  # noqa: E402
import deepspeed.ops  # noqa: E402
import deepspeed.runtime.zero.parameter_offload as parameter_offload  # noqa: E402
from deepspeed.accelerator import get_accelerator  # noqa: E402
from deepspeed.utils import set_z3_leaf_module  # noqa: E402

from ringworld_model.mlp import SwiGLU  # noqa: E402
from ringworld_workers.checkpoint.layout import OptimizerState  # noqa: E402
from ringworld_workers.engine.base import (  # noqa: E402
    Fill,
    OwnedRange,
    clip_gradients,
    ensure_moments,
    evaluating,
    even_shares,
    has_moments,
    ranges_of,
    read_optimizer_state,
    write_optimizer_state,
)
from ringworld_workers.engine.config import EngineConfig  # noqa: E402
from ringworld_workers.engine.deepspeed_state import (  # noqa: E402
    refresh_copies,
    zero_fragments,
    zero_owners,
)
from ringworld_workers.engine.parameter_groups import make_optimizer, split_parameters  # noqa: E402
from ringworld_workers.engine.weights import copy_weights, materialise  # noqa: E402
from ringworld_workers.mesh import Mesh  # noqa: E402

log = logging.getLogger(__name__)

_BUCKET_ELEMENTS = 200_000_000
_HOST = {"device": "cpu", "pin_memory": True}


class DeepSpeedEngine:
    """Implements ``Engine``; see there for what the methods promise."""

    def __init__(self, model: nn.Module, config: EngineConfig, mesh: Mesh) -> None:
        """Take over ``model`` and shard it. A collective.

        DeepSpeed gets zeros, which at stage 3 it cuts up parameter by parameter. Weights come into
        the fp32 masters afterwards: exactly, and by the share that this rank has of them.
        """
        self._config, self._mesh = config, mesh
        self._zero_stage = config.zero_stage
        self.loss_factor = float(mesh.world_size * config.accumulation)
        self._num_backwards = 0
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        # Told apart by their shapes, which a shard has not.
        groups = split_parameters(model, config.optimizer)
        given = {name: p.detach() for name, p in model.named_parameters() if not p.is_meta}
        settings = deepspeed_config(config, sum(p.numel() for p in model.parameters()))
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        _prepare_process(mesh)
        with redirect_stdout(io.StringIO()) as said:  # some of its classes print memory use
            if self._zero_stage == 3:
                _gather_whole(model)
                materialise(model, dtype, mesh.device, then=_partitioner(settings))
            else:
                materialise(model, dtype, mesh.device)
            self._optimizer = make_optimizer(
                [group.in_module(model) for group in groups],
                config.optimizer,
                config.learning_rate,
                on_host=config.optimizer_offload,
            )
            self._engine, *_ = deepspeed.initialize(
                model=model, optimizer=self._optimizer, config=settings
            )
        log.debug("deepspeed: %s", said.getvalue())
        self.module: nn.Module = self._engine.module
        if given:
            self.load_ranges(partial(copy_weights, given.items()), None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward."""
        return self._engine(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Add one micro-batch's gradients; stages 2 and 3 reduce them now."""
        accumulation = self._config.accumulation
        if self._num_backwards == accumulation:
            raise RuntimeError(
                f"backward was called more than accumulation={accumulation} times before step"
            )
        self._engine.backward(loss)
        self._num_backwards += 1
        if self._num_backwards < accumulation:
            # DeepSpeed counts micro-batches by its step calls; short of the last, it only counts.
            self._engine.step()

    def step(self) -> float:
        """Clip and update; returns the global gradient norm before clipping."""
        if self._num_backwards != self._config.accumulation:
            raise RuntimeError(
                f"step after {self._num_backwards} backward calls; this stage accumulates "
                f"{self._config.accumulation}"
            )
        self._num_backwards = 0
        if self._zero_stage == 0:
            return self._replicated_step()
        self._engine.step()
        # Recomputation stops inside a forward call, so the modules around that point never leave
        # the stack on which ZeRO-3 notes who is being called: its bottom is the whole model.
        del parameter_offload.FWD_MODULE_STACK[1:]
        return float(self._engine.get_global_grad_norm())

    def _replicated_step(self) -> float:
        """Stage 0 reports no norm, and would apply a broken gradient: clip and judge it here."""
        norm = clip_gradients(self.module.parameters(), self._config.optimizer.clip_norm)
        if not math.isfinite(norm):
            self._engine.zero_grad()
        self._engine.step()
        return norm

    def set_learning_rate(self, value: float) -> None:
        """Use this rate in every group from the next step on."""
        for group in self._optimizer.param_groups:
            group["lr"] = value

    def _owners(self) -> list[torch.Tensor]:
        owners = zero_owners(self.module, self._engine.optimizer, self._zero_stage)
        ensure_moments(self._optimizer, owners)
        return owners

    def owned_ranges(self) -> list[OwnedRange]:
        """What ZeRO holds here; at stage 0, where all is replicated, an even share."""
        self._owners()
        fragments = zero_fragments(self.module, self._engine.optimizer, self._zero_stage)
        if self._zero_stage == 0:
            fragments = even_shares(fragments, self._mesh.rank, self._mesh.world_size)
        return ranges_of(fragments, self._optimizer, has_moments(self._optimizer))

    def optimizer_state(self) -> OptimizerState:
        """Step count and group hyper-parameters."""
        return read_optimizer_state(self._optimizer, self._owners())

    def load_ranges(self, fill: Fill, optimizer: OptimizerState | None) -> None:
        """Fill in what this rank holds, then refresh the weights of all ranks."""
        owners = self._owners()
        fragments = zero_fragments(self.module, self._engine.optimizer, self._zero_stage)
        moments = optimizer is not None and has_moments(self._optimizer)
        fill(ranges_of(fragments, self._optimizer, moments))
        write_optimizer_state(self._optimizer, owners, optimizer)
        refresh_copies(self._engine.optimizer, self._zero_stage)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and whole shape of every parameter."""
        return dict(self._shapes)

    def evaluate(self) -> AbstractContextManager[None]:
        """Forward without gradients."""
        return evaluating(self._engine)

    def close(self) -> None:
        """Free the engine. The process cannot hold another one afterwards: stage 3 leaves torch
        functions patched, and DeepSpeed's groups outlive it.
        """
        self._engine.destroy()
        self._optimizer.state.clear()


def deepspeed_config(config: EngineConfig, num_elements: int) -> dict[str, Any]:
    """DeepSpeed's configuration; what it would default surprisingly is set.

    Args:
        config: the stage.
        num_elements: parameters of the model; bounds the communication buckets, whose default
            size takes gigabytes however small the model is.
    """
    bucket = max(1, min(_BUCKET_ELEMENTS, num_elements))
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # only counted; batches are made elsewhere
        "gradient_accumulation_steps": config.accumulation,
        # Left out, DeepSpeed clips at 1.0. At stage 0 the engine above clips.
        "gradient_clipping": config.optimizer.clip_norm if config.zero_stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": config.zero_stage, "reduce_bucket_size": bucket},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    if config.optimizer_offload:
        # Its own CPU Adam wants a compiler on every machine; torch's fused one is compiled already.
        settings["zero_force_ds_cpu_optimizer"] = False
        settings["zero_optimization"]["offload_optimizer"] = _HOST
    if config.parameter_offload:
        # Left out, it keeps what it has gathered up to a thousand million parameters.
        settings["zero_optimization"] |= {
            "offload_param": _HOST,
            "stage3_max_live_parameters": _BUCKET_ELEMENTS,
            "stage3_max_reuse_distance": _BUCKET_ELEMENTS,
        }
    if config.precision == "bf16":
        settings["bf16"] = {"enabled": True}
        # A ring's ranks hold parts of one gradient: they are added up in fp32.
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["communication_data_type"] = "fp32"
    return settings


def _partitioner(settings: dict[str, Any]) -> Callable[[nn.Parameter], None]:
    """Keeps of a parameter only this rank's shard, as ``deepspeed.initialize`` would do later."""
    # As it also does: a process group that exists is taken.
    deepspeed.init_distributed(get_accelerator().communication_backend_name())
    first: list[Any] = []

    def partition(parameter: nn.Parameter) -> None:
        if first:
            first[0].convert_to_zero_parameters(param_list=[parameter])
        else:
            deepspeed.zero.Init(nn.ParameterList([parameter]), config_dict_or_path=settings)
            first.append(parameter)

    return partition


def _gather_whole(model: nn.Module) -> None:
    """Have stage 3 gather a tiled MLP's three weights for the one call that uses them in turns."""
    for module in model.modules():
        if isinstance(module, SwiGLU) and module.tile_tokens is not None:
            set_z3_leaf_module(module, True)


def _prepare_process(mesh: Mesh) -> None:
    """Make DeepSpeed take the process group that exists, and compile nothing."""
    # Else its communication compiles a shared-memory all-reduce on a CPU: over a minute, fatal
    # without a compiler, and a killed build leaves a lock that hangs the next one. Nobody else asks
    # this table of ops that could be compiled, and to fill it DeepSpeed runs the compiler too.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    # The one thing that DeepSpeed takes from a launcher although a process group exists: which of
    # the devices that this process sees is its own.
    os.environ["LOCAL_RANK"] = str(mesh.device.index or 0)
