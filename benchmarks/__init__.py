"""What we claim about speed, runnable by anyone: `python -m benchmarks.<name>`."""
