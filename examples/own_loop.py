"""Compress a network inside your own training loop: three lines more than plain training.

python examples/own_loop.py --epochs 10
"""

import argparse

import torch
import torch.nn.functional as F

import espalier as es


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--macs", type=float, default=0.5)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    data = es.load_data("digits")  # any iterable of (images, labels) will do
    model = es.build_model("resnet20", num_classes=10, in_channels=1, image_size=8)
    example = data.example()
    dense = es.cost(es.trace(model, example))

    run = es.attach(model, example, budget=es.Budget(macs=arguments.macs), method=es.TCP())  # 1: begin
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    total = arguments.epochs * data.steps(64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=total)
    done = 0
    for epoch in range(arguments.epochs):
        run.model.train()
        for images, labels in data.train_batches(batch_size=64, epoch=epoch, seed=0):
            loss = F.cross_entropy(run.model(images), labels) + run.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
            run.step(progress=done / total, optimizer=optimizer)  # 2: shrink, and remove what is ready to go
        now = run.status
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, {now.cost.macs:,} MACs, {now.remaining:.2f} to go")
    small = run.finish().eval()  # 3: a plain nn.Module inside the budget

    share = es.cost(es.trace(small, example)).fraction_of(dense)
    with torch.no_grad():
        right = sum(int((small(x).argmax(1) == y).sum()) for x, y in data.test_batches())
    print(f"{share['macs']:.1%} of the dense MACs, {share['params']:.1%} of the parameters")
    print(f"{right} of {len(data.test)} test images right")
    es.save(small, "small.safetensors")


if __name__ == "__main__":
    main()
