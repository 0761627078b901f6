#!/usr/bin/env bash
# datasets.Dataset.map fixes the type of a new column by the first batch: one of empty lists alone refuses all later ones.
#
# Versions: datasets 5.2.0, pyarrow 26.0.1, Python 3.11.
# Behaviour: a function of batches adds a column of lists. If the lists of the first batch are all empty, as those of rows
#   that could not be explained, the column gets the type list<null>, and the first batch with a string raises TypeError.
#   With an empty numpy array of strings instead of an empty list, the type is right from the start.
# Seen: TypeError: Couldn't cast array of type string to null; with arrays [[], ['a'], ['b']].
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1
HF_HUB_OFFLINE=1 "$work/env/bin/python" -W ignore - <<'PYTHON'
import numpy as np
from datasets import Dataset, disable_progress_bars

disable_progress_bars()
rows = Dataset.from_dict({"text": ["", "a", "b"]})


def tokens(empty):
    return lambda batch: {"tokens": [[text] if text else empty for text in batch["text"]]}


try:
    rows.map(tokens([]), batched=True, batch_size=1)
except TypeError as error:
    print(f"TypeError: {error}")
    assert "null" in str(error)
else:
    raise SystemExit("the empty list was accepted: the behaviour has changed")
found = rows.map(tokens(np.array([], dtype=str)), batched=True, batch_size=1)["tokens"]
print(f"with arrays {list(found)}")
assert list(found) == [[], ["a"], ["b"]]
PYTHON
