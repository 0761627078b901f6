"""Draw calls with good and bad arguments: ``python -m tests.properties.calls --seed S --calls N``.

Each call is made on a model that is explained rightly with good arguments. A call with a bad one has to raise an error
of the package, or Captum's assertion; with good ones it has to give the scores that the laws of the model alone ask
for. Whatever happens, nothing may be left changed. ``--only K`` makes call K alone. The exit status is 1 if a law is
broken.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

import captum_ssm as cs
from tests.conftest import build, snapshot
from tests.properties.command import command
from tests.properties.grammar import Drawn, Embedded
from tests.properties.laws import REFUSALS, TOLERANCE
from tests.properties.pieces import READ, Mixer, Step, V

NAN, INF = float("nan"), float("inf")
GOOD, BAD, EITHER = "good", "bad", "either"


@dataclass
class Argument:
    """A value in words: good, bad, or one that may be taken or refused."""

    text: str
    make: Callable[[], Any]
    kind: str


def _pool(kind: str, **makes: Callable[[], Any]) -> list[Argument]:
    return [Argument(text, make, kind) for text, make in makes.items()]


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _ids(*shape: int) -> Tensor:
    return torch.randint(3, V, shape, generator=torch.Generator().manual_seed(2))


def _inferred(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


# --- The pools --------------------------------------------------------------------------------------------------------

IDS = [
    *_pool(
        GOOD,
        ids=lambda: _ids(2, 6),
        tuple_of_ids=lambda: (_ids(2, 6),),
        ids_of_int32=lambda: _ids(2, 6).int(),
        ids_transposed=lambda: _ids(6, 2).T,
        ids_in_inference=lambda: _inferred(_ids(2, 6)),
        ids_expanded=lambda: _ids(1, 6).expand(2, 6),
    ),
    *_pool(
        BAD,
        no_tokens=lambda: _ids(2, 0),
        no_texts=lambda: _ids(0, 6),
        one_axis=lambda: _ids(6),
        no_axis=lambda: torch.tensor(3),
        three_axes=lambda: _ids(2, 3, 6),
        float_ids=lambda: _ids(2, 6).float(),
        too_large=lambda: _ids(2, 6) + V,
        negative=lambda: -_ids(2, 6),
        a_list=lambda: [[3, 4]],
        text=lambda: "text",
        none=lambda: None,
        number=lambda: 4,
        empty_tuple=tuple,
        complex=lambda: _ids(2, 6).to(torch.complex64),
        complex_vectors=lambda: _randn(2, 6, 8).to(torch.complex64),
        bools=lambda: _ids(2, 6) > 9,
        meta=lambda: _ids(2, 6).to("meta"),
        sparse=lambda: _ids(2, 6).to_sparse(),
        uint8=lambda: _ids(2, 6).to(torch.uint8),
        int16=lambda: _ids(2, 6).short(),
        list_of_ids=lambda: [_ids(2, 6)],
        dictionary=lambda: {"input_ids": _ids(2, 6)},
        nested=lambda: ((_ids(2, 6),),),
    ),
]

VECTORS = [
    *_pool(
        GOOD,
        vectors=lambda: _randn(2, 6, 8),
        tuple_of_vectors=lambda: (_randn(2, 6, 8),),
        with_gradient=lambda: _randn(2, 6, 8).requires_grad_(),
        transposed=lambda: _randn(6, 2, 8).transpose(0, 1),
        in_inference=lambda: _inferred(_randn(2, 6, 8)),
    ),
    *_pool(EITHER, float64=lambda: _randn(2, 6, 8).double(), float16=lambda: _randn(2, 6, 8).half()),
    *_pool(
        BAD,
        no_tokens=lambda: _randn(2, 0, 8),
        width=lambda: _randn(2, 6, 9),
        nan=lambda: _randn(2, 6, 8) * NAN,
        infinite=lambda: _randn(2, 6, 8) * INF,
        no_width=lambda: _randn(2, 6, 0),
        meta=lambda: _randn(2, 6, 8).to("meta"),
        one_axis=lambda: _randn(8),
        two_axes=lambda: _randn(6, 8),
        five_axes=lambda: _randn(2, 1, 1, 6, 8),
        sparse=lambda: _randn(2, 6, 8).to_sparse(),
    ),
]

TARGETS = [
    *_pool(
        GOOD,
        one=lambda: 1,
        tensor=lambda: torch.tensor(1),
        each=lambda: [1, 0],
        tensor_of_each=lambda: torch.tensor([0, 1]),
        tuple=lambda: (1,),
        tuples=lambda: [(1,), (0,)],
        zero=lambda: 0,
        of_int32=lambda: torch.tensor([0, 1], dtype=torch.int32),
    ),
    *_pool(
        BAD,
        too_large=lambda: V,
        too_small=lambda: -V - 1,
        text=lambda: "good",
        fraction=lambda: 1.5,
        three=lambda: [1, 0, 1],
        too_long=lambda: torch.tensor([1, 0, 1]),
        one_too_large=lambda: [1, V],
        column=lambda: torch.tensor([[1], [0]]),
        two_places=lambda: (1, 0),
        floats=lambda: torch.tensor([0.0, 1.0]),
        texts=lambda: ["a", "b"],
        lists=lambda: [[1], [0]],
        large_tensor=lambda: torch.tensor([0, V]),
        object=object,
        dictionary=lambda: {0: 1},
        short=lambda: [1],
        nan=lambda: NAN,
        empty=list,
        empty_tensor=lambda: torch.tensor([], dtype=torch.long),
        empty_tuple=tuple,
        long_tuples=lambda: [(1, 0), (0, 0)],
        meta=lambda: torch.tensor([1, 0], device="meta"),
        nones=lambda: [None, None],
    ),
    *_pool(
        EITHER,
        none=lambda: None,
        true=lambda: True,
        negative=lambda: -1,
        bools=lambda: torch.tensor([True, False]),
        slice=lambda: slice(0, 1),
        tuple_of_tensor=lambda: (torch.tensor(1),),
    ),
]

MASKS = [
    *_pool(
        GOOD,
        ones=lambda: torch.ones(2, 6),
        of_int=lambda: torch.ones(2, 6, dtype=torch.long),
        none=lambda: None,
        tuple=lambda: (torch.ones(2, 6),),
        bools=lambda: torch.ones(2, 6).bool(),
    ),
    *_pool(
        BAD,
        short=lambda: torch.ones(2, 5),
        flat=lambda: torch.ones(6),
        lists=lambda: [[1] * 6] * 2,
        text=lambda: "mask",
        zeros=lambda: torch.zeros(2, 6),
        three=lambda: torch.ones(3, 6),
        two=lambda: (torch.ones(2, 6), torch.ones(2, 6)),
        number=lambda: 1,
        meta=lambda: torch.ones(2, 6, device="meta"),
        deep=lambda: torch.ones(2, 6, 1),
    ),
    *_pool(
        EITHER,
        empty=tuple,
        right=lambda: torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6]),
        left=lambda: torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6]),
        nan=lambda: torch.full((2, 6), NAN),
        halves=lambda: torch.full((2, 6), 0.5),
        minus=lambda: -torch.ones(2, 6),
        hole=lambda: torch.tensor([[1, 0, 1, 1, 1, 1]] * 2),
    ),
]

QUERIES = [
    *_pool(
        GOOD,
        none=lambda: None,
        last=lambda: -1,
        first=lambda: 0,
        each=lambda: torch.tensor([1, 5]),
        weights=lambda: torch.full((2, 6), 1 / 6),
        tensor=lambda: torch.tensor(3),
    ),
    *_pool(
        BAD,
        too_large=lambda: 6,
        too_small=lambda: -7,
        patch=lambda: (0, 0),
        text=lambda: "last",
        fraction=lambda: 0.5,
        three=lambda: torch.tensor([1, 2, 3]),
        one_too_large=lambda: torch.tensor([0, 6]),
        nan=lambda: torch.full((2, 6), NAN),
        infinite=lambda: torch.full((2, 6), INF),
        integer_weights=lambda: torch.ones(2, 6, dtype=torch.long),
        object=object,
        short=lambda: torch.ones(2, 5),
        meta=lambda: torch.tensor([1, 2], device="meta"),
        texts=lambda: ["a"],
        complex=lambda: torch.ones(2, 6, dtype=torch.complex64),
        empty=lambda: torch.tensor([], dtype=torch.long),
        tuple=tuple,
    ),
    *_pool(
        EITHER,
        list=lambda: [0, 1],
        true=lambda: True,
        zeros=lambda: torch.zeros(2, 6),
        negative=lambda: -torch.ones(2, 6),
        wide=lambda: torch.full((2, 6), 1 / 6).double(),
    ),
]

BASELINES = [
    *_pool(
        GOOD,
        none=lambda: None,
        zero=lambda: 0.0,
        fraction=lambda: 0.25,
        several=lambda: [0.0, 0.5],
        none_in_tuple=lambda: (0.0,),
    ),
    *_pool(
        BAD,
        text=lambda: "<unk>",
        nan=lambda: NAN,
        infinite=lambda: INF,
        none_at_all=list,
        object=object,
        wrong_length=lambda: torch.zeros(2, 5, 8),
        wrong_width=lambda: torch.zeros(9),
        deep=lambda: torch.zeros(1, 2, 6, 8),
        nans=lambda: torch.full((8,), NAN),
        texts=lambda: ["<unk>"],
        complex=lambda: torch.zeros(8, dtype=torch.complex64),
        meta=lambda: torch.zeros(8, device="meta"),
        other=lambda: torch.zeros(3, 6, 8),
        nested=lambda: [[0.0]],
        dictionary=dict,
        empty=lambda: torch.zeros(0),
        two=lambda: (0.0, 0.0),
        number=lambda: 1j,
    ),
    *_pool(
        EITHER,
        nones=lambda: [None, 0.0],
        true=lambda: True,
        wide=lambda: torch.zeros(8).double(),
        half=lambda: torch.zeros(8).half(),
        empty_tuple=tuple,
    ),
]
ID_BASELINES = [
    *_pool(
        GOOD,
        one=lambda: 1,
        ids=lambda: _ids(6),
        of_each=lambda: _ids(2, 6).flip(0),
        vector=lambda: torch.zeros(8),
        mixed=lambda: [1, 0.0],
        tensor=lambda: torch.tensor(2),
    ),
    *_pool(
        BAD, too_large=lambda: V, negative=lambda: -1, short=lambda: _ids(5), one_too_large=lambda: torch.full((6,), V)
    ),
]
VECTOR_BASELINES = [
    *_pool(
        GOOD,
        one=lambda: 1,
        vector=lambda: _randn(8),
        all=lambda: _randn(2, 6, 8),
        of_text=lambda: _randn(6, 8),
        whole=lambda: torch.zeros(8, dtype=torch.long),
    ),
]
SIGNS = [
    *_pool(GOOD, none=lambda: None, positive=lambda: "positive", negative=lambda: "negative"),
    *_pool(BAD, both=lambda: "both", number=lambda: 1, list=lambda: ["positive"], empty=lambda: ""),
]
SIZES = [
    *_pool(GOOD, none=lambda: None, one=lambda: 1, two=lambda: 2, many=lambda: 50),
    *_pool(
        BAD,
        zero=lambda: 0,
        negative=lambda: -2,
        text=lambda: "2",
        fraction=lambda: 1.5,
        nan=lambda: NAN,
        list=lambda: [1],
    ),
    *_pool(EITHER, true=lambda: True, tensor=lambda: torch.tensor(1), whole=lambda: 2.0),
]
PATCHES = [*_pool(GOOD, no=lambda: False), *_pool(BAD, yes=lambda: True), *_pool(EITHER, text=lambda: "no")]
FUSIONS = [
    *_pool(GOOD, none=lambda: None, root=lambda: "root", mean=lambda: "mean"),
    *_pool(BAD, other=lambda: "max", number=lambda: 1, list=list),
]
FLAGS = _pool(GOOD, no=lambda: False, yes=lambda: True)


# --- The subjects -----------------------------------------------------------------------------------------------------


@dataclass
class Subject:
    """A model that is explained, with the pools of its inputs and of its further arguments."""

    name: str
    model: nn.Module
    inputs: list[Argument]
    masks: list[Argument]
    baselines: list[Argument]
    score: Callable[[Tensor, Any], Tensor]
    """From inputs and target to the score of each example, by the model alone."""


def _picked(output: Tensor, target: Any) -> Tensor:
    """Return the score of each example that a good target selects."""
    if isinstance(target, list):
        return torch.stack([row[index] for row, index in zip(output, target)]).flatten()
    if isinstance(target, tuple):
        return output[(slice(None), *target)]
    if isinstance(target, Tensor) and target.dim():
        return output.gather(1, target.long()[:, None])[:, 0]
    return output[:, int(target)]


def _language_model() -> Subject:
    model = build("mamba")

    def score(inputs: Tensor, target: Any) -> Tensor:
        name = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
        with torch.no_grad():
            return _picked(model(**{name: inputs}, use_cache=False).logits[:, -1], target)

    return Subject("language model", model, IDS + VECTORS, MASKS, ID_BASELINES, score)


class Narrow(nn.Module):
    """A classifier of vectors, eight wide."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.mixer, self.head = nn.Linear(8, 16), Mixer("MambaMixer"), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.into(x)
        return self.head((h + self.mixer(h)).mean(1))


