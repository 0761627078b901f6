"""What users may compare this package with: other methods and libraries, measured on the same models and questions.

    python -m benchmarks.peers                     everything, a quarter of an hour on one core (make peers)
    python -m benchmarks.peers --only times tasks  some parts; what is stored of the others stays
    python -m benchmarks.peers --page              write docs/peers.md from the stored figures, and measure nothing

The packages are those of ``constraints-peers.txt``. The figures are in ``benchmarks/peers.json``.

* ``peer``: what a peer is; ``table``: all of them
* ``captum_methods``, ``shap_methods``, ``inseq_methods``, ``effective_attention`` (TransformerLens): their packages as
  methods of the benchmark; ``words``: a tokenizer for those that take texts
* ``latim``: a rule that is in no package; MambaLRP's is in ``tests/oracles_relevance.py``; ``ours``: this package
* ``families``: which models each explains, and how exactly; ``times``: what it costs; ``tasks``: what it finds
* ``page``: the page
"""
