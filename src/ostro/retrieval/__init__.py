"""Search, evaluation and their reports."""