def _classifiers() -> list[Subject]:
    torch.manual_seed(0)
    draw = Random(0)
    step = Step(lambda m, h, text: h + m.mixer(h), mixer=Mixer("Mamba2Mixer"))
    texts = Drawn(Embedded("learned positions", 1.0), [step], READ["mean"].build(draw), lambda y: y).eval()
    vectors = Narrow().eval()

    def of(model: nn.Module) -> Callable[[Tensor, Any], Tensor]:
        return lambda inputs, target: _picked(model(inputs).detach(), target)

    none = _pool(GOOD, none=lambda: None)
    ids = [b for b in ID_BASELINES if b.text not in ("vector", "mixed", "too_large", "one_too_large")]
    return [
        Subject("classifier of ids", texts, IDS, none, ids, of(texts)),
        Subject("classifier of vectors", vectors, VECTORS, none, VECTOR_BASELINES, of(vectors)),
    ]


def subjects() -> list[Subject]:
    """Return the models that are explained."""
    return [_language_model(), *_classifiers()]


# --- The calls --------------------------------------------------------------------------------------------------------

METHODS: dict[str, tuple[Any, list[tuple[dict[str, Any], str]]]] = {
    "rollout": (
        cs.ImplicitAttentionRollout,
        [
            ({}, GOOD),
            ({"fusion": "absolute"}, GOOD),
            ({"fusion": "mean"}, GOOD),
            ({"attention": "scan"}, GOOD),
            ({"without": "conv"}, GOOD),
            ({"fusion": "max"}, BAD),
            ({"attention": "softmax"}, BAD),
            ({"without": ["x"]}, BAD),
            ({"fusion": None}, BAD),
            ({"fusion": []}, BAD),
            ({"without": 3}, BAD),
            ({"without": None}, BAD),
            ({"tolerance": "1"}, BAD),
            ({"tolerance": NAN}, EITHER),
            ({"tolerance": -1.0}, EITHER),
            ({"attention": None}, BAD),
        ],
    ),
    "attribution": (
        cs.ImplicitAttentionAttribution,
        [
            ({}, GOOD),
            ({"rectify": None}, GOOD),
            ({"rectify": "token"}, GOOD),
            ({"rectify": "relu"}, BAD),
            ({"rectify": []}, BAD),
            ({"rectify": True}, BAD),
        ],
    ),
    "raw": (
        cs.RawImplicitAttention,
        [
            ({}, GOOD),
            ({"layers": 2}, GOOD),
            ({"layers": 0}, BAD),
            ({"layers": "2"}, BAD),
            ({"layers": 1.5}, BAD),
            ({"layers": None}, BAD),
        ],
    ),
    "relevance": (
        cs.ImplicitAttentionRelevance,
        [
            ({}, GOOD),
            ({"checkpoints": True}, EITHER),
            ({"value_share": 0.8}, GOOD),
            ({"gate_rule": "value"}, GOOD),
            ({"apart": "skip"}, GOOD),
            ({"value_share": 2}, BAD),
            ({"value_share": NAN}, BAD),
            ({"value_share": "1"}, BAD),
            ({"gate_rule": "all"}, BAD),
            ({"apart": "bias"}, BAD),
            ({"apart": 3}, BAD),
            ({"apart": ("skip",), "checkpoints": True}, BAD),
            ({"value_share": None}, BAD),
        ],
    ),
    "class token": (
        cs.ClassTokenAttention,
        [
            ({}, EITHER),
            ({"recipe": "raw"}, EITHER),
            ({"start_layer": 9}, BAD),
            ({"start_layer": "1"}, BAD),
            ({"recipe": "x"}, BAD),
            ({"start_layer": -1}, BAD),
            ({"recipe": None}, BAD),
        ],
    ),
    "layer": (
        cs.LayerImplicitAttention,
        [
            ({"layer": 0}, GOOD),
            ({"layer": -1, "attention": "scan"}, GOOD),
            ({"layer": 9}, BAD),
            ({"layer": "x"}, BAD),
            ({"layer": None}, BAD),
            ({"layer": 0, "without": 1}, BAD),
            ({"layer": [0]}, BAD),
            ({"layer": 0.0}, BAD),
            ({"layer": 0, "tolerance": "1"}, BAD),
        ],
    ),
    "relevance of a layer": (
        cs.LayerImplicitAttentionRelevance,
        [({"layer": 0}, EITHER), ({"layer": ""}, BAD), ({"layer": "x"}, BAD), ({"layer": None}, BAD)],
    ),
}


