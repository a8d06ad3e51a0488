"""What the image examples share: the ResNet, the data, the training loop, its pictures."""
