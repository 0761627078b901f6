"""Measure which token of the inputs each token of each mixer is.

A rollout presumes that token i of a mixer is token i of the inputs. With the mixers' outputs held fixed, the gradient
of a mixer's input with respect to each earlier output, and to the inputs, tells which token reads which. A
rearrangement is followed; all else is refused by name. Token ids have no gradient: other ids are tried instead. At
last other values are tried, for what passes where a gradient does not (:mod:`captum_ssm.network.hidden_paths`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from captum_ssm.errors import UnsupportedModelError
from captum_ssm.network.graph import EMBEDDINGS, OTHERS, ResidualGraph
from captum_ssm.network.held_run import HeldRun, gradients, tokens_first, weighed
from captum_ssm.network.hidden_paths import refuse_hidden_paths
from captum_ssm.network.other_ids import IdReadings, read_ids
from captum_ssm.network.token_codes import NONE, SEVERAL, decoded, reaches_itself_alone, sources, token_codes


def refuse_other_tokens(held: HeldRun) -> None:
    """Raise if a call has another number of sequences or tokens than the inputs.

    Args:
        held: The run with the mixers' outputs held fixed.

    Raises:
        UnsupportedModelError: With both numbers.
    """
    count, length = len(held.inputs), held.length
    for call in held.calls:
        sequences, tokens = call.x.shape[:2]
        if sequences != count:
            happened = (
                f"{sequences} sequences of {tokens} tokens for inputs of {count} examples, as if several texts of an "
                "example were stacked in one batch, or rows, columns, windows or variates folded into it"
            )
        elif tokens != length:
            happened = (
                f"{tokens} tokens for inputs of {length}, as if tokens were cut, joined to patches or put in front"
            )
        else:
            continue
        raise UnsupportedModelError(_reason(f"Layer '{call.name}'", f"was called with {happened}"))


def follow_tokens(model: nn.Module, run: Callable[[Tensor], Tensor], held: HeldRun, mask: Tensor) -> ResidualGraph:
    """Return the residual graph with the order of the tokens in each call.

    Args:
        model: The model that holds the mixers.
        run: From inputs to the explained output.
        held: The run with the mixers' outputs held fixed.
        mask: 1 at real tokens and 0 at padding, (B, L).

    Returns:
        The graph: streams that read the inputs have :data:`~captum_ssm.network.graph.EMBEDDINGS` among their summands.

    Raises:
        UnsupportedModelError: If a call's tokens are not the inputs' tokens, in whichever order, or the output reads
            the inputs past the mixers; the message names the layer.

    Cost: about log2(L) + log2(log2(L)) backward passes of all but the mixers, as many forward passes, and for token ids
    as many again.
    """
    if held.length == 1:
        return held.graph
    ids = read_ids(model, run, held, mask) if held.takes_ids else None
    tracker = _Tracker(held, ids, mask)
    with torch.enable_grad():
        graph = tracker.graph()
        of_output = tracker.order_of_output(graph)
    refuse_hidden_paths(model, run, held, graph, of_output)
    return graph


def _reason(name: str, happened: str) -> str:
    return (
        f"{name} {happened}. Its tokens are not the tokens of the inputs, so scores of one cannot be given to "
        "the other. Explain the part of the model behind this step, with the vectors that enter it as inputs, or use "
        "ImplicitAttentionRelevance, which follows every function."
    )


@dataclass
class _Tracker:
    """The orders of the calls, found one after another.

    Args:
        held: The run with the mixers' outputs held fixed.
        ids: What token ids change, None for vectors and images.
        mask: 1 at real tokens and 0 at padding, (B, L).
    """

    held: HeldRun
    ids: IdReadings | None
    mask: Tensor

    def graph(self) -> ResidualGraph:
        """Return the residual graph.

        Raises:
            UnsupportedModelError: If tokens are not the inputs' tokens.
        """
        calls = self.held.calls
        reads = [self._summands(number) for number in range(len(calls))]
        output = self._measured(self.held.graph.output, None if self.ids is None else self.ids.output)
        if self._all_in_order():
            orders: list[Tensor | None] = [None] * len(calls)
        else:
            orders = []
            for call in calls:
                orders.append(self._order(f"Layer '{call.name}'", call.x, self._ids_of(len(orders)), orders))
        return ResidualGraph(reads, output, orders)

    @cached_property
    def _codes(self) -> Tensor:
        return token_codes(self.held.length).to(self.held.calls[0].x.device)

    def _ids_of(self, number: int) -> Tensor | None:
        return None if self.ids is None else self.ids.calls[number]

    def _summands(self, number: int) -> frozenset[int]:
        """Return the summands of the stream that a call reads.

        Raises:
            UnsupportedModelError: If it reads vectors that do not come from the inputs, and nothing else.
        """
        traced = self.held.graph.reads[number]
        stream = self._measured(traced, None if self.ids is None else self.ids.calls[number])
        if traced and not stream:
            name = f"Layer '{self.held.calls[number].name}'"
            raise UnsupportedModelError(_reason(name, "reads a second sequence, which does not come from the inputs"))
        return stream

    def _measured(self, traced: frozenset[int], changed: Tensor | None) -> frozenset[int]:
        """Return a stream whose summands contain the embeddings if it was seen to change with the ids."""
        if self.ids is None or changed is None:
            return traced - {OTHERS}
        if not self.ids.tried:
            return frozenset(max(summand, EMBEDDINGS) for summand in traced)
        return traced - {OTHERS, EMBEDDINGS} | ({EMBEDDINGS} if bool(changed.any()) else set())

    # --- Which token reads which

    @property
    def _sources(self) -> list[Tensor]:
        """The mixers' outputs, and inputs that have a gradient."""
        return [*(call.y for call in self.held.calls), *([] if self.ids is not None else [self.held.inputs])]

    def _observed(self, readers: Sequence[Tensor]) -> list[Tensor]:
        """Return the rounds in which each place of each source has a gradient, (B, P, rounds).

        Places are the tokens of a mixer's output or of embeddings, and the entries of images.
        """
        values = [weighed(reader) for reader in readers]
        rounds: list[list[Tensor]] = [[] for _ in self._sources]
        for marked in self._codes.T:
            score = torch.stack([value[:, marked].sum() for value in values]).sum()
            for bits, gradient in zip(rounds, gradients(score, self._sources)):
                bits.append(_places(gradient))
        return [torch.stack(bits, -1) for bits in rounds]

    @cached_property
    def _pixels(self) -> Tensor:
        """The rounds of the tokens of the first call that read each entry of an image, (B, P, rounds)."""
        for call, reads in zip(self.held.calls, self.held.graph.reads):
            if EMBEDDINGS in reads:
                return self._observed([call.x])[-1]
        return self._observed([self.held.calls[0].x])[-1]

    def _all_in_order(self) -> bool:
        """Whether each token of every call reads the token of its own number alone."""
        if self.ids is not None and not all(map(reaches_itself_alone, self.ids.calls)):
            return False
        observed = self._observed([call.x for call in self.held.calls])
        if self.held.takes_images and bool((observed.pop() & ~self._pixels).any()):
            return False
        return all(map(reaches_itself_alone, observed))

    def _order(self, name: str, x: Tensor, from_ids: Tensor | None, orders: Sequence[Tensor | None]) -> Tensor | None:
        """Return the token of the inputs that each token of ``x`` is, (B, L); None if it has the same number."""
        L = self.held.length
        here = torch.arange(L, device=x.device).expand(len(x), -1)
        found = []
        observed = self._observed([x])
        for number, order in enumerate(orders):
            source = sources(decoded(observed[number], L), here, L)
            found.append(source if order is None else _composed(order, source))
        if from_ids is not None:
            found.append(decoded(from_ids, L))
        elif self.held.takes_images:
            found.append(self._by_pixels(observed[-1], here))
        else:
            found.append(sources(decoded(observed[-1], L), here, L))
        return self._checked(name, _merged(found), here)

    def _by_pixels(self, observed: Tensor, here: Tensor) -> Tensor:
        """Return the token of the first call that reads the pixels of each token, (B, L)."""
        L = self.held.length
        read = observed.any(-1)
        if not bool(read.any()):
            return torch.full_like(here, NONE)
        if bool(observed.eq(self._pixels)[read].all()):
            return here
        source = sources(decoded(observed, L), decoded(self._pixels, L), L)
        unread = source.eq(NONE)
        complete = bool(read.eq(self._pixels.any(-1)).all())
        turned = here.flip(1)
        if complete and bool(unread.any()) and bool(source.eq(turned)[~unread].all()):  # tokens without pixels
            return turned
        return source

    def _checked(self, name: str, source: Tensor, here: Tensor) -> Tensor | None:
        """Return a rearrangement; None if there is none.

        Raises:
            UnsupportedModelError: If tokens are mixed, shifted, cut or repeated.
        """
        if bool(source.eq(SEVERAL).any()):
            raise UnsupportedModelError(
                _reason(name, "reads several tokens of the inputs as one, since code before it mixes tokens")
            )
        known = source.ge(0)
        if bool(source.eq(here)[known].all()):
            return None
        if bool(known.all()) and bool(source.sort(1).values.eq(here).all()):
            if not bool(self.mask.bool().all()):
                raise UnsupportedModelError(
                    f"{name} has the tokens in another order than the inputs, so it is not known which of them are "
                    "padding. Explain sequences one by one, without padding."
                )
            return source
        steps = (source - here)[known].unique()
        if len(steps) == 1:
            raise UnsupportedModelError(_reason(name, f"reads tokens that are shifted by {abs(int(steps))}"))
        raise UnsupportedModelError(
            _reason(name, "reads tokens that are rearranged, with some of them cut or repeated")
        )

    # --- Which tokens the output reads

    def order_of_output(self, graph: ResidualGraph) -> Tensor | None:
        """Return the token of the inputs that each token of the output is, (B, L); None if all have the same number.

        Raises:
            UnsupportedModelError: If the output mixes tokens, or, having none, reads other tokens of the inputs than of
                the mixers' outputs.
        """
        if self.held.has_tokens(self.held.output):
            output = tokens_first(self.held.output, self.held.length)
            changed = None if self.ids is None else self.ids.output_tokens
            return self._order("The explained output", output, changed, graph.orders)
        self._refuse_other_paths(graph)
        return None

    def _refuse_other_paths(self, graph: ResidualGraph) -> None:
        """Raise if the output reads other tokens of the inputs than of the mixers' outputs.

        Raises:
            UnsupportedModelError: With the layer or the inputs.
        """
        read = self._read_by_output(graph)
        if not read:
            return
        last = max(read)
        for number, tokens in read.items():
            if bool(tokens.ne(read[last]).any()):
                of = f"the output of layer '{self.held.calls[number].name}'"
                raise UnsupportedModelError(self._other_path(of, last))
        if self._reads_inputs_elsewhere(read[last]):
            raise UnsupportedModelError(self._other_path("the inputs", last))

    def _other_path(self, of: str, last: int) -> str:
        return (
            f"The explained output reads other tokens of {of} than of the last layer '{self.held.calls[last].name}': "
            "tokens reach it on another path, such as a pooling, a convolution or a recurrence beside the layers, "
            "which an explanation would silently leave out. Explain the output of the layers alone, or use "
            "ImplicitAttentionRelevance, which follows every function."
        )

    def _read_by_output(self, graph: ResidualGraph) -> dict[int, Tensor]:
        """Return the tokens of each call's output that the explained output reads, (B, L) in the inputs' order."""
        slopes = gradients(weighed(self.held.output).sum(), [call.y for call in self.held.calls])
        read = {n: graph.in_order_of_inputs(n, slope.ne(0).any(-1)) for n, slope in enumerate(slopes)}
        return {number: tokens for number, tokens in read.items() if bool(tokens.any())}

    def _reads_inputs_elsewhere(self, read: Tensor) -> bool:
        """Whether the explained output reads the inputs at other tokens than ``read`` (B, L)."""
        if self.ids is not None:
            return self.ids.reach_output_elsewhere(read)
        (gradient,) = gradients(weighed(self.held.output).sum(), [self.held.inputs])
        reached = _places(gradient)
        if not self.held.takes_images:
            return bool((reached & ~read).any())
        allowed = ((~self._pixels).float() @ self._codes.float().T).eq(0)  # (B, P, L): whether the token may read it
        return bool((reached & ~(allowed & read.unsqueeze(1)).any(-1)).any())


def _places(gradient: Tensor) -> Tensor:
    """Return where a gradient is not zero, (B, P): at tokens (B, L, E), or at entries of images (B, C, H, W)."""
    return gradient.ne(0).any(-1) if gradient.dim() == 3 else gradient.ne(0).flatten(1)


def _composed(order: Tensor, source: Tensor) -> Tensor:
    """Return the tokens of the inputs that the tokens ``source`` of a call with this order are, (B, L)."""
    return torch.where(source >= 0, order.gather(1, source.clamp_min(0)), source)


def _merged(found: Sequence[Tensor]) -> Tensor:
    """Return the tokens that all sources agree on, (B, L); :data:`SEVERAL` where they do not."""
    merged = found[0]
    for source in found[1:]:
        conflict = (merged != source) & (merged != NONE) & (source != NONE)
        merged = torch.where(merged == NONE, source, merged).masked_fill(conflict, SEVERAL)
    return merged
