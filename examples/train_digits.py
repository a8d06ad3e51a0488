"""Train a ChainzRule net with DREG on scikit-learn's handwritten digits: python examples/train_digits.py

Needs scikit-learn: pip install 'chainzrule_kernels[demo]'
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import chainzrule_kernels as ck

EPOCHS = 20
BATCH = 256

torch.manual_seed(0)
digits = load_digits()
train_x, test_x, train_y, test_y = train_test_split(
    torch.tensor(digits.data / 8 - 1, dtype=torch.float32),
    torch.tensor(digits.target),
    test_size=0.2,
    random_state=0,
    stratify=digits.target,
)

model = ck.nn.ChainzRuleNet((64, 256, 256, 10))
# The schedule is a factor on the strength; it falls to a tenth over the training.
steps = EPOCHS * -(-len(train_y) // BATCH)
reg = ck.DREG(model, strength=10**-2.5, schedule=ck.schedules.cosine(1.0, 0.1, steps))
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
print(reg.layers, end="\n\n")

gradient_norms = []
for epoch in range(1, EPOCHS + 1):
    for chosen in torch.randperm(len(train_y)).split(BATCH):
        loss = F.cross_entropy(model(train_x[chosen]), train_y[chosen]) + reg.penalty()
        optimizer.zero_grad()
        loss.backward()
        gradient_norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
        optimizer.step()
        reg.step()
    if epoch % 5 == 0:
        with torch.no_grad():
            accuracy = (model(test_x).argmax(1) == test_y).double().mean().item()
        print(f"epoch {epoch}: loss {loss.item():.4f}, test accuracy {accuracy:.2%}, strength {reg.strength:.2e}")

print(f"\nLayer Jacobian norms on the test part:\n{reg.report(test_x)}")
print(f"\nPeak volatility of the gradient norm: {ck.peak_volatility(gradient_norms):.2f}")
