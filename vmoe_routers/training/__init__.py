"""Training: data, the training loop, evaluation and the few-shot probe."""

import vmoe_routers.models  # noqa: F401  (first: its errors tell what is wrong with timm or torchvision)

# isort: split
from vmoe_routers.training.data import Images, load
from vmoe_routers.training.error import DataError
from vmoe_routers.training.evaluate import evaluate
from vmoe_routers.training.evaluation import Evaluation, evaluate_model
from vmoe_routers.training.fewshot import few_shot_accuracy
from vmoe_routers.training.loader import Batch, Batches, evaluation_batches, training_batches
from vmoe_routers.training.models import load_model
from vmoe_routers.training.optimisation import Optimisation
from vmoe_routers.training.probes import few_shot
from vmoe_routers.training.recipes import RECIPES
from vmoe_routers.training.samples import Data, Pictures, Samples, Tensors
from vmoe_routers.training.settings import TrainSettings
from vmoe_routers.training.sources import open_data
from vmoe_routers.training.train import train
from vmoe_routers.training.trainer import Trainer, TrainingError
from vmoe_routers.training.transforms import Augmentation, Mixing, Transform, default_augmentation

__all__ = [
    "RECIPES",
    "Augmentation",
    "Batch",
    "Batches",
    "Data",
    "DataError",
    "Evaluation",
    "Images",
    "Mixing",
    "Optimisation",
    "Pictures",
    "Samples",
    "Tensors",
    "TrainSettings",
    "Trainer",
    "TrainingError",
    "Transform",
    "default_augmentation",
    "evaluate",
    "evaluate_model",
    "evaluation_batches",
    "few_shot",
    "few_shot_accuracy",
    "load",
    "load_model",
    "open_data",
    "train",
    "training_batches",
]
