"""Side-by-side measurements of raylm and its peers; `python -m tests.benchmarks.<room>` runs those of a room."""
