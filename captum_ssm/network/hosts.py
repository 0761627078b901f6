"""Wrappers of other libraries around a model, known by how they are built; none of these libraries is imported.

Calling some hosts is calling the model inside, which is then called in their place. Others add to it, such as virtual
tokens, or pool its output: they are called themselves. A module with a model among its attributes and a ``forward`` of
its own, as a LightningModule, is no host: it is called as any other module.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, NamedTuple

from captum_ssm.errors import ModelStateError


class Host(NamedTuple):
    """One kind of wrapper.

    Attributes:
        parts: Names of attributes that all wrappers of this kind have, of their own or of their class.
        inside: Name of the attribute that is the model inside.
        call: ``"inside"``: the model inside is called in its place. ``"alike"``: it is called as the model inside.
            ``"features"``: it takes and returns a dictionary.
    """

    parts: tuple[str, ...]
    inside: str
    call: Literal["inside", "alike", "features"]


HOSTS = {
    "torch.compile": Host(("_orig_mod", "dynamo_ctx"), "_orig_mod", "alike"),
    "torch.nn.DataParallel": Host(("module", "device_ids", "scatter"), "module", "inside"),
    "nnsight": Host(("_module", "interleaver", "trace"), "_module", "inside"),
    "TransformerLens's bridge": Host(("original_model", "adapter", "run_with_hooks"), "original_model", "inside"),
    "PEFT": Host(("peft_config", "base_model", "get_nb_trainable_parameters"), "base_model", "alike"),
    "PEFT's tuner": Host(("peft_config", "inject_adapter", "model"), "model", "alike"),
    "sentence-transformers": Host(("0", "module_kwargs", "tokenizer"), "0", "features"),
    "sentence-transformers' first module": Host(("auto_model", "tokenizer", "save"), "auto_model", "features"),
}
"""The kinds of hosts by the library that has them."""


@lru_cache
def _possible_hosts(cls: type) -> list[tuple[Host, list[str]]]:
    """Return each kind of host, and the names of its parts that the class has not: an object must have them itself."""
    return [(host, [part for part in host.parts if not hasattr(cls, part)]) for host in HOSTS.values()]


def host_of(model: Any) -> Host | None:
    """Return the kind of host that this is; None for a model that stands alone."""
    own: dict[str, Any] = getattr(model, "__dict__", {})
    cls: Any = type(model)
    modules = own.get("_modules", {})
    for host, parts in _possible_hosts(cls):
        for part in parts:
            if part not in own and part not in modules:
                break
        else:
            return host
    return None


def called(forward_func: Any) -> Any:
    """Return the model inside a host that adds nothing to it, to be called in its place; any other value unchanged.

    Raises:
        ModelStateError: If the host has not loaded the model yet.
    """
    while (host := host_of(forward_func)) is not None and host.call == "inside":
        if vars(forward_func).get("dispatched") is False:
            raise ModelStateError(
                f"The {type(forward_func).__name__} has not loaded its weights yet. Call its dispatch() first."
            )
        forward_func = getattr(forward_func, host.inside)
    return forward_func


def inside(model: Any) -> Any:
    """Return the model inside all hosts around it; any other value unchanged."""
    while (host := host_of(model)) is not None:
        model = getattr(model, host.inside)
    return model


def takes_features(model: object) -> bool:
    """Whether this takes and returns a dictionary of features, as sentence-transformers' modules do."""
    host = host_of(model)
    return host is not None and host.call == "features"
