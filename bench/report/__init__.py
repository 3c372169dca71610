"""Rows, their budgets and the table of them."""
