"""The programs that make what the repository holds: its trained models and the tables of its pages."""
