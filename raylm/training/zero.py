"""DeepSpeed: its config for a ZeRO stage, the engine around a model, whole weights out of sharded ones."""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm.models import whole_shape
from raylm.settings import TrainingSettings

if TYPE_CHECKING:
    import torch
    from deepspeed.runtime.engine import DeepSpeedEngine
    from transformers import PreTrainedModel


RATE_RATIO = "rate_ratio"
"""In a parameter group: what the learning rate is multiplied with."""


def resolve_precision(wanted: str, device: torch.device) -> str:
    """`fp32`, `bf16` or `fp16`; `auto` is bf16 on a GPU that computes in it, else fp32."""
    import torch

    if wanted != "auto":
        return wanted
    # Older GPUs emulate it, several times slower than they compute in fp32.
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "fp32"


def agreed_precision(wanted: str, device: torch.device) -> str:
    """As `resolve_precision`; fp32 where one of the workers takes that. A collective of all ranks."""
    import torch
    import torch.distributed as dist

    precision = resolve_precision(wanted, device)
    in_full = torch.tensor([float(precision == "fp32")]).to(device)
    dist.all_reduce(in_full)
    return "fp32" if in_full.item() else precision


def stage_of(settings: TrainingSettings, precision: str) -> int:
    """The ZeRO stage of a run: in 16 bits at least 1.

    Only there DeepSpeed 0.19.8 scales the loss of what it divides afterwards, and writes down fp32 weights.
    """
    return settings.zero_stage if precision == "fp32" else max(settings.zero_stage, 1)


def deepspeed_config(
    settings: TrainingSettings, world_size: int, micro_batches: int, precision: str, load_universal: bool = False
) -> dict[str, Any]:
    """The DeepSpeed config of a run.

    Batch sizes only have to agree with each other: what a micro-batch holds is decided by `raylm.training.batches`,
    and losses are already sums over the global batch.

    :param load_universal: the engine will load a universal checkpoint.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "train_batch_size": world_size * micro_batches,
        "gradient_clipping": 0.0 if _is_plain(settings, precision) else settings.gradient_clip,
        "zero_optimization": {
            "stage": stage_of(settings, precision),
            "overlap_comm": False,
            "contiguous_gradients": True,
            "round_robin_gradients": False,
            "reduce_scatter": settings.optimizer != "muon",  # which wants whole gradients
            # Small enough that a laptop's model is really sharded, and the default on a GPU's scale.
            "stage3_param_persistence_threshold": 10_000,
            **_offload(settings),
        },
        # The optimizer is torch.optim.AdamW: fused, the same on CPU and GPU, no compiler needed.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "checkpoint": {"load_universal": load_universal},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def _is_plain(settings: TrainingSettings, precision: str) -> bool:
    """Whether DeepSpeed puts no optimizer of its own around torch's."""
    return settings.zero_stage == 0 and precision == "fp32"


def _offload(settings: TrainingSettings) -> dict[str, Any]:
    """The part of the ZeRO config that says what does not stay on the GPU."""
    if settings.offload == "none":
        return {}
    # Not to NVMe: what DeepSpeed 0.19.8 keeps there, it cannot load again (weights), or with so many workers alone.
    place = {"device": "cpu", "pin_memory": True}
    return {"offload_optimizer": place} | ({"offload_param": place} if settings.offload == "all" else {})


def parameter_groups(model: PreTrainedModel, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices decay; vectors (biases, norms) and fixed positions do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if len(whole_shape(parameter)) > 1]
    plain = [parameter for parameter in trained if len(whole_shape(parameter)) <= 1]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def hidden_matrices(model: PreTrainedModel) -> set[torch.nn.Parameter]:
    """What Muon trains: the matrices of linear layers, but for embeddings and the output head."""
    import torch

    ends = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module}
    ends |= {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    linear = (module.weight for module in model.modules() if isinstance(module, torch.nn.Linear))
    return {weight for weight in linear if weight.requires_grad and id(weight) not in ends}


@contextlib.contextmanager
def born_sharded(config: dict[str, Any]) -> Iterator[None]:
    """While it lasts, models are built and loaded as ZeRO-3 wants them: no rank ever holds more than one layer whole.

    Other stages hold whole weights anyway.
    """
    if config["zero_optimization"]["stage"] < 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    kept = HfDeepSpeedConfig(config)  # transformers looks at it through a weak reference
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del kept


def _deepspeed() -> Any:
    """The deepspeed package, told which device there is so that it does not guess aloud."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    return deepspeed


def prepare_backend(device: torch.device) -> None:
    """Join DeepSpeed's communication to the process group that Ray Train has made."""
    deepspeed = _deepspeed()
    if device.type == "cpu":
        # Its shared-memory allreduce is compiled at first use, for a minute, behind a lock file that a killed
        # worker leaves behind for ever. Gloo needs neither.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
    )


