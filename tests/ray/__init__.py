"""Whole data sets: files, libraries that loop over rows, a cluster of Ray, in the environment of make test-ray."""
