"""Relevance that adds up: a value and what it is compared with, followed through every function of a model."""
