"""Train a GELU net with DREG in several processes: torchrun --nproc-per-node 2 examples/distributed.py {ddp,fsdp}

The regulariser is attached to the model itself, and each process adds the penalty of its own samples to its loss.
The gradients are averaged over the processes as ever, and with them the penalty. Needs scikit-learn for its
handwritten digits: pip install 'chainzrule_kernels[demo]'
"""

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import chainzrule_kernels as ck

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("way", choices=("ddp", "fsdp"), nargs="?", default="ddp")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--folder", type=Path, default=Path("."), help="where jacobians.csv goes")
arguments = parser.parse_args()

on_gpu = torch.cuda.is_available()
dist.init_process_group("nccl" if on_gpu else "gloo")
rank, processes = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
if on_gpu:
    torch.cuda.set_device(device)

digits = load_digits()
data = TensorDataset(torch.tensor(digits.data / 8 - 1, dtype=torch.float32), torch.tensor(digits.target))
# Batches of one size in every process, so that the mean of the processes' means is the mean over all samples.
sampler = DistributedSampler(data, drop_last=True)
loader = DataLoader(data, batch_size=128 // processes, sampler=sampler, drop_last=True)

torch.manual_seed(0)
blocks = [nn.Sequential(nn.Linear(width, 256), nn.GELU()) for width in (64, 256)]
model = nn.Sequential(*blocks, nn.Linear(256, 10)).to(device)

reg = ck.DREG(model, strength=10**-2.5)
if arguments.way == "fsdp":
    for block in blocks:  # a linear layer and its activation in one unit
        fully_shard(block)
    running = fully_shard(model)
else:
    running = DistributedDataParallel(model)

optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
monitor = ck.JacobianMonitor(reg, every=len(loader), csv=arguments.folder / "jacobians.csv")
for epoch in range(1, arguments.epochs + 1):
    sampler.set_epoch(epoch)
    for x, target in loader:
        x, target = x.to(device), target.to(device)
        loss = F.cross_entropy(running(x), target) + reg.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        reg.step()
        monitor.step(x)
    if rank == 0:
        print(f"epoch {epoch}: loss {loss.item():.4f}")
monitor.close()
dist.destroy_process_group()
if not on_gpu:
    # FSDP2 keeps gloo's threads alive. One that still lets go of the last tensors needs the interpreter for it, and
    # Python before 3.14 ends a thread that asks for it during its own end: the process would now and then abort.
    sys.stdout.flush()
    os._exit(0)
