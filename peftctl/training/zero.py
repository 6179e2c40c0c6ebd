"""Whole tensors out of a DeepSpeed engine and back: ZeRO keeps a part of each in every process.

A checkpoint holds what one process would write, so that another number of processes, another stage of ZeRO or none can
go on from it. All functions here but the first are collective: every process calls them, at the same time.

ZeRO: Rajbhandari et al. 2020 (arXiv 1910.02054). Parts are found through `deepspeed.utils.tensor_fragment`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import distributed

Groups = Sequence[Sequence[Any]]  # parameters: the engine puts attributes of its own on them
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def compile_nothing() -> None:
    """Keep DeepSpeed on a CPU from compiling an all-reduce of its own, which takes minutes; gloo has one."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def whole_tensors(owned: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the trained tensors in float32, by name, on the CPU.

    Args:
        owned: The parameters that the optimizer got, which the engine has divided since.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(p).detach().cpu().clone() for name, p in owned.items()}


def optimizer_state(engine: Any, groups: Groups) -> dict[str, Any]:
    """Return the state dict that the optimizer would have in one process.

    Args:
        engine: The DeepSpeed engine.
        groups: The parameters of each group, as the optimizer got them.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    zero = engine.optimizer
    base = zero.optimizer
    _link(zero)
    parts, scalars = _state_keys(zero)
    state: dict[int, dict[str, Any]] = {}
    for index, parameter in enumerate(p for group in groups for p in group):
        whole = {key: safe_get_full_optimizer_state(parameter, key).detach().cpu().clone() for key in parts}
        state[index] = whole | {key: _copied(value) for key, value in scalars.items()}  # an optimizer counts each apart
    first, listed = 0, []
    for group, parameters in zip(base.param_groups, groups, strict=True):
        settings = {key: value for key, value in group.items() if key != "params"}
        listed.append({**settings, "params": list(range(first, first + len(parameters)))})
        first += len(parameters)
    scaler = {key: vars(zero.loss_scaler)[key] for key in _SCALER if key in vars(zero.loss_scaler)}
    return {"state": state, "param_groups": listed, **({"loss_scaler": scaler} if zero.dynamic_loss_scale else {})}


def load_optimizer_state(engine: Any, groups: Groups, saved: Mapping[str, Any]) -> None:
    """Divide a whole state among the processes; the engine has taken no step yet.

    Args:
        engine: The DeepSpeed engine.
        groups: The parameters of each group, as the optimizer got them.
        saved: What `optimizer_state`, or the state dict of the same optimizer in one process, was.
    """
    zero = engine.optimizer
    base = zero.optimizer
    state = saved["state"]
    parameters = [p for group in groups for p in group]
    for group, settings in zip(base.param_groups, saved["param_groups"], strict=True):
        group.update({key: value for key, value in settings.items() if key != "params"})
    if not state:
        return
    parts, scalars = _kinds(state[0], parameters[0].ds_numel if _stage3(zero) else parameters[0].numel())
    for flat in _flat(zero):
        base.state[flat] = {key: torch.zeros_like(flat) for key in parts}
        base.state[flat] |= {key: _copied(value) for key, value in scalars.items()}
    _link(zero)
    for index, parameter in enumerate(parameters):
        for key in parts:
            _set_state(zero, parameter, key, state[index][key])
    for key, value in saved.get("loss_scaler", {}).items():
        setattr(zero.loss_scaler, key, value)


def load_tensors(engine: Any, owned: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Put float32 values into the copies that the optimizer steps on: the model's own may have 16 bits."""
    for name, parameter in owned.items():
        _set_state(engine.optimizer, parameter, None, tensors[name].float())


def leave(engine: Any) -> None:
    """Take the engine away, and make the libraries forget it: models load whole again."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    engine.destroy()
    unset_hf_deepspeed_config()


def _set_state(zero: Any, parameter: Any, key: str | None, value: torch.Tensor) -> None:
    """Put a whole tensor into the parts of a parameter, or of an entry of its state."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state
    from deepspeed.utils.tensor_fragment import safe_set_local_fp32_param, safe_set_local_optimizer_state

    if not _stage3(zero):
        if key is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)
        return
    # The parts are equally long, so the last one reaches beyond the tensor.
    length = parameter.ds_tensor.numel()
    first = length * distributed.get_rank()
    own = value.flatten()[first : first + length]
    own = torch.nn.functional.pad(own, (0, length - own.numel())).to(parameter.ds_tensor.device)
    if key is None:
        safe_set_local_fp32_param(parameter, own)
    else:
        safe_set_local_optimizer_state(parameter, own, key)


def _link(zero: Any) -> None:
    """Let every parameter find its part of the state; DeepSpeed 0.19 forgets all groups but the first."""
    if not _stage3(zero):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _state_keys(zero: Any) -> tuple[list[str], dict[str, Any]]:
    """Return the names of the state's tensors, and the entries that all parameters share, such as the step."""
    flat = next(_flat(zero))
    parts, scalars = _kinds(zero.optimizer.state[flat], flat.numel())
    return parts, scalars


def _kinds(entry: Mapping[str, Any], numel: int) -> tuple[list[str], dict[str, Any]]:
    parts = [k for k, v in entry.items() if torch.is_tensor(v) and v.dim() > 0 and v.numel() == numel]
    return parts, {key: value for key, value in entry.items() if key not in parts}


def _copied(value: Any) -> Any:
    return value.detach().cpu().clone() if torch.is_tensor(value) else value


def _flat(zero: Any) -> Iterator[torch.Tensor]:
    """Yield the flat tensors that the optimizer steps on in this process."""
    yield from zero.fp32_partitioned_groups_flat if _stage3(zero) else zero.single_partition_of_fp32_groups


def _stage3(zero: Any) -> bool:
    return hasattr(zero, "fp32_partitioned_groups_flat")
