"""Run a model on an input and its reference at once, its mixers by their decomposition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from typing import Any, cast

from torch import Tensor, nn

from captum_ssm.errors import FidelityError, UnsupportedModelError
from captum_ssm.layers.call import LayerCall, first_output
from captum_ssm.layers.fidelity import unchecked_chain
from captum_ssm.layers.isolated import without_cache
from captum_ssm.layers.mixers import known_mixers
from captum_ssm.layers.precision import in_full_precision
from captum_ssm.layers.stand_ins import is_spread
from captum_ssm.network.recording import own_output, record_mixers
from captum_ssm.operators import Chain, Operator, Rearranged, Sum
from captum_ssm.relevance.call import constants
from captum_ssm.relevance.checkpoints import Checkpoints
from captum_ssm.relevance.external_code import substitute_rules
from captum_ssm.relevance.own_projections import OwnProjections
from captum_ssm.relevance.plain import PlainArguments
from captum_ssm.relevance.quantised import substitute_secants
from captum_ssm.relevance.rule import Rule
from captum_ssm.relevance.traced import Traced, traced

DECOMPOSITION = "decomposition"
"""How a mixer was followed: as its adapter decomposes it."""


@dataclass(frozen=True)
class FollowedMixers:
    """How the mixers of a model are followed: each runs by its decomposition, checked by its own code.

    A mixer that is not what its adapter knows, such as one with the matrices of a fine-tuning, or another library's
    class of the same name, is followed function by function instead, which is as exact and takes longer.

    Args:
        check: Called with each mixer's call on the input alone, and with the output (B, L, E) of its decomposition;
            None instead of the output if the decomposition ran on an input of a wider type.
        follow_gates: Whether the gates are traced too; else they are constants.
        skips: Gets the direct paths past the recurrences, as inputs of their own; None leaves them in the flow.
        on_factor: Called with a mixer's name, the name of each factor of its chain, and the input of the factor.
        checkpoints: The checkpointed blocks, if there are any.
        followed: Gets by name of each mixer's call how it was followed: by its decomposition, or why not.
        strangers: Gets the mixers that are not what their adapter knows, and why.
        projections: Those of the own code of the mixer that ran last.
    """

    check: Callable[[LayerCall, Tensor | None], None]
    follow_gates: bool = True
    skips: list[Traced] | None = None
    on_factor: Callable[[str, str, Tensor], None] | None = None
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    followed: dict[str, str] = field(default_factory=dict)
    strangers: dict[nn.Module, str] = field(default_factory=dict)
    projections: OwnProjections = field(default_factory=OwnProjections)

    def prepare(self, mixer: nn.Module, arguments: Any) -> Any:
        """Return the arguments for a mixer's own code, whose projections are noted, also when its block runs again."""
        self.projections.watch(mixer)
        return _plain(mixer, arguments)

    def __call__(self, call: LayerCall) -> Tensor:
        """Return the output of a mixer, traced if its input is.

        Raises:
            UnsupportedModelError: If neither the adapter knows the mixer nor its functions have rules.
            FidelityError: If the mixer is probed, and its decomposition misses its own output.
        """
        if not traced((call.x, call.kwargs)):
            return call.y
        try:
            y = self._by_decomposition(call)  # of a stranger too when its block runs again: it keeps the same tensors
        except (FidelityError, UnsupportedModelError) as error:
            if self.skips is not None or self.on_factor is not None:  # asked for parts of the decomposition
                raise
            self.strangers[call.mixer] = str(error)
        finally:
            self.projections.forget()
        reason = self.strangers.get(call.mixer)
        if not self.checkpoints.is_rerun:
            self.followed[call.name] = reason or DECOMPOSITION
        return y if reason is None else self._by_functions(call)

    def _by_functions(self, call: LayerCall) -> Tensor:
        """Return the output of a mixer's own code, function by function."""
        x = call.x if call.own_input is None else call.own_input
        arguments = {name: value for name, value in without_cache(call.kwargs).items() if name != "source"}
        y: Tensor = first_output(own_output(call.mixer, x, **arguments))
        return y

    @in_full_precision
    def _by_decomposition(self, call: LayerCall) -> Tensor:
        """Return the output of a mixer's decomposition, checked.

        Raises:
            UnsupportedModelError: If another argument than the input depends on the tokens, or the adapter does not
                know the mixer.
            FidelityError: If the decomposition misses the mixer's own output.
        """
        if not isinstance(call.x, Traced) or traced(call.kwargs):
            raise UnsupportedModelError(
                f"Layer '{call.name}' ({type(call.mixer).__name__}) has other arguments than its input that "
                "depend on the tokens, and its adapter takes them as constants."
            )
        plain_call = replace(call, x=_plain(call.mixer, call.x), state=None, own_input=None)
        y = self._decomposed(plain_call, call.x)
        if not self.checkpoints.is_rerun:
            is_wider = call.y.dtype != call.x.dtype  # the layer's own code ran on an input in its narrower type
            self.check(plain_call, None if is_wider else constants(y))
        return y

    def _decomposed(self, call: LayerCall, x: Traced) -> Tensor:
        """Return the output (B, L, E) of a mixer's chain for its traced input."""
        y: Tensor = x
        with cast(Rule, x.rule).sharing(self.on_factor is None and self.skips is None, self.projections):
            chain = unchecked_chain(call, x if self.follow_gates else x.value.detach())
            for name, operator in reversed(list(chain.factors.items())):
                if self.on_factor is not None and not self.checkpoints.is_rerun:
                    self.on_factor(call.name, name, y)
                y = operator.apply(y, bias=True) if self.skips is None else _separate_skip(operator, y, self.skips)
        return y


