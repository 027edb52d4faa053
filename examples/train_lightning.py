"""Lightning: `training_step` adds `aux_loss`.

python examples/train_lightning.py
"""

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import vmoe_routers as vr
from vmoe_routers.models import vit_moe


class Classifier(lightning.LightningModule):
    """A classifier of digits, with the auxiliary loss of its MoE layers in the training loss."""

    def __init__(self):
        super().__init__()
        self.model = vit_moe(
            8, 2, 1, 10, embed_dim=48, depth=2, num_heads=4, router="softmax_token_choice", num_experts=4
        )

    def training_step(self, batch, _):
        """Computes the loss of one batch."""
        images, labels = batch
        loss, aux = F.cross_entropy(self.model(images), labels), vr.aux_loss(self.model)
        self.log_dict({"loss": loss, "aux_loss": aux})  # reading the auxiliary loss does not change it
        return loss + aux

    def configure_optimizers(self):
        """Makes the optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


if __name__ == "__main__":
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    data = TensorDataset(images[:640].float().reshape(-1, 1, 8, 8) / 8 - 1, labels[:640])
    classifier = Classifier()
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=2, accumulate_grad_batches=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(classifier, DataLoader(data, batch_size=16, shuffle=True))
    model = classifier.model.eval()
    images, labels = data[:]
    with torch.no_grad():
        accuracy = (model(images).argmax(1) == labels).float().mean().item()
    print(f"accuracy {accuracy:.2f}")
