"""Models and calls drawn at random, and the laws that every explanation of them must hold.

* ``grammar.py``: draws a model from a number, by a grammar of what people do around recurrent layers;
* ``pieces.py``: the words of the grammar, each a few lines that take a sequence (B, L, E) to another;
* ``laws.py``: the laws of an explanation, by runs of the model alone;
* ``run.py``: holds drawn models to the laws: ``python -m tests.properties.run --seed 1 --models 500``;
* ``calls.py``: draws calls, good and bad: ``python -m tests.properties.calls --seed 1 --calls 1000``.
"""