def _plain(mixer: nn.Module, arguments: Any) -> Any:
    """Return the arguments of a mixer's call as the model itself would have passed them."""
    return PlainArguments.of(mixer)(arguments)


@contextmanager
def follow(
    model: nn.Module,
    check: Callable[[LayerCall, Tensor | None], None],
    follow_gates: bool = True,
    checkpoints: bool = False,
    skips: list[Traced] | None = None,
    on_factor: Callable[[str, str, Tensor], None] | None = None,
) -> Iterator[dict[str, str]]:
    """Let traced tensors flow through a model while the context is open.

    The mixers that are known run by their decomposition; all else is followed function by function.

    Args:
        model: The model. It is as before when the context is left, also after an error.
        check: See :class:`FollowedMixers`.
        follow_gates: Whether the gates of the mixers are traced too.
        checkpoints: Keep no more than the input of each block, and run the block again for the gradient. The context
            must then be open until the gradient is there.
        skips: Gets the direct paths past the recurrences; None leaves them in the flow.
        on_factor: Called with the input of each factor of a mixer's chain.

    Yields:
        By name of each known mixer how it was followed: :data:`DECOMPOSITION`, or why not.

    Raises:
        UnsupportedModelError: If the model has no blocks to checkpoint, or is spread by tensor parallelism.
    """
    _refuse_spread(model)
    rerun = Checkpoints()
    mixers = FollowedMixers(check, follow_gates, skips, on_factor, rerun)
    with ExitStack() as stack:
        plain = PlainArguments.of(model)
        substitute_secants(model, plain, stack)
        substitute_rules(model, plain, stack)  # of users too, so they come first
        if checkpoints:
            rerun.attach(model, stack)
        if known_mixers(model):
            stack.callback(mixers.projections.forget)
            stack.enter_context(
                record_mixers(model, replacement=mixers, prepare=mixers.prepare, is_rerun=lambda: rerun.is_rerun)
            )
        yield mixers.followed


def _refuse_spread(model: nn.Module) -> None:
    """Raise if processes compute a part of the model each, which functions do not show.

    Raises:
        UnsupportedModelError: With the remedy.
    """
    spread = next((name for name, parameter in model.named_parameters() if is_spread(parameter)), None)
    if spread is not None:
        raise UnsupportedModelError(
            f"The model is spread over processes by tensor parallelism ('{spread}'), where each computes a part, and "
            "relevance follows the functions of one. Load the model without a tensor-parallel plan (tp_plan), or under "
            "FSDP2 (fully_shard); the methods of attention matrices explain it as it is."
        )


def _separate_skip(operator: Operator, x: Tensor, skips: list[Traced]) -> Tensor:
    """Apply an operator, its direct path from an input of its own, which ``skips`` gets.

    Args:
        operator: The operator.
        x: Its input (B, L, channels).
        skips: Gets the direct paths.

    Returns:
        The output (B, L, channels).
    """
    if isinstance(operator, Chain):
        factors = reversed(list(operator.factors.values()))
        return reduce(lambda x, factor: _separate_skip(factor, x, skips), factors, x)
    if isinstance(operator, Sum):
        return reduce(add, (_separate_skip(summand, x, skips) for summand in operator.summands.values()))
    if isinstance(operator, Rearranged):
        return operator.back(_separate_skip(operator.operator, operator.there(x), skips))
    skip = getattr(operator, "skip", None)
    if skip is None:
        return operator.apply(x, bias=True)
    direct = skip * x
    leaf = Traced.of(direct.value.detach().requires_grad_(), direct.reference, direct.rule)
    skips.append(leaf)
    return operator.without("skip").apply(x, bias=True) + leaf
