"""The classic first network: two convolutions and two dense layers that read handwritten digits.

scikit-learn's digits (1,797 images of 8x8, no download) are scaled to 28x28; a quarter of them is kept
for the test.

    pip install "convoxel[fit]" scikit-learn
    python examples/digits.py
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import convoxel
from convoxel import nn


def load_data() -> list[np.ndarray]:
    """x_train, x_test (N, 1, 28, 28) float32, y_train, y_test (N,) integers 0..9.

    The images are shifted and scaled by the training images' mean and standard deviation.
    """
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1)
    images = convoxel.functional.interpolate(images, size=(28, 28), mode="bilinear").numpy()
    x_train, x_test, y_train, y_test = train_test_split(images, digits.target, random_state=0)
    mean, deviation = x_train.mean(), x_train.std()
    return [(x_train - mean) / deviation, (x_test - mean) / deviation, y_train, y_test]


def build_model() -> convoxel.Sequential:
    """121,930 parameters; the input channels of every layer are inferred from the first batch."""
    return convoxel.Sequential(
        nn.LazyConv2d(32, kernel_size=3), nn.ReLU(),
        nn.MaxPool2d(2),
        nn.LazyConv2d(64, kernel_size=3), nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.LazyLinear(64), nn.ReLU(),
        nn.LazyLinear(10), nn.Softmax(dim=1),
    )  # fmt: skip


def main(epochs: int = 10, verbose: int = 1) -> tuple[convoxel.Sequential, dict[str, float]]:
    torch.manual_seed(0)
    x_train, x_test, y_train, y_test = load_data()
    model = build_model()
    model.compile(optimizer="adam", loss="categorical_crossentropy", metrics=["accuracy"])
    model.fit(x_train, y_train, epochs=epochs, batch_size=32, verbose=verbose)
    result = model.evaluate(x_test, y_test, verbose=0)
    return model, result


if __name__ == "__main__":
    model, result = main()
    model.summary()
    print(f"test loss {result['loss']:.4f}, test accuracy {result['accuracy']:.4f}")
