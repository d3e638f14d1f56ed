"""One self-contained HTML page about a training run: ``python -m run_report runs/train/exp``."""
