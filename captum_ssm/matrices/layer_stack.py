"""The mixers' calls of one run of a model, each decomposed and split when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import overload

from torch import Tensor, nn

from captum_ssm.layers.call import LayerCall
from captum_ssm.layers.fidelity import Decomposition, decompose
from captum_ssm.layers.wires import find_wire
from captum_ssm.matrices.split_layer import AttentionScope, SplitLayer, known_terms, refuse_unknown_terms, split_layer


@dataclass
class LayerStack(Sequence[SplitLayer]):
    """All layers of one run, split one by one, so that the gates of one layer are in memory at a time.

    Args:
        model: The model that holds the mixers.
        calls: Their recorded calls.
        mask: 1 at real tokens and 0 at padding, (B, L).
        scope: Scope of the attention, see :func:`~captum_ssm.matrices.split_layer.split_layer`.
        without: Names of factors and terms to leave out.
        tolerance: Allowed relative error of the decompositions; None chooses by the model's type.
        gradients: Gradient of the explained score at each call's output, (..., B, L, E), or None.
        on_layer: Called before each decomposition, for a progress bar.
        decompositions: Decompositions by number; given, they are kept and used again for other gradients.

    Attributes:
        fidelity: Relative error of every layer that was asked for, by layer name.
    """

    model: nn.Module
    calls: Sequence[LayerCall]
    mask: Tensor
    scope: AttentionScope
    without: Sequence[str] = ()
    tolerance: float | None = None
    gradients: Sequence[Tensor | None] = ()
    on_layer: Callable[[], object] = lambda: None
    decompositions: dict[int, Decomposition] | None = None
    fidelity: dict[str, float] = field(default_factory=dict)
    _terms: set[str] = field(default_factory=set)

    def __len__(self) -> int:
        """How many calls there are."""
        return len(self.calls)

    @overload
    def __getitem__(self, number: int) -> SplitLayer: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[SplitLayer]: ...
    def __getitem__(self, number: int | slice) -> SplitLayer | Sequence[SplitLayer]:
        """Decompose, check and split the call of this number.

        Returns:
            The split layer, or a list of several.

        Raises:
            FidelityError: If the decomposition misses the layer's own output.
            InvalidInputError: If nothing of the layer would be left, or padding changes its output.
        """
        if isinstance(number, slice):
            return [self[k] for k in range(*number.indices(len(self)))]
        call, layer = self.calls[number], self._decomposition(number)
        self.fidelity[call.name] = layer.error
        self._terms.update(known_terms(layer, self.scope))
        gradient = self.gradients[number] if self.gradients else None
        wire = find_wire(self.model, call.name, call.mixer, call.state)
        return split_layer(layer, self.scope, self.without, self.mask, gradient, wire)

    def refuse_unknown_terms(self) -> None:
        """Raise if ``without`` names a factor that no layer that was asked for has.

        Raises:
            InvalidInputError: With the names that can be left out.
        """
        refuse_unknown_terms(self._terms, self.scope, self.without)

    def _decomposition(self, number: int) -> Decomposition:
        if self.decompositions is not None and number in self.decompositions:
            return self.decompositions[number]
        self.on_layer()
        layer = decompose(self.calls[number], self.tolerance, self.mask)
        if self.decompositions is not None:
            self.decompositions[number] = layer
        return layer
