"""The command line: ``captum-ssm explain "text"``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from captum_ssm import (
    FidelityError,
    ImplicitAttentionAttribution,
    ImplicitAttentionRelevance,
    ImplicitAttentionRollout,
    InvalidInputError,
    LLMImplicitAttention,
    ModelStateError,
    RawImplicitAttention,
    UnsupportedModelError,
    __version__,
    models,
)
from captum_ssm.attr.base import ModelMethod
from captum_ssm.network.forward import run_model
from captum_ssm.visualization import Passage, text_figure, text_html, text_terminal, token_heatmap

METHODS: dict[str, Callable[..., ModelMethod]] = {
    "relevance": lambda score, model, o: ImplicitAttentionRelevance(score, model, gate_rule=o.gates),
    "attribution": lambda score, model, o: ImplicitAttentionAttribution(
        score, model, rectify=None if o.rectify == "none" else o.rectify, attention=o.attention, without=o.without
    ),
    "rollout": lambda score, model, o: ImplicitAttentionRollout(
        score, model, fusion=o.fusion, attention=o.attention, without=o.without
    ),
    "raw": lambda score, model, o: RawImplicitAttention(
        score, model, fusion=o.fusion, attention=o.attention, without=o.without
    ),
}

_OF_MATRICES = ("attribution", "rollout", "raw")

OWN: dict[str, tuple[tuple[str, ...], Any]] = {
    "reference": (("relevance",), None),
    "gates": (("relevance",), "half"),
    "rectify": (("attribution",), "none"),
    "fusion": (("rollout", "raw"), "root"),
    "attention": (_OF_MATRICES, "unified"),
    "without": (_OF_MATRICES, ()),
}
"""Options that not every method has: which ones have them, and the default."""

SPECIAL = ("unk", "pad", "mask")
"""Special tokens of a tokenizer that may stand for a missing word; the first that there is, is the default."""

_INSTALL = "this needs transformers and rich: pip install 'captum-ssm[cli]'"


class CommandError(Exception):
    """What the user asked for cannot be done; the message says why and what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, or 2 after an error that it has named."""
    options = parser().parse_args(arguments)
    try:
        settle(options)
        explain(options)
    except (CommandError, FidelityError, InvalidInputError, ModelStateError, UnsupportedModelError) as error:
        print(f"captum-ssm: error: {error}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = argparse.ArgumentParser(
        prog="captum-ssm", description=(__import__("captum_ssm").__doc__ or "").splitlines()[0]
    )
    top.add_argument("--version", action="version", version=f"captum-ssm {__version__}")
    commands = top.add_subparsers(dest="command", required=True)
    command = commands.add_parser("explain", help="colour a text by what its tokens contribute to a prediction")
    command.add_argument("text", help="the text to explain")
    command.add_argument(
        "--model",
        default=None,
        metavar="PATH_OR_HUB_ID",
        help="folder written by save_pretrained, or a name on the hub (default: the shipped model)",
    )
    command.add_argument(
        "--target", default=None, help="token or class to explain, by name or number (default: the prediction)"
    )
    command.add_argument(
        "--contrast", default=None, metavar="TARGET", help="explain why the target and not this one, by name or number"
    )
    command.add_argument(
        "--generate",
        type=int,
        default=None,
        metavar="N",
        help="let the model write up to N tokens after the text, and explain each of them",
    )
    command.add_argument(
        "--score",
        choices=["log-probability", "logit"],
        default="log-probability",
        help="of the target; what all logits have in common decides nothing (default: %(default)s)",
    )
    command.add_argument(
        "--method", choices=sorted(METHODS), default=None, help="default: relevance; with --generate, attribution"
    )
    command.add_argument(
        "--reference",
        default=None,
        metavar="WORD",
        help="relevance: what the text is compared with, a token in the place of each of its tokens: unk, pad or mask "
        "(the tokenizer's), a word, or an id; none: frozen gates (default: the first of unk, pad, mask that there is, "
        "else none)",
    )
    command.add_argument(
        "--gates",
        choices=["half", "value"],
        default=None,
        help="relevance with --reference none: who gets the relevance of a product with a gate, both half or the value "
        "all (default: half)",
    )
    command.add_argument(
        "--rectify",
        choices=["channel", "token", "none"],
        default=None,
        help="attribution: where negative contributions are dropped (default: none)",
    )
    command.add_argument(
        "--fusion",
        choices=["absolute", "mean", "positive", "norm", "root"],
        default=None,
        help="rollout and raw: how channels become one matrix (default: root)",
    )
    command.add_argument(
        "--attention",
        choices=["unified", "scan"],
        default=None,
        help="attribution, rollout and raw: of the whole layer, or of its recurrence alone (default: unified)",
    )
    command.add_argument(
        "--without",
        nargs="+",
        default=None,
        metavar="FACTOR",
        help="attribution, rollout and raw: leave out factors of the attention: conv, act, gate, skip, ...",
    )
    command.add_argument(
        "--dtype",
        choices=["float32", "float64", "bfloat16", "float16"],
        default="float32",
        help="floating-point type of the model (default: %(default)s)",
    )
    command.add_argument("--device", default="cpu", help="torch device to run on (default: %(default)s)")
    command.add_argument("--html", type=Path, metavar="FILE", help="also write an HTML page")
    command.add_argument("--png", type=Path, metavar="FILE", help="also write a picture")
    return top


def settle(options: argparse.Namespace) -> None:
    """Choose the method where none was asked for, and give its options their defaults.

    Raises:
        CommandError: If an option belongs to another method.
    """
    chosen = options.method is not None
    if not chosen:
        options.method = "relevance" if options.generate is None else "attribution"
    elif options.method == "relevance" and options.generate is not None:
        raise CommandError(
            "--method relevance explains one prediction, not what is generated; leave --generate out, or explain the "
            f"generation by --method {_either(_OF_MATRICES)}."
        )
    for name, (methods, default) in OWN.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
        elif options.method not in methods:
            which = options.method if chosen else f"{options.method}, the default here"
            remedy = f"add --method {_either(methods)}, or leave --{name} out"
            if methods == ("relevance",) and options.generate is not None:
                remedy = f"leave --{name} out"
            raise CommandError(f"--{name} is no option of the method {which}; {remedy}.")
        elif name == "gates" and options.reference != "none":
            raise CommandError("--gates is for frozen gates; add --reference none, or leave --gates out.")


def explain(options: argparse.Namespace) -> None:
    """Explain one text, or what a model writes after it, and show it.

    Raises:
        CommandError: If the model cannot be loaded, the text has no token, the target is unknown, or a file cannot be
            written.
    """
    try:
        from rich.console import Console
    except ImportError as error:
        raise CommandError(_INSTALL) from error

    reader = Reader.load(options.model or str(models.REVIEWS), options.dtype, options.device)
    encoding = reader.encode(options.text)
    make = explain_prediction if options.generate is None else explain_generation
    passage, details, figure = make(options, reader, encoding)

    console = Console(highlight=False, soft_wrap=False)
    console.print(f"\n[bold]{_plain(passage.title)}[/bold]\n")
    console.print(text_terminal(passage))
    console.print()
    console.print(text_terminal(Passage(passage.legend)))
    console.print()
    for line in details:
        console.print(_plain(line), soft_wrap=True)
    for name, value in (passage.facts or {}).items():
        console.print(f"[dim]{name:<13}[/dim]{_plain(value)}", soft_wrap=True)
    for path, write in ((options.html, partial(_write_html, passage)), (options.png, partial(_write_figure, figure))):
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write(path)
            except (OSError, ValueError) as error:
                raise CommandError(f"cannot write {str(path)!r}: {error}") from error
            console.print(f"[dim]{'written':<13}[/dim]{_plain(str(path))}", soft_wrap=True)


Explained = tuple[Passage, list[str], Callable[[], Figure]]
"""The coloured text, further lines about it, and what makes its picture."""


def explain_prediction(options: argparse.Namespace, reader: Reader, encoding: Encoding) -> Explained:
    """Explain one prediction: a class, or the next token."""
    with torch.no_grad():
        logits = run_model(reader.model, encoding.ids, encoding.mask)[0]
    target = int(logits.argmax()) if options.target is None else reader.target(options.target, len(logits))
    contrast = None if options.contrast is None else reader.target(options.contrast, len(logits))
    if contrast == target:
        raise CommandError(f"the contrast is the target itself, {reader.name(target)!r}; name another one.")

    def of_logits(logits: Tensor) -> Tensor:
        return logits.log_softmax(-1) if options.score == "log-probability" else logits

    def score(ids: Tensor, mask: Tensor) -> Tensor:
        return of_logits(run_model(reader.model, ids, mask))

    reference = reader.reference(options.reference) if options.method == "relevance" else None
    method = METHODS[options.method](score, reader.model, options)
    explain = partial(method.attribute, encoding.ids, target, encoding.mask, contrast=contrast, show_progress=True)
    adds_up = {}
    if isinstance(method, ImplicitAttentionRelevance):
        adds_up["reference"] = encoding.compared(reader, reference)
        scored = of_logits(logits)
        value = float(scored[target] if contrast is None else scored[target] - scored[contrast])
        baselines = None if reference is None else encoding.replaced(reference)
        relevance, adds_up["completeness"] = complete(method, partial(explain, baselines=baselines), value)
    else:
        relevance = explain()
    other = "" if contrast is None else reader.name(contrast)
    facts = {
        "prediction": reader.prediction(logits.float()),
        "explained": f"{options.score} of {reader.name(target)!r}" + (f" less that of {other!r}" if other else ""),
        **adds_up,
        **facts_of(method, options, reader),
    }
    facts |= encoding.unseen(reader, relevance[0])
    title = f"Why {reader.name(target)!r}" + (f" and not {other!r}?" if other else "?")
    passage = Passage.from_offsets(options.text, encoding.offsets, relevance[0], title, facts)
    return passage, [], lambda: text_figure(passage)


def explain_generation(options: argparse.Namespace, reader: Reader, encoding: Encoding) -> Explained:
    """Let the model write on, and explain every token that it wrote."""
    if options.target is not None or options.contrast is not None:
        raise CommandError("--generate explains what the model writes; leave --target and --contrast out.")
    if options.score != "log-probability":
        raise CommandError("--generate explains log-probabilities; leave --score out.")
    if reader.classifies:
        raise CommandError("the model is a classifier and generates no text; leave --generate out.")
    if options.generate < 1:
        raise CommandError(f"--generate takes a number of tokens, at least 1, not {options.generate}.")
    method = METHODS[options.method](reader.model, None, options)
    llm = LLMImplicitAttention(method, reader.tokenizer)
    answer = llm.generate(encoding.ids, {"max_new_tokens": options.generate, "do_sample": False})
    ids = torch.cat([encoding.ids, answer], dim=1)
    start = encoding.ids.shape[1]
    rows = llm.explain(ids, start, show_progress=True)  # (generated, all tokens but the last)

    tokens = [reader.name(token) for token in ids[0].tolist()]
    width = max(map(len, tokens[start:]))
    details = ["every token that was written, and what spoke most for (+) and against (-) it:"]
    for token, row in zip(tokens[start:], rows):
        strongest = row.abs().topk(min(4, len(row))).indices.tolist()
        details.append(f"  {token:<{width}}  " + ", ".join(f"{tokens[j]} {float(row[j]):+.2g}" for j in strongest))
    facts = {
        "written": reader.tokenizer.decode(answer[0]),
        "explained": f"log-probability of each of {len(rows)} tokens; the text is coloured by their sum",
        **facts_of(method, options, reader),
    }
    summed = rows.sum(0)[:start]
    facts |= encoding.unseen(reader, summed)
    title = f"Where {facts['written'].strip()!r} comes from"
    passage = Passage.from_offsets(options.text, encoding.offsets, summed, title, facts)
    label = "score for the log-probability"
    return (
        passage,
        [*details, ""],
        lambda: token_heatmap(
            torch.nn.functional.pad(rows, (0, 1)).cpu(),  # the last token explains nothing
            tokens[start:],
            tokens,
            reads="before itself",
            label=label,
            title=title,
        ),
    )


def complete(
    method: ImplicitAttentionRelevance, explain: Callable[..., tuple[Tensor, Tensor]], value: float
) -> tuple[Tensor, str]:
    """Explain by relevance; return the scores (1, L) and in words how they add up.

    Args:
        method: What explains.
        explain: Its ``attribute``, given all but one argument.
        value: F(text), what is explained.

    Raises:
        CommandError: If the model calls a function that has no rule.
    """
    try:
        relevance, missing = explain(return_convergence_delta=True)
    except UnsupportedModelError as error:
        raise CommandError(f"{error} Or choose another method: --method attribution.") from error
    terms, delta = {name: float(term) for name, term in method.terms.items()}, float(missing)
    total = float(relevance.sum())
    whole = total + sum(terms.values())
    said = f"the scores sum to {total:+.4f}"
    for name, term in terms.items():
        held = f" ({', '.join(sorted(method.held))})" if name == "decisions" else ""
        said += f", the term of {name}{held} is {term:+.4f}"
    said += f", together {whole:+.4f}" if terms else ""
    explained = f"F(text) = {value:+.4f}"
    if "bias" not in terms:
        difference = whole - delta
        explained = f"F(text) - F(reference) = {value:.4f} - ({value - difference:.4f}) = {difference:+.4f}"
    dtype = next(method.model.parameters()).dtype
    rounding = f", rounding of the model's own {str(dtype).removeprefix('torch.')}" if dtype.itemsize < 4 else ""
    return relevance, f"{said}; {explained}; gap {delta:+.1e}{rounding}"


def facts_of(method: ModelMethod, options: argparse.Namespace, reader: Reader) -> dict[str, str]:
    """Return what there is to say about a method that has explained."""
    layer, largest = max(method.fidelity.items(), key=lambda item: item[1])
    return {
        "method": f"{type(method).__name__}: {describe(method, options)}",
        "exactness": f"largest relative error over {len(method.fidelity)} layers {largest:.1e} ({layer})",
        "model": reader.source,
    }


def describe(method: ModelMethod, options: argparse.Namespace) -> str:
    """Return the method's options in words."""
    if isinstance(method, ImplicitAttentionRelevance):
        return f"frozen gates, rule {method.gate_rule}" if "bias" in method.terms else "difference to a reference"
    choice = f"rectify {options.rectify}" if options.method == "attribution" else f"{options.fusion} fusion"
    left_out = f", without {', '.join(options.without)}" if options.without else ""
    return f"{choice}, {options.attention} attention{left_out}"


