"""The laws of an explanation, each held against runs of the model alone.

An explanation is right or refused: by an error of the package, or by Captum's assertion about targets. What is not
refused has the shape of the inputs, is 0 at tokens that cannot change the score, adds up where it says so, is the same
in float64, one by one, again, and after other inputs, and leaves everything as it was.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from random import Random
from typing import Any

import torch
from torch import Tensor

import captum_ssm as cs
from captum_ssm.errors import FidelityError, InvalidInputError, ModelStateError, UnsupportedModelError
from tests.conftest import snapshot
from tests.properties.grammar import Case, drawn
from tests.properties.pieces import FROZEN, RELEVANCE, ROLLOUT, V

REFUSALS = (UnsupportedModelError, InvalidInputError, ModelStateError, FidelityError)
TOLERANCE = {torch.float64: 2e-5, torch.float32: 5e-3, torch.bfloat16: 0.3}
NOTHING = 1e-12
"""A change of the score in float64, relative to the score, that is none."""
LARGEST = 1e3
"""Larger scores come of rows that are divided by a sum of almost 0, which no two computations agree on."""


class BrokenLawError(Exception):
    """A law does not hold for an explanation that was given without a word."""


@dataclass
class Outcome:
    """What became of one method on one model: ``right``, the cause of a refusal, or ``WRONG`` and the broken law."""

    method: str
    result: str
    detail: str = ""

    @property
    def is_wrong(self) -> bool:
        """Whether a law is broken."""
        return self.result.startswith("WRONG")


@dataclass
class Method:
    """A method with drawn options: from a case to its scores.

    Args:
        name: In words.
        kind: Which refusals of a model are its own.
        make: The method of a case.
        options: From inputs to further arguments of ``attribute``.
        adds_up: Whether its scores and terms sum to a difference of scores.
        one_each: Whether a token whose vector can change the score must have a share of it.
    """

    name: str
    kind: str
    make: Callable[[Any, Any], Any]
    options: Callable[[Tensor], dict[str, Any]] = lambda inputs: {}
    adds_up: bool = False
    one_each: bool = False

    def explain(self, method: Any, case: Case, inputs: Tensor, args: tuple[Any, ...]) -> Tensor:
        """Return the scores."""
        scores: Tensor = method.attribute(inputs, case.target, args or None, **self.options(inputs))
        return scores


def _reference(inputs: Tensor, place: int | None, change: int) -> Any:
    """Return a reference: one id or 0.0 for all, or the inputs with another id or vector at one place."""
    if place is None:
        return change % V if not inputs.is_floating_point() else 0.0
    reference = inputs.clone()
    if inputs.is_floating_point():
        reference[:, place % inputs.shape[1]] = 0.5
    else:
        reference[:, place % inputs.shape[1]] = (inputs[:, place % inputs.shape[1]] + 1 + change % (V - 1)) % V
    return reference


def _matrix_method(draw: Random) -> Method:
    rollout, attribution, raw = cs.ImplicitAttentionRollout, cs.ImplicitAttentionAttribution, cs.RawImplicitAttention
    name: str = draw.choice(["root", "root", "absolute", "norm", "mean", "raw", "signed", "signed", "channel", "token"])
    if name == "raw":
        return Method("raw", ROLLOUT, lambda f, m: raw(f, m))
    if name in ("signed", "channel", "token"):
        rectify: Any = None if name == "signed" else name
        return Method(name, ROLLOUT, lambda f, m: attribution(f, m, rectify=rectify))
    fusion: Any = name
    return Method(f"rollout, {name}", ROLLOUT, lambda f, m: rollout(f, m, fusion=fusion), one_each=name != "mean")


def _relevance_method(draw: Random) -> Method:
    relevance = cs.ImplicitAttentionRelevance
    place, change = draw.choice([None, None, 0, 1, 3]), draw.randrange(V)
    options: dict[str, Any] = {}
    if draw.random() < 0.15:
        options["checkpoints"] = True
    if draw.random() < 0.15:
        options["value_share"] = 0.8
    make: Callable[[Any, Any], Any] = lambda f, m: relevance(f, m, **options)  # noqa: E731
    if draw.random() < 0.25:
        return Method("frozen", FROZEN, make, adds_up=True)
    name = f"relevance, reference of one {'text' if place is None else 'token'}{''.join(f', {o}' for o in options)}"
    return Method(name, RELEVANCE, make, lambda x: {"baselines": _reference(x, place, change)}, adds_up=True)


def methods(seed: int, number: int) -> list[Method]:
    """Draw two methods for a model: one of matrices between tokens, and one of relevance."""
    draw = Random(f"methods {seed}:{number}")
    return [_matrix_method(draw), _relevance_method(draw)]


# --- What the model alone says ----------------------------------------------------------------------------------------


def _rows(args: tuple[Any, ...], rows: Any) -> tuple[Any, ...]:
    return tuple(arg[rows] if isinstance(arg, Tensor) else arg for arg in args)


def _other(inputs: Tensor) -> Tensor:
    """Return quite other inputs of the same shape."""
    return torch.randint_like(inputs, V) if not inputs.is_floating_point() else 2 * torch.randn_like(inputs)


def changeable(case: Case, example: int = 0, tries: int = 3) -> Tensor:
    """Find, by exchanging one at a time, the entries of an example's inputs that can change the score.

    Args:
        case: A model in float64.
        example: The example.
        tries: How often each is exchanged, in each of three surroundings.

    Returns:
        Truth values in the shape of the example's inputs, (L,) or (L, E) or (C, H, W); the components of a vector share
        theirs.
    """
    inputs, args = case.inputs, case.args
    x, args = inputs[example : example + 1], _rows(args, slice(example, example + 1))
    # one place for each token or vector, and one for each pixel
    places: list[Any] = list(range(x.shape[1]))
    if case.takes_images:
        places = list(product(*(range(size) for size in x.shape[2:])))
    found = torch.zeros(x.shape[1:], dtype=torch.bool)
    for surrounding in (x, _other(x), _other(x)):
        if case.mask is not None:
            surrounding = torch.where(_spread(case.mask[example : example + 1], x), surrounding, x)
        texts = [surrounding]
        for place in places:
            for _ in range(tries):
                text, other = surrounding.clone(), _other(x)
                at = (slice(None), slice(None), *place) if case.takes_images else (slice(None), place)
                text[at] = other[at]
                texts.append(text)
        scores = case.readings(torch.cat(texts), tuple(_repeat(arg, len(texts)) for arg in args)).reshape(
            len(texts), -1
        )
        changed = ((scores[1:] - scores[0]).abs() > NOTHING * scores.abs().max()).any(1)
        for place, changes in zip(places, changed.reshape(len(places), -1).any(1)):
            found[(slice(None), *place) if case.takes_images else place] |= changes
    return found


def _spread(mask: Tensor, x: Tensor) -> Tensor:
    return mask.bool() if x.dim() == 2 else mask.bool().unsqueeze(-1).expand_as(x)


def _repeat(arg: Any, count: int) -> Any:
    return arg.expand(count, *arg.shape[1:]) if isinstance(arg, Tensor) else arg


def slopes(case: Case, example: int = 0) -> Tensor | None:
    """Measure, by small steps, how much the score depends on each token's vector, (L,); None if there are none.

    Args:
        case: A model in float64.
        example: The example.
    """
    parameters = next(case.model.parameters())
    if case.takes_images or (case.takes_ids and case.embedding is None) or parameters.dtype is not torch.float64:
        return None
    inputs, args = case.inputs, case.args
    L = inputs.shape[1]
    x = inputs[example : example + 1].expand(2 * L, *inputs.shape[1:])
    args = tuple(_repeat(arg, 2 * L) for arg in _rows(args, slice(example, example + 1)))
    steps = torch.cat([torch.eye(L), -torch.eye(L)]).double().unsqueeze(-1) * 1e-4
    direction = lambda v: torch.randn(v.shape[-1], generator=torch.Generator().manual_seed(0)).to(v)  # noqa: E731
    if case.takes_ids:
        assert case.embedding is not None
        handle = case.embedding.register_forward_hook(
            lambda m, a, y: y + steps * direction(y) if y.shape[:2] == steps.shape[:2] else y
        )
        try:
            scores = case.score(x, args)
        finally:
            handle.remove()
    else:
        scores = case.score(x + steps * direction(x), args)
    return (scores[:L] - scores[L:]).abs()


# --- The laws -------------------------------------------------------------------------------------------------------


def _require(holds: Any, law: str, detail: str = "") -> None:
    if not bool(holds):
        raise BrokenLawError(f"{law}|{detail}")


def _close(found: Tensor, right: Tensor, tolerance: float, score: Tensor) -> bool:
    """Whether scores agree, relative to the largest, or to the rounding of the score that they are parts of."""
    scale = max(float(right.abs().max()), float(found.abs().max()), 1e-4 * float(score.abs().max()))
    return float((found.double() - right.double()).abs().max()) <= tolerance * scale


def _brief(tensor: Tensor) -> str:
    return str([float(f"{value:.3g}") for value in tensor.flatten().tolist()[:8]])


@dataclass
class Trial:
    """One method on one model.

    Args:
        make: Draws the model, the same each time.
        method: The method.
        dtype: The type of the model.
    """

    make: Callable[[], Case]
    method: Method
    dtype: torch.dtype = torch.float32
    case: Case = field(init=False)
    alone: Case = field(init=False)

    def __post_init__(self) -> None:
        self.case, self.alone = self._in(self.dtype), self._in(self.dtype)

    def _in(self, dtype: torch.dtype) -> Case:
        case = self.make()
        if dtype is not torch.float32:
            case.model.to(dtype)
            cast = lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x  # noqa: E731
            case.inputs, case.others = cast(case.inputs), cast(case.others)
            case.args, case.other_args = tuple(map(cast, case.args)), tuple(map(cast, case.other_args))
        return case

    def outcome(self) -> Outcome:
        """Explain, and hold all laws against it."""
        case = self.case
        tensors = tuple(t for t in (case.inputs, case.others, *case.args, *case.other_args) if isinstance(t, Tensor))
        before = snapshot(case.model, tensors)
        try:
            result = self._explained()
        except BrokenLawError as broken:
            law, _, detail = str(broken).partition("|")
            return Outcome(self.method.name, f"WRONG: {law}", detail)
        after = snapshot(case.model, tensors)
        changed = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
        if changed:
            return Outcome(self.method.name, "WRONG: nothing is changed", f"{changed}")
        return result

    def _explained(self) -> Outcome:
        case, method = self.case, self.method
        scores, refusal = self._refused_or_scores(case, None, case.inputs, case.args)
        if scores is None:
            assert refusal is not None
            if method.kind not in case.refused_by and self.dtype is torch.float32 and self._is_exact():
                raise BrokenLawError(f"a plain model is not refused ({refusal.result})|{refusal.detail}")
            return refusal
        self.shape(scores, case.inputs)
        self._against_the_model(scores)
        if self.dtype is torch.float32 and float(scores.abs().max()) < LARGEST:
            self._against_itself(scores)
        return Outcome(method.name, "right")

    def _is_exact(self) -> bool:
        """Whether the model alone gives in float32 what it gives in float64, so that a sum of scores can be exact."""
        wide, narrow = self._in(torch.float64), self.alone
        if not runs(wide):
            return True
        pairs = ((c.score(c.inputs, c.args), c.score(c.others, c.other_args)) for c in (wide, narrow))
        exact, rounded = (torch.cat([one.double(), other.double()]) for one, other in pairs)
        return bool(((exact - rounded).abs() <= 1e-4 * exact.abs()).all())

    def _refused_or_scores(
        self, case: Case, method: Any, inputs: Tensor, args: tuple[Any, ...]
    ) -> tuple[Tensor | None, Outcome | None]:
        """Return the scores, or the refusal; another error breaks the law."""
        random = torch.get_rng_state()
        try:
            if method is None:
                method = self.explainer = self.method.make(case.forward, case.model)
            return self.method.explain(method, case, inputs, args), None
        except REFUSALS as error:
            return None, Outcome(self.method.name, f"refused: {type(error).__name__}", str(error))
        except Exception as error:
            raise BrokenLawError(f"an error is one of the package ({type(error).__name__})|{error}") from error
        finally:
            _require(torch.equal(random, torch.get_rng_state()), "nothing is changed", "random numbers")

    def shape(self, scores: Tensor, inputs: Tensor) -> None:
        """Scores are finite, and have the shape of the inputs."""
        _require(scores.shape == inputs.shape, "scores have the inputs' shape", f"{tuple(scores.shape)}")
        _require(scores.isfinite().all(), "scores are finite", _brief(scores))

    def _against_the_model(self, scores: Tensor) -> None:
        case, method, wide = self.case, self.method, self._in(torch.float64)
        if not runs(wide):  # as kernels that know no float64
            wide = self._in(torch.float32)
        can = changeable(self._in(self.dtype) if self.dtype is torch.bfloat16 else wide)
        small = TOLERANCE[self.dtype] * 1e-2
        cannot = ~can if can.dim() == scores[0].dim() else ~can.any(-1)
        stray = scores[0].abs() * cannot
        scale = max(float(scores[0].abs().max()), float(self.alone.score(case.inputs, case.args).abs().max()))
        if case.own:
            _require(
                stray.max() <= small * scale,
                "tokens that cannot change the score have 0",
                f"{_brief(scores[0])}, can change: {can.flatten().int().tolist()[:8]}",
            )
        if case.mask is not None:
            _require(scores[~_spread(case.mask, scores)].eq(0).all(), "padding has 0", _brief(scores))
        if method.one_each and (slope := slopes(wide)) is not None:
            share = scores[0] if scores[0].dim() == 1 else scores[0].sum(-1)
            read = slope > 0.02 * slope.max()
            found = f"{_brief(share)}, {_brief(slope)}"
            _require((share > 1e-9)[read].all(), "tokens that change the score have a share", found)
        if method.adds_up:
            self._adds_up(scores)

    def _adds_up(self, scores: Tensor) -> None:
        case, explainer = self.case, self.explainer
        total = scores.flatten(1).double().sum(1)
        reference = self.method.options(case.inputs).get("baselines")
        right = self.alone.score(case.inputs, case.args).double()
        scale = scores.flatten(1).abs().double().sum(1) + right.abs()
        if reference is not None:
            other = torch.as_tensor(reference).to(case.inputs).expand_as(case.inputs)
            if case.mask is not None:
                other = torch.where(_spread(case.mask, case.inputs), other, case.inputs)
            plain = self.alone.score(other, case.args).double()
            right, scale = right - plain, scale + plain.abs()
            if case.own:
                same = scores[other.eq(case.inputs)]
                _require(same.eq(0).all(), "tokens that equal the reference's have 0", _brief(scores))
        for term in explainer.terms.values():
            total, scale = total + term.double(), scale + term.abs().double()
        gap = (total - right).abs() / scale.clamp_min(1e-30)
        _require(gap.max() <= TOLERANCE[self.dtype], "scores add up", f"{_brief(total)} for {_brief(right)}")

    def _against_itself(self, scores: Tensor) -> None:
        case, method, tolerance = self.case, self.method, TOLERANCE[torch.float32]
        score = self.alone.score(case.inputs, case.args)
        args = _rows(case.args, slice(1, 2))
        if "reference of one token" not in method.name:
            one, refusal = self._refused_or_scores(case, self.explainer, case.inputs[1:2], args)
            if one is not None:
                both = f"{_brief(scores[1:])}, {_brief(one)}"
                _require(_close(one, scores[1:], tolerance, score), "a batch equals one by one", both)
            elif not case.decides:
                assert refusal is not None
                raise BrokenLawError(f"what was explained is not refused one by one|{refusal.detail}")
        fresh = self._in(torch.float64)
        if not runs(fresh):
            fresh = self._in(torch.float32)
        new = method.make(fresh.forward, fresh.model)
        right, refusal = self._refused_or_scores(fresh, new, fresh.others, fresh.other_args)
        found, refused = self._refused_or_scores(case, self.explainer, case.others, case.other_args)
        if right is not None and found is not None:
            self.shape(found, case.others)
            _require(
                _close(found, right, tolerance, score),
                "float32 equals float64 of a fresh model",
                f"by {float((found - right).abs().max()):.1e}: {_brief(found)}, {_brief(right)}",
            )
        elif refusal is not None and "Unsupported" in refusal.result and found is not None and not case.decides:
            raise BrokenLawError(f"after other inputs it is refused as before|{refusal.detail}")
        elif refused is not None and method.kind not in case.refused_by and self._is_exact():
            raise BrokenLawError(f"a plain model is not refused ({refused.result})|others: {refused.detail}")
        twice, refusal = self._refused_or_scores(case, self.explainer, case.inputs, case.args)
        if twice is None:
            assert refusal is not None
            raise BrokenLawError(f"twice is once|{refusal.detail}")
        _require(_close(twice, scores, 1e-5, score), "twice is once", f"{_brief(scores)}, {_brief(twice)}")


def runs(case: Case) -> bool:
    """Whether the model alone runs on its inputs, and its score is finite; one that does not is no model to explain."""
    try:
        return all(
            bool(case.score(x, a).isfinite().all())
            for x, a in ((case.inputs, case.args), (case.others, case.other_args))
        )
    except (RuntimeError, IndexError, ValueError, TypeError, AttributeError):
        return False


def outcomes(seed: int, number: int) -> tuple[str, list[Outcome]]:
    """Draw a model and two methods, and hold the laws; return the model in words, and what became of each method."""
    make = partial(drawn, seed, number)
    draw = Random(f"type {seed}:{number}")
    dtype = draw.choice([torch.float32] * 9 + [torch.float64, torch.bfloat16])
    case = make()
    if not runs(case):
        return case.text, []
    results = []
    for method in methods(seed, number):
        trial = Trial(make, method, dtype)
        if dtype is torch.bfloat16 and not runs(trial.case):
            continue
        results.append(trial.outcome())
    return f"{case.text}{'' if dtype is torch.float32 else f' in {dtype}'}", results
