"""Programs people start from, each in one file: `python -m examples.NAME --help`; `python -m examples` runs them all."""
