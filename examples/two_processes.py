"""A loop of one's own in several processes: gradients are averaged, plans and scores agree, the first process writes.

torchrun --nproc-per-node 2 examples/two_processes.py [--epochs N] [--out FILE]
"""

import argparse

import torch
import torch.distributed as dist
from torch import nn

import espalier as es

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--out", default="small.safetensors")
arguments = parser.parse_args()

if not dist.is_initialized():
    dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
model = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
    nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    nn.Flatten(), nn.Linear(32 * 4 * 4, 10),
)  # fmt: skip
data = es.load_data("digits")

# every process has the weights of the first from here on
run = es.attach(model, data.example(), budget=es.Budget(macs=0.5), method=es.TCP())
optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1, momentum=0.9)
steps = data.steps(128)
for step in range(arguments.epochs * steps):
    if step % steps == 0:
        batches = data.train_batches(batch_size=128, epoch=step // steps, seed=0)  # the same everywhere
    images, labels = (part[rank::world] for part in next(batches))  # of which each takes its part
    loss = nn.functional.cross_entropy(run.model(images), labels) + run.penalty()
    optimizer.zero_grad()
    loss.backward()
    es.average_gradients(run.model)
    optimizer.step()
    run.step(progress=(step + 1) / (arguments.epochs * steps), optimizer=optimizer)
small = run.finish()
if rank == 0:
    es.save(small, arguments.out)
    share = es.cost(es.trace(small, data.example())).macs / run.dense.macs
    print(f"{world} processes, {share:.1%} of the dense MACs, in {arguments.out}")
