"""What the methods cost, as ratios of times and of memory that are measured side by side.

    python -m benchmarks.speed                       everything, about half an hour on one core
    python -m benchmarks.speed --quick               smaller sizes, a few minutes
    python -m benchmarks.speed --only heads vision   some groups
    python -m benchmarks.speed --json FILE --page    store the figures, and write the table of docs/speed.md from them
    python -m benchmarks.speed --check FILE          compare with stored figures (make bench-check)

A group is a function that returns figures; ``groups.py`` has their table. Of each figure the lower value is the better
one. Weights are random, as speed does not depend on them.

* ``figures``: what a figure is, how figures are stored and compared, and the table of them in ``docs/speed.md``
* ``timing``: times side by side, and growth exponents
* ``models``, ``linear_layers``: the models
* ``rollouts``, ``vision``, ``gradients``, ``relevance``, ``kernel_rules``, ``generation``, ``memory``, ``growth``: the
  groups
"""
