"""Training: from a recipe and a cohort to a bundle on disk."""
