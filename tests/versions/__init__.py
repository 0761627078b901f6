"""What holds with every release of transformers that is tested: run by ``make test-versions``."""
