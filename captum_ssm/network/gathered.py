"""Give a model tensors that an explanation can work with, for as long as it is explained.

Under FSDP2 (``fully_shard``) each process holds a part of each parameter, and hooks gather those of a module for its
run. They free the memory again that the explanation still needs, so here all are gathered once, on every process, and
the hooks rest. Under tensor parallelism each process computes a part, so the model stays as it is. Tensors that were
made in inference mode, which autograd refuses, are copied.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from captum_ssm.errors import UnsupportedModelError
from captum_ssm.layers.stand_ins import is_spread


def gather(modules: Iterable[nn.Module], stack: ExitStack) -> None:
    """Give the modules of a model whole tensors under FSDP2, and ordinary ones, until the stack is closed.

    Args:
        modules: All modules of the model.
        stack: Gives the modules their own tensors back.

    Raises:
        UnsupportedModelError: If the model is under FSDP1, or under FSDP2 and tensor parallelism.

    Cost: a look at each tensor; under FSDP2, or for a model made in inference mode, the memory of the whole model.
    """
    modules = list(modules)
    for module in modules:
        if "_fsdp_wrapped_module" in module._modules:
            raise UnsupportedModelError(
                "The model is wrapped in FullyShardedDataParallel, which keeps flat parts of its parameters. Shard it "
                "with torch.distributed.fsdp.fully_shard, whose parameters are gathered for an explanation, or load "
                "the full state_dict into a model without FSDP."
            )
    tensors = [t for module in modules for t in (*module._parameters.values(), *module._buffers.values())]
    if not any(tensor is not None and _is_unusable(tensor) for tensor in tensors):
        return
    is_gathered = any(hasattr(type(module), "unshard") and hasattr(type(module), "reshard") for module in modules)
    for module in modules:
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None and _is_unusable(tensor) and (is_gathered or not is_spread(tensor)):
                    stack.callback(table.__setitem__, name, tensor)
                    table[name] = _whole(tensor)
        if not is_gathered:
            continue
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            if any(map(_is_of_fsdp, hooks.values())):
                stack.callback(_put_back, hooks, hooks.copy())
                for number in [number for number, hook in hooks.items() if _is_of_fsdp(hook)]:
                    del hooks[number]


def _is_unusable(tensor: Tensor) -> bool:
    """Whether a tensor is none that an explanation can work with."""
    return tensor.is_inference() or is_spread(tensor)


def _whole(tensor: Any) -> Any:
    """Return an ordinary tensor, or parameter, with all entries of a tensor."""
    if is_spread(tensor):
        _refuse_two_ways(tensor)
    whole = tensor.full_tensor().detach() if is_spread(tensor) else tensor.detach().clone()
    return nn.Parameter(whole, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else whole


def _put_back(hooks: dict[int, Any], before: dict[int, Any]) -> None:
    """Bring hooks back into the order that they had."""
    hooks.clear()
    hooks.update(before)


def _is_of_fsdp(hook: Any) -> bool:
    """Whether a hook is one of FSDP's own."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp")


def _refuse_two_ways(tensor: Any) -> None:
    """Raise if a parameter is cut along two axes, as by FSDP2 and tensor parallelism.

    Raises:
        UnsupportedModelError: With the remedy.
    """
    if sum(placement.is_shard() for placement in tensor.placements) > 1:
        raise UnsupportedModelError(
            "The model is spread by FSDP2 and by tensor parallelism at once, and cannot be gathered without running "
            "otherwise. Load it without a tensor-parallel plan."
        )
