"""Code that has a rule of its own, such as a fused kernel: the rule runs instead, and the code itself checks it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from captum_ssm.errors import FidelityError
from captum_ssm.layers.fidelity import TOLERANCE, relative_error
from captum_ssm.network.threads import original, substitute
from captum_ssm.relevance.call import constants
from captum_ssm.relevance.functions import EXTERNAL_CODE
from captum_ssm.relevance.plain import PlainArguments
from captum_ssm.relevance.traced import traced


def substitute_rules(model: nn.Module, plain: PlainArguments, stack: ExitStack) -> None:
    """Run the rules of named code instead of the code, until the stack is closed.

    Args:
        model: The model whose modules, and the functions that their files call, are looked up.
        plain: Turns arguments into those of the code itself.
        stack: Restores the code.
    """
    for name, module in model.named_modules():
        rule = EXTERNAL_CODE.of_class(module)
        if rule is not None:
            ruled = partial(_RuledCode, name, type(module).__name__, rule=partial(rule, module), plain=plain)
            substitute(module, "forward", ruled, stack)
    for path in {c.__module__ for module in model.modules() for c in type(module).__mro__} & sys.modules.keys():
        home = sys.modules[path]
        for registered, rule in EXTERNAL_CODE.items():
            where, _, name = registered.rpartition(".")
            code = original(vars(home).get(name))
            if where in ("", path) and callable(code) and not isinstance(code, type):
                substitute(home, name, partial(_RuledCode, f"{path}.{name}", registered, rule=rule, plain=plain), stack)


@dataclass(frozen=True)
class _RuledCode:
    """Stands in for code that has a rule: gives the rule's result, checked by that of the code itself.

    Args:
        name: The name of the code in errors.
        registered: The name that the rule is registered for.
        code: The code.
        rule: The same function, made of functions that have a row.
        plain: Turns arguments into those of the code itself.
    """

    name: str
    registered: str
    code: Callable[..., Any]
    rule: Callable[..., Any]
    plain: PlainArguments

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not traced((args, kwargs)):
            return self.code(*args, **kwargs)
        result = self.rule(*args, **kwargs)
        plain_args, plain_kwargs = self.plain((args, kwargs))
        with torch.no_grad():
            exact = self.code(*plain_args, **plain_kwargs)
        for part, expected in zip(tree_leaves(result), tree_leaves(exact)):
            error, allowed = relative_error(constants(part), expected), TOLERANCE.get(expected.dtype, 1e-4)
            if not error <= allowed:
                cause = f"a wrong rule for {self.registered} (captum_ssm.register_rule)"
                raise FidelityError(self.name, error, allowed, cause)
        return result
