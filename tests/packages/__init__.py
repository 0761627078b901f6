"""The tests of layers of other packages than transformers, run in an environment that has them: make test-packages."""
