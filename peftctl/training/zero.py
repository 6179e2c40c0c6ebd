"""DeepSpeed's ZeRO: every process keeps a part of the optimizer's state (1), gradients (2) and weights (3).

A checkpoint holds what one process would write, so that another number of processes, another stage of ZeRO or none can
go on from it.

ZeRO: Rajbhandari et al. 2020 (arXiv 1910.02054). Parts are found through `deepspeed.utils.tensor_fragment`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DeepSpeedEngineWrapper
from safetensors.torch import load_file
from torch import distributed

from peftctl.training import zero_linear
from peftctl.training.checkpoints import TENSORS
from peftctl.training.engine import DividingEngine, saved_optimizer

_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_EPSILON = 1e-6
"""What DeepSpeed, as PyTorch, adds to the norm when it clips."""


def compile_nothing() -> None:
    """Keep DeepSpeed on a CPU from compiling an all-reduce of its own, which takes minutes; gloo has one."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Zero(DividingEngine):
    """See `Engine`.

    Args:
        model: What trains.
        optimizer: Over its trainable tensors.
        stage: Of ZeRO, 1 to 3.
        max_norm: Gradients are clipped to it; 0 for not at all.
        keep_whole: Whether weights that train stay whole in every process at stage 3 too, because the loss reads them.
        show_gradients: Whether somebody will want gradients at the step.
    """

    def __init__(
        self, model: Any, optimizer: Any, *, stage: int, max_norm: float, keep_whole: bool, show_gradients: bool
    ):
        super().__init__(model, optimizer)
        self.divides_weights = stage == 3
        self.max_norm = max_norm
        self.keep_whole = keep_whole and stage == 3
        self.show_gradients = show_gradients
        self.groups: list[list[Any]] = [list(group["params"]) for group in optimizer.param_groups]
        self._skips = False
        self._gradients: Mapping[str, torch.Tensor] = {}

    def begin(self, trainer: Any) -> None:
        """Take DeepSpeed's engine, which has divided the tensors of `owned` in place."""
        super().begin(trainer)
        self.engine = trainer.deepspeed
        self.zero = self.engine.optimizer
        trainer.accelerator.deepspeed_engine_wrapped = _Backward(self)
        if self.divides_weights:
            zero_linear.install()
        if self.keep_whole:  # as DeepSpeed keeps small tensors: gathered once after every step
            for parameter in self.owned.values():
                if not parameter.ds_persist:
                    parameter.ds_persist = True
                    self.zero.persistent_parameters.append(parameter)

    def forward_ends(self) -> None:
        """Gather what has to be whole and is not: the first forward pass still divides it."""
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        if self.keep_whole:
            missing = [p for p in self.owned.values() if p.ds_status is ZeroParamStatus.NOT_AVAILABLE]
            if missing:
                missing[0].all_gather(missing)

    def leave(self) -> None:
        """Take the engine away, and make the libraries forget it: models load whole again."""
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        zero_linear.remove()
        self.engine.destroy()
        unset_hf_deepspeed_config()

    # -- a step --------------------------------------------------------------------------------------------------

    def norm(self) -> float:
        """Return the norm of the step's gradients before clipping; infinite where one is not finite."""
        from deepspeed.runtime.utils import combine_grad_norm_groups
        from deepspeed.utils import safe_get_full_grad

        zero = self.zero
        scaled = combine_grad_norm_groups(zero._get_norm_groups()) if self._stage3 else zero.scaled_global_norm()
        norm = float(scaled) / zero.loss_scale
        if self.show_gradients:
            factor = min(1.0, self.max_norm / (norm + _EPSILON)) if self.max_norm else 1.0
            self._gradients = {n: safe_get_full_grad(p).detach().float() * factor for n, p in self.owned.items()}
        return norm

    def step(self) -> None:
        """Clip, step, and divide or gather the new weights, which DeepSpeed does in one."""
        self.engine.step()
        if self._skips:
            self._skips = self.zero.overflow = False  # the schedule goes on, as in other engines

    def skip_step(self) -> None:
        """Let DeepSpeed drop the gradients, as it does where 16 bits overflow."""
        self._skips = True
        self.zero.check_grad_overflow = True  # else stages 1 and 2 look at 16 bits alone

    def gradients(self) -> Mapping[str, torch.Tensor | None]:
        """Return the whole, clipped gradients of the step, by name, where somebody wants them."""
        return self._gradients

    # -- whole tensors -------------------------------------------------------------------------------------------

    def whole_tensors(self) -> dict[str, torch.Tensor]:
        """Return the trained tensors in float32, by name, on the CPU."""
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(p).detach().cpu().clone() for name, p in self.owned.items()}

    def put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put whole values into the copies that the optimizer steps on, and into the model's own weights."""
        for name, tensor in tensors.items():
            parameter = self.owned[name]
            self._set_state(parameter, None, tensor.float())
            if self._stage3:
                parameter.ds_tensor.copy_(self._own_part(parameter, tensor))
                if parameter.data.shape == tensor.shape:  # one of those that stay whole
                    parameter.data.copy_(tensor)
        if not self._stage3:
            self.zero.update_lp_params()

    # -- the optimizer's state -----------------------------------------------------------------------------------

    def optimizer_state(self) -> dict[str, Any]:
        """Return the state dict that the optimizer would have in one process."""
        from deepspeed.utils import safe_get_full_optimizer_state

        base = self.zero.optimizer
        self._link()
        index_of = self._index_of()
        state: dict[int, dict[str, Any]] = {}
        for flat, members in self._flat():
            parts, scalars = _kinds(base.state.get(flat, {}), flat.numel())
            for parameter in members if parts or scalars else ():
                whole = {key: safe_get_full_optimizer_state(parameter, key).detach().cpu().clone() for key in parts}
                # An optimizer counts the steps of each tensor apart.
                state[index_of[id(parameter)]] = whole | {key: _copied(value) for key, value in scalars.items()}
        first, listed = 0, []
        for group, parameters in zip(base.param_groups, self.groups, strict=True):
            settings = {key: value for key, value in group.items() if key != "params"}
            listed.append({**settings, "params": list(range(first, first + len(parameters)))})
            first += len(parameters)
        loss_scaler = self.zero.loss_scaler
        scaler = {key: vars(loss_scaler)[key] for key in _SCALER if key in vars(loss_scaler)}
        dynamic = {"loss_scaler": scaler} if self.zero.dynamic_loss_scale else {}
        return {"state": state, "param_groups": listed, **dynamic}

    def load(self, folder: Path) -> None:
        """Divide a checkpoint among the processes; the engine has taken no step yet."""
        content, index_of = saved_optimizer(folder), self._index_of()
        saved = content["state"]
        for group, settings in zip(self.zero.optimizer.param_groups, content["param_groups"], strict=True):
            group.update({key: value for key, value in settings.items() if key != "params"})
        filled = []
        for flat, members in self._flat():
            entries = {id(p): saved[index_of[id(p)]] for p in members if index_of[id(p)] in saved}
            if not entries:  # no step yet, or forgotten just before
                continue
            size = members[0].ds_numel if self._stage3 else members[0].numel()
            parts, scalars = _kinds(entries[id(members[0])], size)
            self.zero.optimizer.state[flat] = {key: torch.zeros_like(flat) for key in parts}
            self.zero.optimizer.state[flat] |= {key: _copied(value) for key, value in scalars.items()}
            filled += [(p, key, entries[id(p)][key]) for p in members for key in parts]
        self._link()
        for parameter, key, value in filled:
            self._set_state(parameter, key, value)
        for key, value in content.get("loss_scaler", {}).items():
            setattr(self.zero.loss_scaler, key, value)
        tensors = load_file(folder / TENSORS)
        for name, parameter in self.owned.items():  # the model's own may have 16 bits
            self._set_state(parameter, None, tensors[name].float())

    def forget_named(self, names: set[str]) -> None:
        """Drop the optimizer's state of tensors that train, which fill its groups: a group counts its steps as one."""
        chosen = {id(self.owned[name]) for name in names}
        for flat, members in self._flat():
            inside = [id(member) in chosen for member in members]
            if any(inside) != all(inside):
                raise ValueError("the optimizer can't forget a part of a group: give these tensors groups of their own")
            if all(inside):
                self.zero.optimizer.state.pop(flat, None)

    def _index_of(self) -> dict[int, int]:
        """Return where in the optimizer's groups each parameter stands, by its id."""
        return {id(p): index for index, p in enumerate(p for group in self.groups for p in group)}

    def _link(self) -> None:
        """Let every parameter find its part of the state; DeepSpeed 0.19 forgets all groups but the first."""
        if not self._stage3:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def _set_state(self, parameter: Any, key: str | None, value: torch.Tensor) -> None:
        """Put a whole tensor into the parts of a parameter, or of an entry of its state."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state
        from deepspeed.utils.tensor_fragment import safe_set_local_fp32_param, safe_set_local_optimizer_state

        if self._stage3:
            own = self._own_part(parameter, value)
            if key is None:
                safe_set_local_fp32_param(parameter, own)
            else:
                safe_set_local_optimizer_state(parameter, own, key)
        elif key is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    @staticmethod
    def _own_part(parameter: Any, value: torch.Tensor) -> torch.Tensor:
        """Return this process's part of a whole tensor; parts are equally long, so the last reaches beyond it."""
        length = parameter.ds_tensor.numel()
        first = length * distributed.get_rank()
        own = value.flatten()[first : first + length]
        return torch.nn.functional.pad(own, (0, length - own.numel())).to(parameter.ds_tensor.device)

    def _flat(self) -> Iterator[tuple[torch.Tensor, list[Any]]]:
        """Yield the flat tensors that the optimizer steps on in this process, and the parameters of each."""
        if self._stage3:
            yield from zip(self.zero.fp32_partitioned_groups_flat, self.zero.fp16_groups, strict=True)
        else:
            yield from zip(self.zero.single_partition_of_fp32_groups, self.zero.bit16_groups, strict=True)

    @property
    def _stage3(self) -> bool:
        return self.divides_weights


class _Backward(DeepSpeedEngineWrapper):
    """The backward pass alone: the step is left to where other engines take it, so that gradients can be looked at."""

    def __init__(self, engine: Zero):
        super().__init__(engine.engine)
        self.norm = engine.norm

    def backward(self, loss: torch.Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        """Run backward; gradients are reduced over processes in the last micro-batch of a step."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **kwargs)

    def get_global_grad_norm(self) -> float:
        """Return the norm of the gradients that the step will take."""
        return self.norm()


def _kinds(entry: Mapping[str, Any], numel: int) -> tuple[list[str], dict[str, Any]]:
    parts = [k for k, v in entry.items() if torch.is_tensor(v) and v.dim() > 0 and v.numel() == numel]
    return parts, {key: value for key, value in entry.items() if key not in parts}


def _copied(value: Any) -> Any:
    return value.detach().cpu().clone() if torch.is_tensor(value) else value
