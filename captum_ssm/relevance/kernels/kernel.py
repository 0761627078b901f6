"""A kernel of a package, known by its name and the names of its arguments, and written in functions with a rule.

The packages and their forks agree on the names of the arguments, not on their order, and each has options of its own.
So a kernel is called by the names that its own signature gives to the arguments. An argument that its rule does not
know is refused if it is passed, but for those that change no more than the speed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import FunctionType
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils._pytree import tree_map

from captum_ssm.errors import UnsupportedModelError
from captum_ssm.relevance.functions import EXTERNAL_CODE
from captum_ssm.relevance.traced import traced

_SPEED = """
    chunk_size checkpoint_lvl checkpoint_level nrows backnrows oflex backend combine_mode safe_gate disable_recompute
    use_graph max_num_seqs autocast_kernel_dtype enable_logging recompute_states_in_bw dtype_state
    lower_triangular_matrix mlstm_chunkwise_kernel mlstm_sequence_kernel mlstm_step_kernel
"""
"""Arguments that change no more than the speed, or the order in which numbers are added up."""

_STATES = """
    return_last_state return_last_states return_final_states return_varlen_states return_state output_final_state
    return_intermediate_states output_attentions final_states_out state_v_first transpose_state_layout
"""
"""Arguments that ask for further results, which are refused once something reads them, or that lay them out."""

_WITHOUT_EFFECT = frozenset((_SPEED + _STATES).split())

Rule = Callable[..., Tensor]


@dataclass(frozen=True)
class Kernel:
    """The rule of a kernel.

    Args:
        name: The kernel's name.
        rule: The kernel's first result, from its arguments by name.
        aliases: From names of arguments to those of the rule.
        ignored: Further names of arguments that have no effect.
    """

    name: str
    rule: Rule
    aliases: Mapping[str, str] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()

    def of(self, code: Callable[..., Any]) -> Callable[..., Tensor] | None:
        """Return the rule with the arguments of a function that has the kernel's name.

        Args:
            code: The function, the ``apply`` of a function of autograd, or a partial function of one.

        Returns:
            The rule; None if the function has not got the arguments that the rule needs, so that it is another one.
        """
        if isinstance(code, partial):
            inner = self.of(code.func)
            return None if inner is None else partial(inner, *code.args, **code.keywords)
        names = _names(code)
        if names is None or self._needed - {self.aliases.get(name, name) for name in names}:
            return None
        return partial(self._call, code)

    @cached_property
    def _needed(self) -> frozenset[str]:
        """Names of the rule's arguments that have no default."""
        own = inspect.signature(self.rule).parameters.values()
        return frozenset(parameter.name for parameter in own if parameter.default is parameter.empty)

    def _call(self, code: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """Return the rule's result for arguments of this function."""
        signature = cast(inspect.Signature, _signature(code))
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            is_further = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
            given |= value if is_further else {name: value}
        known = inspect.signature(self.rule).parameters
        arguments = {}
        for name, value in given.items():
            if self.aliases.get(name, name) in known:
                arguments[self.aliases.get(name, name)] = value
            elif name not in _WITHOUT_EFFECT | self.ignored and not _is_default(signature, name, value):
                raise UnsupportedModelError(
                    f"The kernel {self.name!r} was called with {name!r}, which its rule does not follow. Call it "
                    "without, or register a rule of your own (captum_ssm.register_rule)."
                )
        dtype = traced(arguments)[0].value.dtype if traced(arguments) else None
        try:
            return self.rule(**tree_map(partial(_widened, dtype), arguments))
        except (UnsupportedModelError, torch.OutOfMemoryError):
            raise
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise UnsupportedModelError(
                f"The rule of the kernel {self.name!r} does not fit its arguments: {error} Take the rule away "
                "(captum_ssm.unregister_rule), or register one of your own (captum_ssm.register_rule)."
            ) from error


def kernel(*names: str, ignored: str = "", **aliases: str) -> Callable[[Rule], Rule]:
    """Return a decorator that registers the rule of a kernel.

    Args:
        *names: Names of the functions, or of the functions of autograd.
        ignored: Names of arguments that have no effect, between spaces.
        **aliases: From names of arguments to those of the rule.

    Returns:
        A decorator for the kernel's first result in functions that have a rule.
    """

    def decorate(rule: Rule) -> Rule:
        for name in names:
            EXTERNAL_CODE.add(name, Kernel(name, rule, aliases, frozenset(ignored.split())), rule)
        return rule

    return decorate


class Unfollowed(Tensor):
    """A further result of a kernel, such as its last state: refused as soon as something is computed from it."""

    name: str

    @classmethod
    def of(cls, result: Any, name: str) -> Any:
        """Return the same nest of results of a kernel, refused when they are read."""

        def refused(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            part = leaf.detach().as_subclass(cls)
            vars(part).update(name=name)
            return part

        return tree_map(refused, result)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        """Refuse the function.

        Raises:
            UnsupportedModelError: Always.
        """
        names = [vars(leaf)["name"] for leaf in (*args, *(kwargs or {}).values()) if type(leaf) is cls]
        of_which = f" of {names[0]!r}" if names else ""
        raise UnsupportedModelError(
            f"The model reads a further result{of_which}, such as its last state, with {func.__name__!r}. The rule "
            "follows the first result alone. Run the model without a cache (use_cache=False), or register a rule of "
            "your own (captum_ssm.register_rule)."
        )


def _names(code: Callable[..., Any]) -> Sequence[str] | None:
    """Return the names of a function's arguments, far faster than its signature does; None if it has none."""
    if type(code) is not FunctionType or vars(code):  # such as a method, or a function with another one's signature
        signature = _signature(code)
        return None if signature is None else list(signature.parameters)
    own = code.__code__
    count = own.co_argcount + own.co_kwonlyargcount + bool(own.co_flags & inspect.CO_VARKEYWORDS)
    return None if own.co_flags & inspect.CO_VARARGS else own.co_varnames[:count]


def _signature(code: Callable[..., Any]) -> inspect.Signature | None:
    """Return the signature of a function, or of the forward run of a function of autograd; None if it has none."""
    owner = getattr(code, "__self__", None)
    try:
        if isinstance(owner, type) and issubclass(owner, Function):
            parameters = list(inspect.signature(owner.forward).parameters.values())
            has_context = owner.setup_context is Function.setup_context
            signature = inspect.Signature(parameters[has_context:])
        else:
            signature = inspect.signature(code)
    except (TypeError, ValueError):
        return None
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    return None if inspect.Parameter.VAR_POSITIONAL in kinds else signature


def _is_default(signature: inspect.Signature, name: str, value: Any) -> bool:
    parameter = signature.parameters.get(name)
    return value is None or value is False or (parameter is not None and value is parameter.default)


def _widened(dtype: torch.dtype | None, leaf: Any) -> Any:
    """Return a constant without its graph, in at least the type of the traced arguments; all else as it is."""
    if dtype is None or not isinstance(leaf, Tensor) or traced(leaf) or not leaf.is_floating_point():
        return leaf
    return leaf.detach().to(torch.promote_types(leaf.dtype, dtype))
