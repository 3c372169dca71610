"""Tests of what real workers show to a scrape and to a real Prometheus."""
