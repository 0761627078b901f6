"""Synthetic tasks of which it is known what every token does, and tiny models trained on them.

    python -m benchmarks.tasks train --task marker-needle --family mamba --seed 0 --out DIR

trains on one core in minutes and writes a checkpoint that ``AutoModelForCausalLM.from_pretrained`` reads. Every
sequence ends in a token that asks, and the model answers by the next token. Training replaces some of the tokens that
do not matter by ``UNK``, so that a perturbation or a reference made of ``UNK`` is nothing strange to the model.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Generator, Tensor
from tqdm import tqdm

from scripts.train_reviews import fast_scan

VOCABULARY = 32
PAD, UNK, QUERY, MARKER = range(4)
FILLERS = range(4, 12)
VALUES = range(12, 20)
CLASSES = range(20, 22)  # no, yes
VOTES = {22: -3, 23: -1, 24: 1, 25: 3}
KEYS = range(26, 32)


class Batch(NamedTuple):
    """Sequences, their answers and the ground truth.

    Attributes:
        ids: (B, L) tokens; the last one asks.
        label: (B,) the token that answers, next after the last.
        truth: (B, L) what each token does for the answer: 0 nothing, positive for it, negative against it.
    """

    ids: Tensor
    label: Tensor
    truth: Tensor


class Task(Protocol):
    """A source of batches.

    Attributes:
        spare: kinds of tokens that can be ``UNK`` without another answer, where the truth is 0 and it is not the last.
    """

    spare: ClassVar[tuple[int, ...]]

    def batch(self, size: int, random: Generator) -> Batch:
        """Draw ``size`` sequences."""


def draw(tokens: range, shape: tuple[int, ...], random: Generator) -> Tensor:
    """Draw tokens uniformly from a range."""
    return torch.randint(tokens.start, tokens.stop, shape, generator=random)


def places(count: int, taken: Tensor, random: Generator) -> Tensor:
    """Choose different free positions of each sequence in random order: ``taken`` (B, L) bool to (B, count)."""
    return torch.rand(taken.shape, generator=random).masked_fill(taken, -1).topk(count, dim=1).indices


def blank(size: int, length: int, random: Generator) -> tuple[Tensor, Tensor]:
    """Return (B, L) fillers that end in the query, and a truth of zeros."""
    ids = draw(FILLERS, (size, length), random)
    ids[:, -1] = QUERY
    return ids, torch.zeros(size, length)


@dataclass(frozen=True)
class MarkerNeedle:
    """Name the value that follows the marker.

    The marker stands anywhere, and so do other values, drawn without regard to the answer. So neither position nor
    order nor frequency tells which value counts: both the marker and its value matter, and nothing else does.
    """

    spare: ClassVar[tuple[int, ...]] = (*FILLERS, *VALUES)
    length: int = 32
    distractors: int = 6

    def batch(self, size: int, random: Generator) -> Batch:
        """Draw ``size`` sequences."""
        ids, truth = blank(size, self.length, random)
        marker = torch.randint(self.length - 2, (size, 1), generator=random)
        needle = torch.cat((marker, marker + 1), dim=1)
        truth.scatter_(1, needle, 1.0)
        others = places(self.distractors, (truth > 0) | (ids == QUERY), random)
        values = draw(VALUES, (size, 1 + self.distractors), random)
        ids.scatter_(1, torch.cat((marker + 1, others), dim=1), values).scatter_(1, marker, MARKER)
        return Batch(ids, values[:, 0], truth)


@dataclass(frozen=True)
class TwoVotes:
    """Say whether the votes for outweigh the votes against.

    Weights and the number of votes are odd, so there is no draw. A vote speaks for the label or against it by its
    weight: its sign is known, and so is its share, as the sum is linear.
    """

    spare: ClassVar[tuple[int, ...]] = (*FILLERS,)
    length: int = 32
    votes: int = 7

    def batch(self, size: int, random: Generator) -> Batch:
        """Draw ``size`` sequences."""
        ids, truth = blank(size, self.length, random)
        where = places(self.votes, ids == QUERY, random)
        tokens, weights = torch.tensor(list(VOTES.items())).T
        choice = torch.randint(len(VOTES), where.shape, generator=random)
        total = weights[choice].sum(1)
        label = (total > 0).long()
        truth.scatter_(1, where, (weights[choice] * total.sign()[:, None]).float())
        return Batch(ids.scatter_(1, where, tokens[choice]), label + CLASSES.start, truth)


@dataclass(frozen=True)
class Induction:
    """Name the value that followed the last token the first time.

    Pairs of a key and a value stand anywhere, and the last token is one of the keys again. What matters is that key
    where it stood first and the value behind it.
    """

    spare: ClassVar[tuple[int, ...]] = (*FILLERS, *KEYS, *VALUES)
    length: int = 32
    pairs: int = 4

    def batch(self, size: int, random: Generator) -> Batch:
        """Draw ``size`` sequences."""
        ids, truth = blank(size, self.length, random)
        slots = torch.zeros(size, (self.length - 2) // 2, dtype=torch.bool)
        where = 2 * places(self.pairs, slots, random) + torch.randint(2, (size, 1), generator=random)
        keys = KEYS.start + torch.rand(size, len(KEYS), generator=random).argsort(1)[:, : self.pairs]
        values = draw(VALUES, where.shape, random)
        ids.scatter_(1, where, keys).scatter_(1, where + 1, values)
        ids[:, -1] = keys[:, 0]
        truth.scatter_(1, torch.stack((where[:, 0], where[:, 0] + 1), dim=1), 1.0)
        return Batch(ids, values[:, 0], truth)


@dataclass(frozen=True)
class Copying:
    """Go on repeating the values that stand anywhere among the fillers, after the query and some of them in order.

    The answer is the first value that is not yet repeated. Only where that one stands does it matter which value it
    is; the others are counted.
    """

    spare: ClassVar[tuple[int, ...]] = (*FILLERS,)
    length: int = 32
    values: int = 4

    def batch(self, size: int, random: Generator) -> Batch:
        """Draw ``size`` sequences."""
        ids, truth = blank(size, self.length, random)
        done = torch.randint(self.values, (size, 1), generator=random)
        repeat = torch.arange(self.length) - (self.length - done)  # -1 at the query
        where = places(self.values, repeat >= -1, random).sort(1).values
        values = draw(VALUES, where.shape, random)
        ids = ids.scatter(1, where, values).masked_fill(repeat == -1, QUERY)
        ids = torch.where(repeat >= 0, values.gather(1, repeat.clamp(0, self.values - 1)), ids)
        return Batch(ids, values.gather(1, done)[:, 0], truth.scatter(1, where.gather(1, done), 1.0))


TASKS: dict[str, Callable[[], Task]] = {
    "marker-needle": MarkerNeedle,
    "two-votes": TwoVotes,
    "induction": Induction,
    "copying": Copying,
}


COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2,
    "pad_token_id": PAD, "bos_token_id": QUERY, "eos_token_id": QUERY, "use_cache": False,
}  # fmt: skip
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 96}

FAMILIES: dict[str, Callable[[], hf.PretrainedConfig]] = {
    "mamba": lambda: hf.MambaConfig(**COMMON, state_size=16),
    "mamba2": lambda: hf.Mamba2Config(
        **COMMON, state_size=16, num_heads=8, head_dim=12, n_groups=1, chunk_size=16
    ),
    "rwkv": lambda: hf.RwkvConfig(**COMMON, context_length=64, rescale_every=0),
    "recurrent_gemma": lambda: hf.RecurrentGemmaConfig(**{
        **COMMON, **HEADS, "num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 48,
        "attention_window_size": 8,
    }),
    "qwen3_5": lambda: hf.Qwen3_5TextConfig(**{
        **COMMON, **HEADS, "num_hidden_layers": 3, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 12, "linear_value_head_dim": 12,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    }),
    "transformer": lambda: hf.Qwen3_5TextConfig(**{
        **COMMON, **HEADS, "num_hidden_layers": 3, "layer_types": ["full_attention"] * 3,
    }),
}  # fmt: skip
"""The configuration of each family by the name of its model type; the transformer is Qwen3.5's softmax layers alone."""
RATES = {**dict.fromkeys(FAMILIES, 3e-3), "qwen3_5": 1e-3, "transformer": 1e-3}
"""The learning rate of each family; Qwen3.5's layers do not learn copying at that of the others."""


