"""Load a model and its tokenizer: with a PEFT adapter on it, quantised, or spread over several devices."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from captum_ssm import models
from captum_ssm.cli.problems import MISSING_EXTRA, CommandError
from captum_ssm.datasets.loading import classifies

IN_FLOATING_POINT = ("lm_head", "score", "dt_proj")
"""Parts of a quantised model that are not quantised: the outputs, and a part whose weight Mamba's own code multiplies
by, which it cannot do once the weight is packed."""


@dataclass(frozen=True)
class Placement:
    """How the numbers of a model are stored, and where.

    Attributes:
        dtype: Name of a floating-point type of torch.
        device: A device of torch.
        load_in: ``"8bit"`` or ``"4bit"``, or None for floating point.
        device_map: A strategy of accelerate such as ``"auto"``, or a dictionary from parts to devices as JSON; None for
            the one device.
    """

    dtype: str = "float32"
    device: str = "cpu"
    load_in: str | None = None
    device_map: str | None = None

    @property
    def where(self) -> str:
        """The device, or the devices, in words."""
        return f"device {self.device!r}" if self.device_map is None else f"devices {self.device_map!r}"

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of ``from_pretrained``.

        Raises:
            CommandError: If a package is missing, or the map is no JSON.
        """
        arguments: dict[str, Any] = {"dtype": getattr(torch, self.dtype)}
        if self.device_map is not None or self.load_in is not None:
            _require("accelerate", "--device-map" if self.load_in is None else "--load-in", "quantized")
            arguments["device_map"] = {"": self.device} if self.device_map is None else _device_map(self.device_map)
        if self.load_in is not None:
            _require("bitsandbytes", "--load-in", "quantized")
            from transformers import BitsAndBytesConfig

            arguments["quantization_config"] = BitsAndBytesConfig(
                **{f"load_in_{self.load_in}": True},
                llm_int8_skip_modules=list(IN_FLOATING_POINT),
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=getattr(torch, self.dtype),
            )
        return arguments


def load(source: str, placement: Placement) -> tuple[Any, Any]:
    """Load a model and its tokenizer.

    Args:
        source: A folder, or a name on the hub; also the folder of a PEFT adapter, which names the model that it is for.
        placement: How the model is stored, and where.

    Returns:
        The model in evaluation mode, and its tokenizer: the adapter's, if it has one.

    Raises:
        CommandError: If a package is missing, the model cannot be loaded or run, or its tokenizer is not a fast one.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise CommandError(MISSING_EXTRA) from error
    logging.set_verbosity_error()
    adapter = Path(source) / "adapter_config.json"
    base, arguments = _base(adapter) if adapter.is_file() else source, placement.arguments()
    if base == str(models.REVIEWS):
        logging.disable_progress_bar()
    if not Path(base).exists() and base.startswith((".", "/", "~")):
        raise CommandError(f"cannot load a model from {base!r}: there is no such folder.")
    with _named(f"a model from {base!r} to {placement.where}"):
        config = AutoConfig.from_pretrained(base)
        is_classifier = classifies(config)
        if adapter.is_file():
            is_classifier = _adapter_config(adapter).get("task_type") == "SEQ_CLS"
        if torch.device(placement.device).type == "cpu" and hasattr(config, "use_mamba_kernels"):
            config.use_mamba_kernels = False  # earlier releases run no Jamba or Zamba on a CPU with the default
        auto = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
        model = auto.from_pretrained(base, config=config, **arguments)
    if adapter.is_file():
        with _named(f"the adapter in {source!r} on {base!r} (is it complete, and that model's?)"):
            from peft import PeftModel

            warnings.filterwarnings("error", message="Found missing adapter keys")
            model = PeftModel.from_pretrained(model, source)
    with _named(f"a model from {source!r} to {placement.where}"):
        model = model.eval() if "device_map" in arguments else model.eval().to(placement.device)
        tokenizer = AutoTokenizer.from_pretrained(source if (Path(source) / "tokenizer.json").is_file() else base)
    if "device_map" in arguments:
        _refuse_failing(model, placement)
    if not tokenizer.is_fast:
        raise CommandError(f"the tokenizer of {source!r} cannot say where its tokens stand; use a fast tokenizer.")
    return model, tokenizer


def _refuse_failing(model: Any, placement: Placement) -> None:
    """Raise if the code of a quantised or spread model, or a kernel of its layers, fails on two tokens.

    Raises:
        CommandError: With its error.
    """
    try:
        with torch.no_grad():
            model(torch.zeros(1, 2, dtype=torch.long, device=model.device))
    except Exception as error:  # each kernel has its own
        how, remedy = f"on {placement.where}", "leave --device-map out, or spread it otherwise"
        if placement.load_in is not None:
            how, remedy = f"in {placement.load_in}", "leave --load-in out, or load it in other bits"
        raise CommandError(f"the model itself cannot run {how} here ({_told(error)}); {remedy}.") from error


def _base(adapter: Path) -> str:
    """Return the name of the model that an adapter is for.

    Raises:
        CommandError: If the adapter does not name it, or peft is not installed.
    """
    _require("peft", f"the adapter in {str(adapter.parent)!r}", "peft")
    base = _adapter_config(adapter).get("base_model_name_or_path")
    if not base:
        raise CommandError(
            f"{str(adapter)!r} does not name the model that the adapter is for; add base_model_name_or_path to it."
        )
    return str(base)


def _adapter_config(adapter: Path) -> dict[str, Any]:
    """Return the configuration of an adapter.

    Raises:
        CommandError: If the file is no JSON.
    """
    try:
        config: dict[str, Any] = json.loads(adapter.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CommandError(f"cannot read {str(adapter)!r}: {error}") from error
    return config


def _device_map(text: str) -> Any:
    """Return a map of devices: a dictionary from JSON, or a strategy or device by its name.

    Raises:
        CommandError: If it begins as JSON and is none.
    """
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise CommandError(
            f'--device-map is no JSON: {error}; write \'{{"backbone": "cpu", "lm_head": 0}}\'.'
        ) from error


def _require(package: str, user: str, extra: str) -> None:
    """Raise if a package is not installed.

    Raises:
        CommandError: With the extra that has it.
    """
    if find_spec(package) is None:
        raise CommandError(f"{user} needs {package}: pip install 'captum-ssm[{extra}]'")


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Say in the errors of the libraries that load a model what could not be loaded.

    Args:
        what: In words. Filters of warnings that are set within hold within alone.

    Yields:
        None.

    Raises:
        CommandError: For such an error.
    """
    try:
        with warnings.catch_warnings():
            yield
    except Exception as error:  # each library has its own
        raise CommandError(f"cannot load {what}: {_told(error)}") from error


def _told(error: Exception) -> str:
    """Return the message of an error, with its kind where the message is a key alone."""
    return f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
