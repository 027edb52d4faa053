"""PEFT on an upcycled ViT: LoRA on attention and on the experts' weights. All weights of the routers and the head are
trained.

python examples/train_peft.py
"""

import peft
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTConfig, ViTForImageClassification

import vmoe_routers as vr
from vmoe_routers.models import upcycle

if __name__ == "__main__":
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    data = TensorDataset(images[:640].float().reshape(-1, 1, 8, 8) / 8 - 1, labels[:640])
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, num_labels=10,
        hidden_size=48, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
    )  # fmt: skip
    dense = ViTForImageClassification(config)  # in practice, ViTForImageClassification.from_pretrained(...)
    base = upcycle(dense, router="softmax_token_choice", num_experts=4, blocks="last_1")
    lora = peft.LoraConfig(
        r=8,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["experts.w1", "experts.w2"],
        modules_to_save=["logits", "classifier"],  # logits holds the weight of a router
    )
    model = peft.get_peft_model(base, lora)
    model.print_trainable_parameters()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(2):
        for images, labels in DataLoader(data, batch_size=32, shuffle=True):
            loss = F.cross_entropy(model(images).logits, labels)
            (loss + vr.aux_loss(model)).backward()
            optimizer.step()
            optimizer.zero_grad()
    images, labels = data[:]
    with torch.no_grad():
        accuracy = (model.eval()(images).logits.argmax(1) == labels).float().mean().item()
    print(f"accuracy {accuracy:.2f}")