@dataclass
class Call:
    """A call that was drawn."""

    subject: Subject
    method: str
    options: tuple[dict[str, Any], str]
    drawn: dict[str, Argument]
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The call in words."""
        said = ", ".join(f"{name}={a.text} ({a.kind})" for name, a in self.drawn.items())
        return f"{self.subject.name}: {self.method}({self.options[0]}, {self.options[1]}): {said}"

    @property
    def is_good(self) -> bool:
        """Whether all arguments are good."""
        return {self.options[1], *(a.kind for a in self.drawn.values())} == {GOOD}

    @property
    def is_bad(self) -> bool:
        """Whether one is bad."""
        return BAD in {self.options[1], *(a.kind for a in self.drawn.values())}

    def make(self) -> Any:
        """Make the call."""
        method, _ = METHODS[self.method]
        return method(self.subject.model, **self.options[0]).attribute(**self.arguments)


def drawn_call(subjects: list[Subject], seed: int, number: int) -> Call:
    """Draw a call; the first arguments are mostly good, so that the later ones are looked at too."""
    draw = Random(f"{seed}:{number}")
    share = draw.choice([0.0, 0.1, 0.1, 0.3, 0.5])

    def pick(pool: list[Argument]) -> Argument:
        others = [a for a in pool if a.kind != GOOD]
        return draw.choice(others if others and draw.random() < share else [a for a in pool if a.kind == GOOD])

    subject = draw.choice(subjects)
    name = draw.choice([*METHODS, "relevance"])
    _, options = METHODS[name]
    chosen = draw.choice(options) if draw.random() < 0.5 else options[0]
    drawn = {"inputs": pick(subject.inputs)}
    if name == "layer":
        drawn |= {"fusion": pick(FUSIONS)} if draw.random() < 0.5 else {}
        drawn |= {"additional_forward_args": pick(subject.masks)} if draw.random() < 0.5 else {}
        return _with_arguments(Call(subject, name, chosen, drawn))
    drawn |= {"target": pick(TARGETS)}
    pools = {
        "contrast": TARGETS,
        "additional_forward_args": subject.masks,
        "internal_batch_size": SIZES,
        "patches": PATCHES,
    }
    if name.startswith("relevance"):
        fitting = VECTOR_BASELINES if drawn["inputs"] in VECTORS else subject.baselines
        pools |= {"baselines": BASELINES + fitting, "sign": SIGNS, "return_convergence_delta": FLAGS}
    else:
        pools |= {"query": QUERIES}
    drawn |= {name: pick(pool) for name, pool in pools.items() if draw.random() < 0.4}
    return _with_arguments(Call(subject, name, chosen, drawn))


def _with_arguments(call: Call) -> Call:
    call.arguments = {name: argument.make() for name, argument in call.drawn.items()}
    return call


def _tensors(nested: Any) -> list[Tensor]:
    if isinstance(nested, Tensor):
        return [nested]
    if isinstance(nested, dict):
        nested = list(nested.values())
    return [t for part in nested for t in _tensors(part)] if isinstance(nested, (list, tuple)) else []


def _state(call: Call) -> dict[str, Any]:
    tensors = [t for t in _tensors(call.arguments) if t.device.type == "cpu" and t.layout is torch.strided]
    state = snapshot(call.subject.model, tuple(tensors))
    return {**state, "random numbers": torch.get_rng_state().tolist(), "types": [type(t) for t in tensors]}


def became(call: Call) -> tuple[str, str]:
    """Make a call; return what became of it, ``WRONG`` if a law is broken, and the details."""
    before = _state(call)
    try:
        found, result, detail = call.make(), "scores", ""
    except REFUSALS as error:
        found, result, detail = None, f"refused: {type(error).__name__}", str(error)
    except AssertionError as error:
        found, result, detail = None, "refused: AssertionError", str(error)
    except Exception as error:
        theirs = isinstance(error, _errors_of_the_model(call))
        result = "an error of the model" if theirs else f"WRONG: an error of the package ({type(error).__name__})"
        found, detail = None, str(error)
    after = _state(call)
    changed = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
    if changed:
        return "WRONG: nothing is changed", str(changed)
    if result != "scores":
        if "contrast" in call.drawn and "gradient" in detail:  # one that is the target too
            return result, detail
        return (
            ("WRONG: good arguments are taken", f"{result}: {detail}")
            if call.is_good and "WRONG" not in result
            else (result, detail)
        )
    if call.is_bad:
        return "WRONG: bad arguments are refused", str(found)[:200]
    return _wrong_scores(call, found) or (result, "")


def _errors_of_the_model(call: Call) -> tuple[type[Exception], ...]:
    """Return the errors that the model alone raises for the inputs, and for a part: a user's own are passed on."""
    inputs, errors = call.arguments["inputs"], list[type[Exception]]()
    if call.subject.name == "language model":
        return ()
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    for part in (tensors, [x[:1] for x in tensors if isinstance(x, Tensor) and x.dim()]):
        try:
            call.subject.model(*part)
        except Exception as error:
            errors.append(type(error))
    return tuple(errors)


