"""The tests of models as they are deployed, run in an environment that has the packages: make test-deployed."""
