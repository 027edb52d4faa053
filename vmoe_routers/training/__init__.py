"""Data, the training loop and the few-shot probe of the study."""

from vmoe_routers.training.data import DataError, Images, load
from vmoe_routers.training.fewshot import few_shot_accuracy
from vmoe_routers.training.loop import Recipe, Step, evaluate, train

__all__ = ["DataError", "Images", "Recipe", "Step", "evaluate", "few_shot_accuracy", "load", "train"]
