"""A plain GELU training script with DREG: python examples/dreg_gelu.py

The two lines that make the difference are marked. The rest is what any script has, and a monitor that writes
jacobians.csv and draws jacobians.png. Needs scikit-learn and matplotlib: pip install 'chainzrule_kernels[demo]'
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import chainzrule_kernels as ck

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--strength", type=float, default=10**-2.5, help="0 only watches")
parser.add_argument("--folder", type=Path, default=Path("."), help="where the curves go")
arguments = parser.parse_args()

torch.manual_seed(0)
digits = load_digits()
train_x, test_x, train_y, test_y = train_test_split(
    torch.tensor(digits.data / 8 - 1, dtype=torch.float32),
    torch.tensor(digits.target),
    test_size=0.2,
    random_state=0,
    stratify=digits.target,
)
model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

reg = ck.DREG(model, strength=arguments.strength)  # the first line
monitor = ck.JacobianMonitor(reg, every=10, csv=arguments.folder / "jacobians.csv")
print(reg.layers, end="\n\n")

for epoch in range(1, arguments.epochs + 1):
    for chosen in torch.randperm(len(train_y)).split(256):
        loss = F.cross_entropy(model(train_x[chosen]), train_y[chosen]) + reg.penalty()  # the second line
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        monitor.step(train_x[chosen])
    if epoch % 5 == 0 or epoch == arguments.epochs:
        with torch.no_grad():
            accuracy = (model(test_x).argmax(1) == test_y).double().mean().item()
        print(f"epoch {epoch}: loss {loss.item():.4f}, test accuracy {accuracy:.2%}")

print(f"\nLayer Jacobian norms on the test part:\n{reg.report(test_x)}")
print(f"\nThe curves are in {monitor.plot(arguments.folder / 'jacobians.png')}")
