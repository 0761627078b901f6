"""Blocks that keep nothing but their input, and run once more for the gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from captum_ssm.errors import UnsupportedModelError
from captum_ssm.layers.mixers import find_mixers
from captum_ssm.network.eager import OwnCheckpoint
from captum_ssm.network.threads import current_thread, substitute, working_for
from captum_ssm.relevance.traced import Traced, traced

_TRACED = object()
"""Stands for a traced tensor among the outputs of a block."""


class Checkpoints:
    """Checkpointed blocks of a model.

    Attributes:
        is_rerun: Whether a block runs for the second time, for the gradient.
    """

    def __init__(self) -> None:
        self.is_rerun = False
        self._thread = current_thread()

    def attach(self, model: nn.Module, stack: ExitStack) -> None:
        """Checkpoint all blocks of the model until the stack is closed.

        Raises:
            UnsupportedModelError: If the model has no list of blocks.
        """
        for block in blocks(model):
            substitute(block, "forward", self._checkpointed, stack)

    def _checkpointed(self, block: Callable[..., Any]) -> Callable[..., Any]:
        """Return a block's forward that keeps its arguments alone, as plain tensors, which a checkpoint understands."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            inputs = traced((args, kwargs))
            if not inputs:
                return block(*args, **kwargs)
            leaves, spec = tree_flatten((args, kwargs))
            rule, places = inputs[0].rule, [k for k, leaf in enumerate(leaves) if isinstance(leaf, Traced)]
            outputs: list[Any] = []  # the structure of the outputs, and those that are not traced

            def run(*tensors: Tensor) -> tuple[Tensor, ...]:
                pairs = iter(zip(tensors[::2], tensors[1::2]))
                filled = [Traced.of(*next(pairs), rule) if k in places else leaf for k, leaf in enumerate(leaves)]
                inner_args, inner_kwargs = tree_unflatten(filled, spec)
                with self._rerun() if outputs else nullcontext():
                    out, out_spec = tree_flatten(block(*inner_args, **inner_kwargs))
                outputs[:] = [out_spec, [_TRACED if isinstance(leaf, Traced) else leaf for leaf in out]]
                return tuple(t for leaf in out if isinstance(leaf, Traced) for t in (leaf.value, leaf.reference))

            tensors = [t for k in places for t in (leaves[k].value, leaves[k].reference)]
            flat = checkpoint(OwnCheckpoint(run), *tensors, use_reentrant=False)
            out_spec, others = outputs
            pairs = iter(zip(flat[::2], flat[1::2]))
            filled = [Traced.of(*next(pairs), rule) if leaf is _TRACED else leaf for leaf in others]
            return tree_unflatten(filled, out_spec)

        return forward

    @contextmanager
    def _rerun(self) -> Iterator[None]:
        self.is_rerun = True
        try:
            with working_for(self._thread):  # on a GPU a thread of autograd
                yield
        finally:
            self.is_rerun = False


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model: the members of its lists of modules that have a mixer inside.

    Raises:
        UnsupportedModelError: If there are none.
    """
    mixers = set(find_mixers(model).values())
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    members = [block for each in lists for block in each if mixers & set(block.modules()) and block not in mixers]
    outermost = [b for b in members if not any(b is not other and b in set(other.modules()) for other in members)]
    if not outermost:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of blocks, so there is nothing to checkpoint; leave checkpoints out."
        )
    return list(dict.fromkeys(outermost))
