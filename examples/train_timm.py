"""The loop of timm's train.py: mixup, layer decay, and an exponential moving average of the weights.

python examples/train_timm.py
"""

import timm
import torch
from sklearn.datasets import load_digits
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader, TensorDataset

import vmoe_routers as vr
from vmoe_routers.models import upcycle

if __name__ == "__main__":
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    data = TensorDataset(images[:640].float().reshape(-1, 1, 8, 8) / 8 - 1, labels[:640])
    loader = DataLoader(data, batch_size=32, shuffle=True, drop_last=True)

    sizes = {"img_size": 8, "patch_size": 2, "embed_dim": 48, "depth": 2, "num_heads": 4}
    model = timm.create_model("vit_tiny_patch16_224", in_chans=1, num_classes=10, global_pool="avg", **sizes)
    upcycle(model, router="softmax_token_choice", num_experts=4, blocks="last_1")  # in practice, pretrained=True
    ema = ModelEmaV3(model, decay=0.9)
    mixup = Mixup(mixup_alpha=0.2, label_smoothing=0.1, num_classes=10)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-2, weight_decay=0.05, layer_decay=0.8)
    scheduler = CosineLRScheduler(optimizer, t_initial=3 * len(loader), t_in_epochs=False)
    criterion = SoftTargetCrossEntropy()

    for epoch in range(3):
        for step, batch in enumerate(loader):
            images, targets = mixup(*batch)
            (criterion(model(images), targets) + vr.aux_loss(model)).backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update(model)
            scheduler.step_update(epoch * len(loader) + step)

    images, labels = data[:]
    with torch.no_grad():
        accuracy = (ema.eval()(images).argmax(1) == labels).float().mean().item()
    print(f"accuracy {accuracy:.2f}")
