"""Training objectives: tasks for the training loop."""

from peerjax.objectives.language import language, language_model
from peerjax.objectives.task import Batch, Task

__all__ = ["Batch", "Task", "language", "language_model"]
