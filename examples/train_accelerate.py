"""accelerate, with gradient accumulation: `aux_loss` takes the prepared model, also in several processes.

python examples/train_accelerate.py, or accelerate launch examples/train_accelerate.py
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import vmoe_routers as vr
from vmoe_routers.models import vit_moe

if __name__ == "__main__":
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    data = TensorDataset(images[:640].float().reshape(-1, 1, 8, 8) / 8 - 1, labels[:640])
    model = vit_moe(8, 2, 1, 10, embed_dim=48, depth=2, num_heads=4, router="softmax_token_choice", num_experts=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=16, shuffle=True))
    for _ in range(2):
        for images, labels in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(images), labels)
                accelerator.backward(loss + vr.aux_loss(model))
                optimizer.step()
                optimizer.zero_grad()
    images, labels = (tensor.to(accelerator.device) for tensor in data[:])
    with torch.no_grad():
        accuracy = (model.eval()(images).argmax(1) == labels).float().mean().item()
    accelerator.print(f"accuracy {accuracy:.2f}")