@dataclass(frozen=True)
class Encoding:
    """A text as tokens: ids and mask (1, L), and where each token stands in the text."""

    ids: Tensor
    mask: Tensor
    offsets: list[tuple[int, int]]

    @property
    def added(self) -> list[int]:
        """Which tokens the tokenizer added: they stand nowhere in the text."""
        return [k for k, (start, end) in enumerate(self.offsets) if start == end]

    def replaced(self, token: int) -> Tensor:
        """Return the ids of a text of nothing but one token; what the tokenizer added stays."""
        ids = torch.full_like(self.ids, token)
        ids[0, self.added] = self.ids[0, self.added]
        return ids

    def compared(self, reader: Reader, reference: int | None) -> str:
        """Return in words what the text is compared with."""
        if reference is None:
            return "none: the gates are frozen, and the term of bias belongs to no token"
        name = reader.tokenizer.convert_ids_to_tokens(reference)
        words = f"{name} (id {reference}) in the place of every token of the text"
        if self.added:
            kept = reader.tokenizer.convert_ids_to_tokens(self.ids[0, self.added].tolist())
            words += f", {', '.join(kept)} kept"
        same = [k for k in (self.ids[0] == reference).nonzero()[:, 0].tolist() if k not in self.added]
        of_text = len(self.offsets) - len(self.added)
        return words + (f"; {len(same)} of {of_text} already {name}, score 0" if same else "")

    def unseen(self, reader: Reader, scores: Tensor) -> dict[str, str]:
        """Return the scores of the tokens that the tokenizer added."""
        words = reader.tokenizer.convert_ids_to_tokens(self.ids[0, self.added].tolist())
        shares = ", ".join(f"{word} {float(scores[k]):+.2g}" for k, word in zip(self.added, words))
        return {"not shown": f"tokens added by the tokenizer: {shares}"} if self.added else {}


