"""Code that has a rule of its own, such as a fused kernel: the rule runs instead, and the code itself checks it."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from captum_ssm.errors import FidelityError
from captum_ssm.layers.fidelity import TOLERANCE, relative_error
from captum_ssm.network.threads import substitute
from captum_ssm.relevance.call import constants
from captum_ssm.relevance.called_code import called_code
from captum_ssm.relevance.functions import EXTERNAL_CODE
from captum_ssm.relevance.kernels import Kernel, Unfollowed
from captum_ssm.relevance.plain import PlainArguments
from captum_ssm.relevance.traced import traced


def substitute_rules(model: nn.Module, plain: PlainArguments, stack: ExitStack) -> None:
    """Run the rules of named code instead of the code, until the stack is closed.

    Args:
        model: The model whose modules, and the functions that their code calls, are looked up.
        plain: Turns arguments into those of the code itself.
        stack: Restores the code.
    """
    for name, module in model.named_modules():
        rule = EXTERNAL_CODE.of_class(module)
        if rule is not None and not isinstance(rule, Kernel):
            of_module = partial(rule, module)
            ruled = partial(_RuledCode, name, type(module).__name__, rule=of_module, plain=plain, running=set())
            substitute(module, "forward", ruled, stack)
    running: set[str] = set()
    for called in called_code(model, frozenset(EXTERNAL_CODE)):
        registered = next((name for name in called.names if name in EXTERNAL_CODE), None)
        rule = None if registered is None else EXTERNAL_CODE[registered]
        if isinstance(rule, Kernel):
            rule = rule.of(called.code)
        if registered is not None and rule is not None:
            name = f"{called.path}.{called.name if called.name != 'apply' else registered}"
            ruled = partial(_RuledCode, name, registered, rule=rule, plain=plain, running=running)
            substitute(called.home, called.name, ruled, stack)


@dataclass(frozen=True)
class _RuledCode:
    """Stands in for code that has a rule: gives the rule's result, checked by that of the code itself.

    If the rule gives the first of several results, the others are refused when they are read.

    Args:
        name: The name of the code in errors.
        registered: The name that the rule is registered for.
        code: The code.
        rule: The same function, made of functions that have a row.
        plain: Turns arguments into those of the code itself.
        running: Names whose rules are running: such a rule may call code of its own name, which is then followed.
    """

    name: str
    registered: str
    code: Callable[..., Any]
    rule: Callable[..., Any]
    plain: PlainArguments
    running: set[str]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.registered in self.running or not traced((args, kwargs)):
            return self.code(*args, **kwargs)
        self.running.add(self.registered)
        try:
            result = self.rule(*args, **kwargs)
        finally:
            self.running.discard(self.registered)
        plain_args, plain_kwargs = self.plain((args, kwargs))
        with torch.no_grad():
            exact = self.code(*plain_args, **plain_kwargs)
        if isinstance(result, Tensor) and isinstance(exact, (list, tuple)) and exact:
            result = (result, *Unfollowed.of(tuple(exact[1:]), self.registered))
        for part, expected in zip(tree_leaves(result), tree_leaves(exact)):
            if not isinstance(expected, Tensor) or isinstance(part, Unfollowed):
                continue
            allowed = TOLERANCE.get(expected.dtype, 1e-4)
            error = relative_error(constants(part), expected) if part.shape == expected.shape else math.inf
            if not error <= allowed:
                cause = f"a wrong rule for {self.registered} (captum_ssm.register_rule)"
                raise FidelityError(self.name, error, allowed, cause)
        return result
