"""Explain a batch of rows: from columns to columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from captum_ssm.datasets.batches import batches
from captum_ssm.datasets.columns import Columns, columns_of, rows_of, with_input
from captum_ssm.datasets.ready import Ready
from captum_ssm.datasets.settings import Settings


@dataclass
class Explain(Settings):
    """Explain rows: a function from columns to these columns and those of the explanation.

    It fits ``datasets.Dataset.map(explain, batched=True)``, ``ray.data.Dataset.map_batches``, a loop over a
    ``DataLoader`` and ``accelerate``'s ``split_between_processes``. It can be pickled; the model is loaded when it is
    first needed, once a process. A row that cannot be explained has its error in the column ``error``, and empty
    columns; all other rows are explained.

    The columns of the explanation: for texts ``ids``, ``tokens``, ``starts`` and ``ends`` (where each token stands in
    the text); for tensors ``shapes``. For both ``scores``; ``target``, ``contrast`` and ``prediction`` (numbers, -1 for
    none) and their names; ``probability`` of the prediction; ``value``, F(x); ``reference_value``, F(x');
    ``completeness``, the error of the sum of the scores and the terms that belong to no token; ``fidelity``, the
    largest relative error of a layer's decomposition in the row's batch; with ``layers`` the shares of the layers;
    ``error``, empty if there is none. A number that a method does not know is NaN. An input column of one of these
    names is kept as ``input_`` and its name.

    The scores of a row depend on its batch by rounding, and batches are made of the rows of one call by their lengths
    alone: the same call gives the same bits again, in any process.

    Args:
        model: A module, a folder or a name on the hub (loaded by transformers), or a function without arguments that
            loads a model, or a model with its tokenizer.
        tokenizer: The tokenizer, or a function that loads it; None: that of ``model``, or none for rows of ids.
        method: ``"relevance"``, ``"attribution"``, ``"rollout"``, ``"raw"``, or a function from a forward function and
            the model to a method of this package, such as a class with some options bound by ``functools.partial``.
        column: The column of texts, or of rows of token ids.
        prepare: For any other model: a function from a row, its columns by name, to the inputs for it, a tensor or a
            tuple of tensors without the dimension of the batch.
        forward: For any other model: a function from the model and its inputs to the outputs, (B, V) or (B,); None
            calls the model.
        target: The outcome to explain in all rows, by name or number; None: the prediction.
        target_column: A column that names it for each row; where it is empty, the prediction.
        contrast: Explain why the target and not this one; ``"runner-up"``: not the most probable other one.
        contrast_column: A column that names it for each row.
        classes: The outcomes, by name or number, that a prediction is chosen among; None: all.
        score: ``"log-probability"`` or ``"logit"``, the output as it is; None: the first for a language model.
        reference: For relevance. Of texts: a word, an id, ``"unk"``, ``"pad"``, ``"mask"``, or ``"none"`` for frozen
            gates; None takes the first special token that the model has. Of tensors: a number or tensor, or a tuple of
            one for each input; None freezes the gates.
        patches: Of images: the scores of the patches, not of the pixels.
        layers: For relevance: also the share of the score that passes each known layer, at one more explanation.
        max_tokens: The longest text; None: that of tokenizer and model.
        truncate: Cut a longer one off, rather than refuse it.
        padding: The side of the padding; None: measured on the model.
        batch_tokens: Tokens of a batch, padding included.
        batch_rows: Rows of a batch at most.
        device: The device to move the model to; None leaves it where it is.
        threads: Threads of torch on a CPU: another number may give other bits. None: as it is set.

    Raises:
        InvalidInputError: If an option is unknown, two do not go together, or when it is called a column is missing.
        UnsupportedModelError: When it is first called, if the method does not know the model.
        ModelStateError: When it is first called, if the model is in training mode.

    Example:
        >>> from captum_ssm.datasets import Explain
        >>> from captum_ssm.models import REVIEWS
        >>> explain = Explain(REVIEWS, classes=("negative", "positive"), contrast="runner-up")
        >>> rows = explain({"text": ["a gorgeous, witty film", "", "a waste of time"]})
        >>> rows["prediction_name"], rows["error"][1]
        (['positive', '', 'negative'], 'InvalidInputError: the text is empty: it has no token to explain.')
    """

    _ready: Ready | None = field(default=None, init=False, repr=False, compare=False)

    def __call__(self, columns: Any, *, on_rows: Callable[[int], object] = lambda count: None) -> Columns:
        """Explain rows.

        Args:
            columns: Columns by name, each a list, an array or a tensor; or a list of rows, each a dictionary.
            on_rows: Called with the number of rows whenever some are done.

        Returns:
            The same columns, and those of the explanation.
        """
        table = columns_of(columns)
        rows = rows_of(table, [*([] if self.prepare is not None else [self.column]), *self.question.columns()])
        return with_input(table, self.explained(rows, on_rows))

    def explained(
        self,
        rows: Sequence[Mapping[str, Any]],
        on_rows: Callable[[int], object] = lambda count: None,
        errors: Mapping[int, str] | None = None,
    ) -> Columns:
        """Return the columns of the explanation alone.

        Args:
            rows: The columns of each row by name.
            on_rows: Called with the number of rows whenever some are done.
            errors: Errors that rows already have by number; such rows are not explained.

        Returns:
            Columns of as many entries as there are rows.
        """
        errors = errors or {}
        free = [k for k in range(len(rows)) if k not in errors]
        with _threads(self.threads):
            ready, found = self.ready(), dict[int, dict[str, Any]]()
            for k, error in errors.items():
                found[k] = ready.failed(None, error)
            examples = dict(zip(free, ready.examples.prepare([rows[k] for k in free])))
            for k, example in examples.items():
                if isinstance(example, Exception):
                    found[k] = ready.failed(None, told(example))
            on_rows(len(found))
            good = [k for k in free if k not in found]
            asked = {k: self.question.asked(rows[k]) for k in good}
            kinds = [
                ((ready.examples.key(examples[k])[0], asked[k][1] is None), ready.examples.key(examples[k])[1])
                for k in good
            ]
            for batch in batches(kinds, self.batch_tokens, self.batch_rows):
                numbers = [good[k] for k in batch]
                explained = _each(ready, [(examples[k], asked[k]) for k in numbers])
                found.update(zip(numbers, explained))
                on_rows(len(numbers))
        return {name: [found[k][name] for k in range(len(rows))] for name in ready.failed(None, "")}

    def ready(self) -> Ready:
        """Return the loaded model with its method; it is loaded when this is first called, once a process.

        Raises:
            InvalidInputError: If it cannot be loaded, or a reference is unknown.
            ModelStateError: If the model is in training mode.
            UnsupportedModelError: If the method does not know the model.
        """
        if self._ready is None:
            self._ready = Ready(self)
        return self._ready

    def __getstate__(self) -> dict[str, Any]:
        """Return the settings, which are pickled, and not the loaded model."""
        return {**vars(self), "_ready": None}


def _each(ready: Ready, pairs: Sequence[tuple[Any, Any]]) -> list[dict[str, Any]]:
    """Return the columns of each row of a batch; if it fails, those of its halves, so that an error stays with its row.

    Args:
        ready: The loaded model.
        pairs: The example of each row, and the outcomes that it asks about.

    Returns:
        The columns of each row by name.
    """
    try:
        return ready.rows([example for example, _ in pairs], [asked for _, asked in pairs])
    except Exception as error:  # of the model's own code, too
        if len(pairs) == 1:
            return [ready.failed(pairs[0][0], told(error))]
    middle = len(pairs) // 2
    return _each(ready, pairs[:middle]) + _each(ready, pairs[middle:])


def told(error: BaseException) -> str:
    """Return an error as the text of a row: its kind and its message, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Let torch use so many threads while the context is open; None changes nothing.

    Yields:
        None.
    """
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
