"""Cohorts, patients and batches: from files people bring to tensors, and scenarios of absence."""
