"""The blocks of code of the how-tos run as they stand, and what they show is right."""

import re
import runpy
from pathlib import Path
from typing import Any

import numpy
import shap
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from captum_ssm.metrics import conservation_gap
from captum_ssm.models import REVIEWS

HOWTO = Path(__file__).parents[2] / "docs" / "howto"


def run(name: str, folder: Path) -> dict[str, Any]:
    """Return the names that a how-to's blocks of code leave behind, run as one script."""
    page = (HOWTO / f"{name}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == page.count("```") / 2 >= 2
    script = folder / f"{name}_howto.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    return runpy.run_path(str(script))


def probabilities_after(ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(REVIEWS).eval()(ids).logits[0, -1].softmax(-1)


def test_every_how_to_is_run() -> None:
    here, with_ray = {"inseq", "nnsight", "quantus"}, {"datasets", "ray"}
    assert {path.stem for path in HOWTO.glob("*.md")} == here | with_ray


def test_inseq_sums_to_the_difference_of_probabilities(tmp_path: Path) -> None:
    names = run("inseq", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(REVIEWS)
    ids = tokenizer("a gorgeous, witty film", return_tensors="pt").input_ids
    target = tokenizer.convert_tokens_to_ids("positive")
    difference = probabilities_after(ids) - probabilities_after(torch.full_like(ids, tokenizer.unk_token_id))
    assert abs(float(names["scores"].nansum() - difference[target])) < 1e-4


def test_quantus_measures_what_sums(tmp_path: Path) -> None:
    numpy.random.seed(0)
    names = run("quantus", tmp_path)
    x, y, model = names["x"], names["y"], names["model"]
    with torch.no_grad():
        difference = (model(x) - model(torch.zeros_like(x))).gather(1, y[:, None])[:, 0]
    scores = torch.as_tensor(names["explain"](model, x.numpy(), y.numpy()))
    assert bool((conservation_gap(scores, difference) < 1e-4).all())
    assert min(names["correlation"].evaluation_scores) > 0.3


def test_nnsight_is_explained_and_runs_on(tmp_path: Path) -> None:
    names = run("nnsight", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(REVIEWS).eval()
    assert torch.equal(names["before"], model(names["ids"]).logits[0, -1])
    assert names["scores"].shape == names["ids"].shape


def test_shap_keeps_the_token_behind_a_text() -> None:
    """The shipped tokenizer's own last token is no feature, so the scores of the words sum to the whole difference."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(REVIEWS).eval(), AutoTokenizer.from_pretrained(REVIEWS)
    target = tokenizer.convert_tokens_to_ids("positive")

    def score(texts: Any) -> Any:
        with torch.no_grad():
            encoded = [tokenizer(str(text), return_tensors="pt") for text in texts]
            return torch.stack([model(**one).logits[0, -1, target] for one in encoded]).numpy()

    explained = shap.Explainer(score, shap.maskers.Text(tokenizer), silent=True)(["a gorgeous film"])
    assert [word.strip() for word in explained.data[0]] == ["a", "gorgeous", "film", ""]
    total = explained.values[0].sum() + explained.base_values[0]
    assert abs(float(total) - float(score(["a gorgeous film"])[0])) < 1e-3
