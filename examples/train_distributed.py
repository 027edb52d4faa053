"""Several processes: FSDP2 shards the model, and the ranks of "ep" share the experts of each layer.

torchrun --nproc-per-node 2 examples/train_distributed.py
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits

import vmoe_routers as vr
from vmoe_routers.distributed import Meshes, clip_grad_norm_, parallelize
from vmoe_routers.models import vit_moe

if __name__ == "__main__":
    dist.init_process_group()
    world, rank = dist.get_world_size(), dist.get_rank()
    meshes = Meshes.make(ep=world)
    device = meshes.dense.device_type

    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images, labels = (images[:640].float().reshape(-1, 1, 8, 8) / 8 - 1).to(device), labels[:640].to(device)
    torch.manual_seed(0)  # all ranks start from the same values
    model = vit_moe(8, 2, 1, 10, embed_dim=48, depth=2, num_heads=4, router="softmax_token_choice", num_experts=4)
    parallelize(model, meshes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)  # after parallelize

    for _ in range(2):
        for batch in torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).split(32):
            part = batch.chunk(world)[rank]  # every rank has other images
            loss = F.cross_entropy(model(images[part]), labels[part])
            (loss + vr.aux_loss(model)).backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    with torch.no_grad():  # every rank calls the model equally often
        accuracy = (model.eval()(images).argmax(1) == labels).float().mean().item()
    if rank == 0:
        print(f"{world} processes, accuracy {accuracy:.2f}")
    dist.destroy_process_group()