def build(family: str, seed: int) -> Any:
    """Return a model of a family with random weights."""
    torch.manual_seed(seed)
    return hf.AutoModelForCausalLM.from_config(FAMILIES[family]())


def erase(batch: Batch, spare: Sequence[int], random: Generator) -> Tensor:
    """Return the ids with spare tokens replaced by ``UNK``, at a rate drawn anew for each sequence."""
    rate = torch.rand(len(batch.ids), 1, generator=random)
    gone = torch.rand(batch.ids.shape, generator=random) < rate
    gone &= (batch.truth == 0) & torch.isin(batch.ids, torch.tensor(spare))
    gone[:, -1] = False
    return batch.ids.masked_fill(gone, UNK)


@torch.no_grad()
def accuracy(model: Any, batch: Batch) -> float:
    """Return the share of sequences whose most probable next token is the label."""
    return float((model.eval()(batch.ids).logits[:, -1].argmax(-1) == batch.label).float().mean())


def train(
    model: Any, task: Task, seed: int = 0, steps: int = 6000, size: int = 64, rate: float = 3e-3, goal: float = 0.98
) -> tuple[float, int]:
    """Train a model in place on fresh sequences until it is good enough.

    Args:
        model: a causal language model.
        task: where the sequences come from.
        seed: of the sequences to train on; those to judge by are the same for every seed.
        steps: at most this many.
        size: sequences in a step.
        rate: learning rate of AdamW, after a warm-up of 100 steps; it falls to 0 along a half cosine by the last step.
        goal: accuracy on 1000 sequences at which training ends, looked at every 100 steps.

    Returns:
        The accuracy on 1000 other sequences and the steps taken. The model is left in eval mode.
    """
    random = Generator().manual_seed(seed)
    validation, test = (task.batch(1000, Generator().manual_seed(2**31 + k)) for k in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 100) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    step, bar = 0, tqdm(range(1, steps + 1), disable=None)
    with fast_scan():
        for step in bar:
            batch = task.batch(size, random)
            loss = F.cross_entropy(model.train()(erase(batch, task.spare, random)).logits[:, -1], batch.label)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 100 == 0 or step == steps:
                reached = accuracy(model, validation)
                bar.set_postfix(loss=loss.item(), accuracy=reached)
                if reached >= goal:
                    break
    bar.close()
    return accuracy(model, test), step


def main() -> None:
    """Read the command line and train one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train", help="train one model on one task")
    command.add_argument("--task", choices=TASKS, required=True)
    command.add_argument("--family", choices=FAMILIES, required=True)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--steps", type=int, default=6000, help="at most this many (default: %(default)s)")
    command.add_argument("--out", type=Path, required=True, help="directory for the checkpoint")
    options = parser.parse_args()
    hf.logging.set_verbosity_error()
    start = time.perf_counter()
    model = build(options.family, options.seed)
    reached, steps = train(model, TASKS[options.task](), options.seed, options.steps, rate=RATES[options.family])
    model.save_pretrained(options.out)
    seconds = time.perf_counter() - start
    print(f"{options.task}-{options.family}-{options.seed} accuracy {reached:.4f} steps {steps} seconds {seconds:.0f}")


if __name__ == "__main__":
    main()