def _wrong_scores(call: Call, found: Any) -> tuple[str, str] | None:
    """Hold scores against the model alone."""
    given = call.arguments["inputs"]
    inputs = given[0] if isinstance(given, tuple) else given
    if call.method == "layer":
        return None if bool(found.isfinite().all()) else ("WRONG: finite scores of the inputs' shape", str(found))
    scores, delta = found if call.arguments.get("return_convergence_delta") else (found, torch.zeros(1))
    if isinstance(scores, tuple) != isinstance(given, tuple):
        return "WRONG: a tuple for a tuple", str(type(scores))
    scores = scores[0] if isinstance(scores, tuple) else scores
    if (scores.shape != inputs.shape and "layer" not in call.method) or not bool(scores.isfinite().all()):
        return "WRONG: finite scores of the inputs' shape", f"{tuple(scores.shape)}"
    if not call.is_good:
        return None
    total = scores.detach().flatten(1).sum(1)
    if call.method == "rollout" and call.options[0].get("fusion") != "mean" and "attention" not in call.options[0]:
        right = torch.ones(len(total))
    elif call.method == "relevance" and not call.arguments.get("sign") and call.arguments.get("baselines") is not None:
        difference = _difference(call, inputs.clone())
        if difference is None:
            return None
        right = difference
        if bool((delta.abs() > TOLERANCE[torch.float32]).any()):
            return "WRONG: no gap", str(delta)
    else:
        return None
    scale = scores.detach().flatten(1).abs().sum(1) + 1
    if "skip" in call.options[0].get("apart", ()) or bool(
        ((total - right).abs() <= TOLERANCE[torch.float32] * scale).all()
    ):
        return None
    return "WRONG: scores add up", f"{total.tolist()} for {right.tolist()}"


def _difference(call: Call, inputs: Tensor) -> Tensor | None:
    """Return the mean difference to the references, by the model alone; None if those of ids are vectors."""
    baselines = call.arguments["baselines"]
    target, contrast = call.arguments["target"], call.arguments.get("contrast")
    parts = []
    for baseline in baselines if isinstance(baselines, list) else [baselines]:
        reference = torch.as_tensor(baseline[0] if isinstance(baseline, tuple) else baseline)
        if not inputs.is_floating_point() and reference.is_floating_point():
            return None
        reference = reference.to(inputs).expand_as(inputs)
        part = call.subject.score(inputs, target) - call.subject.score(reference, target)
        if contrast is not None:
            part = part - call.subject.score(inputs, contrast) + call.subject.score(reference, contrast)
        parts.append(part)
    return torch.stack(parts).mean(0)


def main() -> int:
    """Run, print the counts, and return the exit status."""
    explained = subjects()

    def become(seed: int, number: int) -> Iterator[tuple[str, str]]:
        call = drawn_call(explained, seed, number)
        result, detail = became(call)
        yield result, f"{result}\n    {call.text}\n    {detail[:300]}"

    return command("calls", 1000, __doc__, become, most=20)


if __name__ == "__main__":
    sys.exit(main())
