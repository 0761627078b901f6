"""A model and its tokenizer, loaded when they are first needed and once a process, and its identity."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import nn

from captum_ssm.errors import InvalidInputError

Source = nn.Module | str | Path | Callable[[], Any]
"""Where a model comes from: the model itself, a folder or a name on the hub, or a function that loads it."""

_LOADED: dict[bytes, tuple[Any, Any]] = {}
"""Models with their tokenizers that this process has loaded, by the pickled way to load them."""

_LOCK = Lock()


def loaded(source: Source, tokenizer: Any, device: str | None) -> tuple[Any, Any]:
    """Return a model with its tokenizer.

    Args:
        source: The model, or where it comes from. A function returns the model, or the model with its tokenizer.
        tokenizer: The tokenizer, a function without arguments that loads it, or None: that of the source.
        device: The device to move the model to; None leaves it where it is.

    Returns:
        The model in evaluation mode, and its tokenizer or None. The same two in every call of a process, but for a
        source that is the model itself.

    Raises:
        InvalidInputError: If the source is none.
    """
    if isinstance(source, nn.Module):
        return _moved(source, device), _tokenizer(tokenizer)
    if not isinstance(source, (str, Path)) and not callable(source):
        raise InvalidInputError(
            f"model must be a module, a folder, a name on the hub or a function that loads one, not {source!r}."
        )
    load = partial(from_pretrained, str(source)) if isinstance(source, (str, Path)) else source
    key = pickle.dumps((load, tokenizer, device))
    with _LOCK:
        if key not in _LOADED:
            result = load()
            model, own = result if isinstance(result, tuple) else (result, None)
            _LOADED[key] = _moved(model.eval(), device), _tokenizer(tokenizer) or own
        return _LOADED[key]


def from_pretrained(source: str) -> tuple[Any, Any]:
    """Load a model of transformers and its tokenizer.

    Args:
        source: A folder or a name on the hub.

    Returns:
        The classifier or the causal language model, as its configuration says, and its tokenizer.

    Raises:
        InvalidInputError: If it cannot be loaded, with the error of transformers, or transformers is not installed.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    except ImportError as error:
        raise InvalidInputError(
            "A model is loaded by its name with transformers: pip install 'captum-ssm[cli]'. Or pass the model itself."
        ) from error
    try:
        config = AutoConfig.from_pretrained(source)
        auto = AutoModelForSequenceClassification if classifies(config) else AutoModelForCausalLM
        return auto.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"cannot load a model from {source!r}: {error}") from error


def classifies(config: Any) -> bool:
    """Whether a configuration of transformers is that of a classifier of sequences."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])


def weights_digest(model: nn.Module) -> str:
    """Return a number, in hexadecimal, that changes with the name, type, shape and entries of any weight.

    Args:
        model: The model. Weights on device meta, which keep no values here, count by name, type and shape.

    Returns:
        32 digits. The same on every machine and device.
    """
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items(), key=lambda item: item[0]):
        for content in _content(name, tensor):
            digest.update(content)
    return digest.hexdigest()


def _content(name: str, tensor: Any) -> Iterator[bytes | memoryview]:
    """Yield all that tells a weight from others; of one made of tensors, as a shard or a quantised one, of each.

    Args:
        name: Its name.
        tensor: The weight.
    """
    yield repr((name, type(tensor).__name__)).encode()
    if not isinstance(tensor, torch.Tensor):
        return
    yield repr((str(tensor.dtype), tuple(tensor.shape))).encode()
    if hasattr(tensor, "__tensor_flatten__"):
        for part in tensor.__tensor_flatten__()[0]:
            yield from _content(part, getattr(tensor, part))
    elif not tensor.is_meta and tensor.numel():
        yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def vocabulary_digest(tokenizer: Any) -> str:
    """Return a number, in hexadecimal, that changes with how a tokenizer cuts texts; empty if there is none.

    Args:
        tokenizer: The tokenizer: all of a fast one counts, of another one its vocabulary.
    """
    if tokenizer is None:
        return ""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = repr(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    return blake2b(text.encode("utf-8", "replace"), digest_size=16).hexdigest()


def described(value: Any) -> Any:
    """Return a setting in words and numbers that JSON knows, the same in every process.

    Args:
        value: A number, a text, a function, a tensor, or a collection of such.

    Returns:
        The value itself where JSON knows it; of a function its name and all that is bound to it; of a tensor its
        digest.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [described(part) for part in value]
    if isinstance(value, dict):
        return {str(name): described(part) for name, part in sorted(value.items(), key=lambda item: str(item[0]))}
    if isinstance(value, partial):
        return [described(value.func), described(value.args), described(value.keywords)]
    if isinstance(value, torch.Tensor):
        return [
            list(value.shape),
            blake2b(value.detach().cpu().contiguous().numpy().tobytes(), digest_size=8).hexdigest(),
        ]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    own = {name: part for name, part in getattr(value, "__dict__", {}).items() if not name.startswith("_")}
    return [type(value).__name__, described(own)]


def _moved(model: Any, device: str | None) -> Any:
    return model if device is None else model.to(device)


def _tokenizer(tokenizer: Any) -> Any:
    """Return a tokenizer, loaded if it is a function that loads one."""
    return tokenizer() if callable(tokenizer) and not hasattr(tokenizer, "encode") else tokenizer
