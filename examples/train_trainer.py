"""Hugging Face Trainer with an upcycled ViT of transformers: a subclass adds `aux_loss`.

python examples/train_trainer.py
"""

import tempfile

import torch
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import vmoe_routers as vr
from vmoe_routers.checkpoints import save_pretrained
from vmoe_routers.models import upcycle


class MoETrainer(Trainer):
    """Adds the auxiliary loss of the MoE layers to the model's loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Computes the loss of one micro-batch."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        aux = vr.aux_loss(model)  # 0 in evaluation
        if num_items_in_batch is not None:  # with this flag, Trainer does not divide by the accumulated steps
            aux = aux / self.current_gradient_accumulation_steps
        return (loss + aux, outputs) if return_outputs else loss + aux


if __name__ == "__main__":
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = images[:640].float().reshape(-1, 1, 8, 8) / 8 - 1
    data = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels[:640], strict=True)]

    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, num_labels=10,
        hidden_size=48, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
    )  # fmt: skip
    model = ViTForImageClassification(config)  # in practice, ViTForImageClassification.from_pretrained(...)
    upcycle(model, router="softmax_token_choice", num_experts=4, blocks="last_1")

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=2, per_device_train_batch_size=16, gradient_accumulation_steps=2,
            learning_rate=3e-3, use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = MoETrainer(
            model, arguments, train_dataset=data, eval_dataset=data,
            compute_metrics=lambda found: {"accuracy": (found.predictions.argmax(1) == found.label_ids).mean()},
        )  # fmt: skip
        trainer.train()
        accuracy = trainer.evaluate()["eval_accuracy"]
        save_pretrained(trainer.model, folder + "/model")  # for vmoe_routers.checkpoints.from_pretrained
    print(f"accuracy {accuracy:.2f}")
