"""Data, the training loop, evaluation and the few-shot probe."""

from vmoe_routers.training.data import DataError, Images, load
from vmoe_routers.training.evaluation import Evaluation, evaluate_model
from vmoe_routers.training.fewshot import few_shot_accuracy
from vmoe_routers.training.loop import Recipe, Step, train

__all__ = [
    "DataError",
    "Evaluation",
    "Images",
    "Recipe",
    "Step",
    "evaluate_model",
    "few_shot_accuracy",
    "load",
    "train",
]
