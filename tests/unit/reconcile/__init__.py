"""Unit tests of worker/reconcile."""
