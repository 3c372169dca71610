"""The worker's metrics by subject; `worker/metrics.py` puts them together."""
