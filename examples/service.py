"""A service that classifies pictures by a run folder: ONNX Runtime, NumPy, Pillow and two files; no PyTorch, no Espalier.

pip install numpy pillow onnxruntime
python examples/service.py runs/half PICTURE.jpg ...
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image


class Classifier:
    """The network of a finished run and what turns a picture into its input, both as they stand in the folder."""

    def __init__(self, folder: Path) -> None:
        self.rule = json.loads((folder / "preprocessing.json").read_text(encoding="utf-8"))
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])

    def __call__(self, pictures: list[Image.Image]) -> list[tuple[str, float]]:
        """The most probable class of every picture, and how probable it is."""
        batch = np.stack([self.input_of(picture) for picture in pictures])
        (logits,) = self.session.run(None, {self.session.get_inputs()[0].name: batch})
        shares = np.exp(logits - logits.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        names = self.rule["classes"] or [str(number) for number in range(shares.shape[1])]
        return [(names[best], float(share[best])) for best, share in zip(shares.argmax(1), shares, strict=True)]

    def input_of(self, picture: Image.Image) -> np.ndarray:
        """``(channels, height, width)``; ``resize`` in the rule says in words how pictures were cut in training."""
        rule = self.rule
        picture = picture.convert("RGB" if rule["channels"] == 3 else "L").resize((rule["width"], rule["height"]))
        pixels = np.asarray(picture, dtype=np.float32).reshape(rule["height"], rule["width"], rule["channels"])
        mean, std = (np.array(rule[name], dtype=np.float32) for name in ("mean", "std"))
        return ((pixels / rule["levels"] - mean) / std).transpose(2, 0, 1)


def main() -> None:
    folder, *files = sys.argv[1:]
    for file, (name, share) in zip(files, Classifier(Path(folder))([Image.open(f) for f in files]), strict=True):
        print(f"{file}: {name} ({share:.0%})")


if __name__ == "__main__":
    main()
