"""Admission control: the budgets of host and tenants, who uses them, and disk space."""