def build_engine(
    model: PreTrainedModel, settings: TrainingSettings, config: dict[str, Any], device: torch.device
) -> DeepSpeedEngine:
    """The model under DeepSpeed."""
    deepspeed = _deepspeed()
    # Which casts the weights to 16 bits where they are wanted, and leaves buffers such as rotary frequencies alone.
    optimizer = build_optimizer(model, settings)
    engine, *_ = deepspeed.initialize(
        model=model.to(device), optimizer=optimizer, config=config, dist_init_required=False
    )
    if engine.optimizer is optimizer:
        # DeepSpeed would take the norm of one gradient after the other, and tell nobody.
        optimizer.register_step_pre_hook(partial(_clip, bound=settings.gradient_clip))
        engine.enable_backward_allreduce = engine.dp_world_size > 1
    return engine


def _clip(optimizer: torch.optim.Optimizer, *_: Any, bound: float) -> None:
    """Clip the gradients to a norm, and leave the norm that they had where DeepSpeed looks for it."""
    import torch

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer._global_grad_norm = torch.nn.utils.clip_grad_norm_(parameters, bound or math.inf)


def build_optimizer(model: PreTrainedModel, settings: TrainingSettings) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) over the model's trained parameters, or Muon beside it."""
    import torch

    groups = parameter_groups(model, settings.weight_decay)
    adam = {"lr": settings.learning_rate, "betas": (settings.beta1, settings.beta2), "eps": settings.epsilon}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, **adam, fused=True)
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    hidden = hidden_matrices(model)
    for parameter in model.parameters():
        parameter.use_muon = parameter in hidden
    matrices, *_ = groups
    orthogonal = {"params": [p for p in matrices["params"] if p in hidden], "weight_decay": settings.weight_decay}
    matrices["params"] = [p for p in matrices["params"] if p not in hidden]
    ratio = settings.muon_learning_rate / settings.learning_rate
    optimizer: torch.optim.Optimizer = MuonWithAuxAdam(
        [
            {**orthogonal, "use_muon": True, "lr": settings.muon_learning_rate, RATE_RATIO: ratio},
            *({**group, **adam, "use_muon": False} for group in groups if group["params"]),
        ],
        torch.optim.AdamW,
        {"fused": True},
    )
    return optimizer


def load_engine(engine: DeepSpeedEngine, directory: Path, tag: str) -> None:
    """Load weights, optimizer state, loss scale and step counts, and leave each parameter group's settings alone.

    Where ZeRO-3 loads a universal checkpoint, DeepSpeed 0.19.8 gives every group the settings of the first, so that
    biases would decay, and all shards one and the same step counter, which each would then advance.
    """
    groups = [{name: value for name, value in group.items() if name != "params"} for group in _groups(engine)]
    engine.load_checkpoint(str(directory), tag=tag)
    for group, own in zip(_groups(engine), groups, strict=True):
        group.update(own)
    for state in getattr(engine.optimizer, "optimizer", engine.optimizer).state.values():
        if "step" in state:
            state["step"] = state["step"].clone()


def _groups(engine: DeepSpeedEngine) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = engine.optimizer.param_groups
    return groups


def to_universal(checkpoint: Path, target: Path) -> None:
    """Write a ZeRO checkpoint as DeepSpeed's universal checkpoint, which an engine of any world size loads.

    :param checkpoint: the directory with all ranks' shards.
    """
    _deepspeed()
    from deepspeed.checkpoint import ds_to_universal

    arguments = argparse.Namespace(
        input_folder=str(checkpoint),
        output_folder=str(target),
        num_extract_workers=1,  # in this process: a worker of Ray must not fork
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with _silenced():
        ds_to_universal.main(arguments)


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Keep what DeepSpeed's converters print, line by line, off the terminal."""
    silence = io.StringIO()
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        yield


def whole_weights(checkpoint: Path, zero_stage: int) -> dict[str, torch.Tensor]:
    """The fp32 weights of a saved engine, put together from all ranks' shards.

    :param checkpoint: a local directory that `engine.save_checkpoint(…, tag="zero")` wrote.
    :param zero_stage: the stage it was trained under; 0 shards nothing, so its module's own state is whole.
    """
    import torch

    _deepspeed()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    module: dict[str, torch.Tensor] = {}
    if zero_stage < 2:  # nothing shards the module; and of stage 1, the frozen weights are nowhere else
        file = checkpoint / "zero" / "mp_rank_00_model_states.pt"
        # DeepSpeed's own format; the caller has held the file against its manifest.
        state = torch.load(file, map_location="cpu", weights_only=False)
        module = {name: tensor.float() for name, tensor in state["module"].items()}
    if zero_stage == 0:
        return module
    with _silenced():
        return module | dict(get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag="zero"))
