"""Data, the training loop, evaluation and the few-shot probe."""

from vmoe_routers.training.data import Images, load
from vmoe_routers.training.error import DataError
from vmoe_routers.training.evaluate import evaluate
from vmoe_routers.training.evaluation import Evaluation, evaluate_model
from vmoe_routers.training.fewshot import few_shot_accuracy
from vmoe_routers.training.loader import Batch, Batches, evaluation_batches, training_batches
from vmoe_routers.training.loop import Recipe, Step, train
from vmoe_routers.training.probes import few_shot
from vmoe_routers.training.samples import Data, Pictures, Samples, Tensors
from vmoe_routers.training.sources import open_data
from vmoe_routers.training.transforms import Augmentation, Mixing, Transform, default_augmentation

__all__ = [
    "Augmentation",
    "Batch",
    "Batches",
    "Data",
    "DataError",
    "Evaluation",
    "Images",
    "Mixing",
    "Pictures",
    "Recipe",
    "Samples",
    "Step",
    "Tensors",
    "Transform",
    "default_augmentation",
    "evaluate",
    "evaluate_model",
    "evaluation_batches",
    "few_shot",
    "few_shot_accuracy",
    "load",
    "open_data",
    "train",
    "training_batches",
]
