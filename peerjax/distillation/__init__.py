"""Distillation of a trained model: the student and its start, cached teachers, the comparison."""