@dataclass(frozen=True)
class Reader:
    """A transformers model with its tokenizer, and the words for what it predicts.

    Args:
        model: A causal language model, or a classifier.
        tokenizer: Its fast tokenizer.
        source: Where it came from.
    """

    model: Any
    tokenizer: Any
    source: str

    @classmethod
    def load(cls, source: str, dtype: str, device: str) -> Reader:
        """Load a model and its tokenizer from a folder or the hub.

        Raises:
            CommandError: If transformers is missing, or there is no such model.
        """
        try:
            from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
            from transformers.utils import logging
        except ImportError as error:
            raise CommandError(_INSTALL) from error
        logging.set_verbosity_error()
        if source == str(models.REVIEWS):
            logging.disable_progress_bar()
        try:
            names = AutoConfig.from_pretrained(source).architectures or []
            classifies = any(name.endswith("ForSequenceClassification") for name in names)
            auto = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
            model = auto.from_pretrained(source, dtype=getattr(torch, dtype)).eval().to(device)
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError, RuntimeError, AssertionError) as error:
            raise CommandError(f"cannot load a model from {source!r} to device {device!r}: {error}") from error
        if not tokenizer.is_fast:
            raise CommandError(f"the tokenizer of {source!r} cannot say where its tokens stand; use a fast tokenizer.")
        shown = "the shipped movie-review Mamba" if source == str(models.REVIEWS) else source
        return cls(model, tokenizer, f"{shown}, {type(model).__name__}")

    def encode(self, text: str) -> Encoding:
        """Cut the text into tokens.

        Raises:
            CommandError: If there is none, or the text is not Unicode.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise CommandError(f"the text is not valid Unicode: {error}; pass it encoded as UTF-8.") from error
        encoding = self.tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
        offsets = [(int(start), int(end)) for start, end in encoding["offset_mapping"][0]]
        if not any(end > start for start, end in offsets):
            raise CommandError("the text has no token to explain; pass at least one word.")
        device = self.model.device
        return Encoding(encoding["input_ids"].to(device), encoding["attention_mask"].to(device), offsets)

    @property
    def classifies(self) -> bool:
        """Whether the scores are those of classes rather than of vocabulary entries."""
        return type(self.model).__name__.endswith("ForSequenceClassification")

    def name(self, target: int) -> str:
        """Return the word for a class or a vocabulary entry."""
        if self.classifies:
            return str(self.model.config.id2label.get(target, target))
        return str(self.tokenizer.decode([target]).strip() or self.tokenizer.convert_ids_to_tokens(target))

    def target(self, wanted: str, count: int) -> int:
        """Return the number of a class or a vocabulary entry from its name or number.

        Raises:
            CommandError: If there is none of that name, or the number is out of range.
        """
        if re.fullmatch(r"-?[0-9]+", wanted):
            if not 0 <= int(wanted) < count:
                raise CommandError(f"target {wanted} is out of range; the model has {count} (0 to {count - 1}).")
            return int(wanted)
        if self.classifies:
            labels = {str(label): number for number, label in self.model.config.id2label.items()}
            if wanted not in labels:
                raise CommandError(f"there is no class {wanted!r}; choose from {', '.join(labels)}.")
            return labels[wanted]
        return self.token(wanted)

    def token(self, wanted: str) -> int:
        """Return the number of the one token that a word is.

        Raises:
            CommandError: If it is several, or none.
        """
        candidates = [self.tokenizer.encode(form, add_special_tokens=False) for form in (f" {wanted}", wanted)]
        single = [ids[0] for ids in candidates if len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id]
        if not single:
            pieces = self.tokenizer.convert_ids_to_tokens(candidates[0])
            raise CommandError(f"{wanted!r} is not one token of this model, but {pieces}; choose one of them.")
        return single[0]

    def reference(self, wanted: str | None) -> int | None:
        """Return the token that stands in the place of every token of a text, or None for frozen gates.

        Args:
            wanted: ``"unk"``, ``"pad"`` or ``"mask"``, ``"none"``, a special token as it is written, a word, or an id;
                None takes the first special token that tokenizer and model have.

        Raises:
            CommandError: If there is no such token.
        """
        count = self.model.get_input_embeddings().weight.shape[0]
        special = {name: getattr(self.tokenizer, f"{name}_token_id") for name in SPECIAL}
        special = {name: number for name, number in special.items() if number is not None and number < count}
        if wanted is None:
            return next(iter(special.values()), None)
        if wanted == "none":
            return None
        if wanted in SPECIAL and wanted not in special:
            others = ", ".join([*special, "none"])
            raise CommandError(f"the model has no {wanted} token; choose {others}, a word, or an id.")
        if wanted in special:
            return special[wanted]
        if re.fullmatch(r"-?[0-9]+", wanted):
            if not 0 <= int(wanted) < count:
                raise CommandError(f"reference {wanted} is out of range; the model has {count} (0 to {count - 1}).")
            return int(wanted)
        if wanted in self.tokenizer.all_special_tokens:
            return int(self.tokenizer.convert_tokens_to_ids(wanted))
        return self.token(wanted)

    def prediction(self, logits: Tensor) -> str:
        """Return the most probable outcomes in words."""
        best = logits.softmax(-1).topk(min(3, len(logits)))
        shown = [(self.name(int(k)), float(p)) for p, k in zip(*best)]
        return ", ".join(f"{name!r} {p:.1%}" for k, (name, p) in enumerate(shown) if k == 0 or p >= 0.001)


def _either(names: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _write_html(passage: Passage, path: Path) -> None:
    path.write_text(text_html(passage), encoding="utf-8")


def _write_figure(figure: Callable[[], Figure], path: Path) -> None:
    drawn = figure()
    with path.open("wb") as file:
        drawn.savefig(file, format=path.suffix.lstrip(".") or "png")


if __name__ == "__main__":
    sys.exit(main())
