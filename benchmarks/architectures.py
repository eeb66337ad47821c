"""Architectures that people bring: detectors, segmenters, video, flow, faces, diffusion, volumes - cut, proven, and trained on.

    pip install ultralytics segmentation-models-pytorch transformers diffusers monai facenet-pytorch
    python -m benchmarks.architectures [NAME ...] [--steps 20] [--again]

Every network is as its package defines it, untrained, on a small input.  Half of the MACs at random scores (half of what can
go, where less than that can), and ``es.verify`` with all its obligations.  ``--steps`` takes that many steps of every
method instead, in train mode, on the mean square of the outputs; "held" is a budget kept and a network that still runs.
One process a package; what is in the results already is not run again.  None of these packages is a dependency of Espalier:
a row whose package is not installed is left as it is.
"""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import espalier as es
from benchmarks.common import ROOT, environment, first_line, read_results, rounded, table, write_results
from espalier.costs import CostModel

NAME = "architectures"
LIMIT = 900  # seconds for one network
NEARLY_HALF, NOTHING_GOES = 0.45, 0.99

Built = tuple[nn.Module, Any]


def pictures(side: int, *, count: int = 1, channels: int = 3) -> Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(0))


def ultralytics(definition: str) -> Built:
    tasks = importlib.import_module("ultralytics.nn.tasks")
    kind = (
        "SegmentationModel"
        if "-seg" in definition
        else "RTDETRDetectionModel"
        if "rtdetr" in definition
        else "DetectionModel"
    )
    return getattr(tasks, kind)(f"{definition}.yaml", verbose=False), pictures(128)


def detector(name: str, *, side: int = 128, **options: Any) -> Built:
    found = importlib.import_module("benchmarks.vision_ops").torchvision().models.detection
    if "ssd" not in name:
        options |= {"min_size": side, "max_size": side}
    return getattr(found, name)(weights=None, weights_backbone=None, **options), [[pictures(side)[0]]]


def torchvision(path: str, example: Any, **options: Any) -> Built:
    models = importlib.import_module("benchmarks.vision_ops").torchvision().models
    *groups, name = path.split(".")
    for group in groups:
        models = getattr(models, group)
    return getattr(models, name)(weights=None, **options), example


def segmenter(name: str, *, encoder: str = "resnet18", side: int = 64) -> Built:
    smp = importlib.import_module("segmentation_models_pytorch")
    return getattr(smp, name)(encoder_name=encoder, encoder_weights=None, classes=4), pictures(side, count=2)


def transformer(name: str, *, side: int = 64, **options: Any) -> Built:
    transformers = importlib.import_module("transformers")
    configuration = getattr(transformers, f"{name}Config")(**options)
    return getattr(transformers, f"{name}ForImageClassification")(configuration), {
        "pixel_values": pictures(side, count=2)
    }


def timm(name: str, *, side: int = 64) -> Built:
    found = importlib.import_module("espalier.optional").import_timm()
    return found.create_model(name), pictures(side, count=2)


def face(name: str) -> Built:
    found = importlib.import_module("facenet_pytorch")
    if name == "InceptionResnetV1":
        return found.InceptionResnetV1(pretrained=None, classify=True, num_classes=10), pictures(96, count=2)
    return getattr(importlib.import_module("facenet_pytorch.models.mtcnn"), name)(pretrained=False), pictures(
        48, count=2
    )


def diffusion(name: str, example: Any, **options: Any) -> Built:
    return getattr(importlib.import_module("diffusers"), name)(**options), example


def volume(name: str, *, side: int = 32, count: int = 1, **options: Any) -> Built:
    nets = importlib.import_module("monai.networks.nets")
    example = torch.rand(count, 1, side, side, side, generator=torch.Generator().manual_seed(0))
    return getattr(nets, name)(**options), example


class CRNN(nn.Module):
    """Letters in a line of text: convolutions, then two bidirectional LSTMs over the width.  Shi et al., arXiv 1507.05717."""

    def __init__(self) -> None:
        super().__init__()
        widths, pools = (64, 128, 256, 256, 512, 512, 512), {0: (2, 2), 1: (2, 2), 3: (2, 1), 5: (2, 1)}
        layers: list[nn.Module] = []
        for i, (into, out) in enumerate(zip((1, *widths), widths, strict=False)):
            layers += [
                nn.Conv2d(into, out, 3 if i < 6 else 2, padding=1 if i < 6 else 0),
                nn.BatchNorm2d(out),
                nn.ReLU(),
            ]
            layers += [nn.MaxPool2d(pools[i], pools[i])] if i in pools else []
        self.features = nn.Sequential(*layers)
        self.recurrent = nn.LSTM(512, 64, num_layers=2, bidirectional=True)
        self.letters = nn.Linear(128, 37)

    def forward(self, x: Tensor) -> Tensor:
        columns = self.features(x).squeeze(2).permute(2, 0, 1)
        return self.letters(self.recurrent(columns)[0])


class EDSR(nn.Module):
    """Twice the size: residual blocks without normalisation, then a shuffle of pixels.  Lim et al., arXiv 1707.02921."""

    def __init__(self, width: int = 64, blocks: int = 8) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(blocks)
        )
        self.tail = nn.Sequential(
            nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(width, 3, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = first = self.head(x)
        for block in self.body:
            x = x + block(x)
        return self.tail(x + first)


FILM = torch.rand(1, 3, 8, 64, 64, generator=torch.Generator().manual_seed(0))
NOISY, PAIR = (pictures(32), 3), pictures(64, count=2)

NETWORKS: dict[str, Callable[[], Built]] = {
    **{f"ultralytics:{n}": (lambda n=n: ultralytics(n)) for n in (
        "yolov3-tiny", "yolov5n", "yolov6n", "yolov8n", "yolov8n-seg", "yolov9t", "yolov10n", "yolo11n", "yolo12n",
    )},
    "torchvision:fasterrcnn_resnet50_fpn": lambda: detector("fasterrcnn_resnet50_fpn"),
    "torchvision:fasterrcnn_mobilenet_v3_large_fpn": lambda: detector("fasterrcnn_mobilenet_v3_large_fpn"),
    "torchvision:maskrcnn_resnet50_fpn": lambda: detector("maskrcnn_resnet50_fpn"),
    "torchvision:keypointrcnn_resnet50_fpn": lambda: detector("keypointrcnn_resnet50_fpn"),
    "torchvision:retinanet_resnet50_fpn": lambda: detector("retinanet_resnet50_fpn"),
    "torchvision:fcos_resnet50_fpn": lambda: detector("fcos_resnet50_fpn"),
    "torchvision:ssd300_vgg16": lambda: detector("ssd300_vgg16", side=300),
    "torchvision:ssdlite320_mobilenet_v3_large": lambda: detector("ssdlite320_mobilenet_v3_large", side=320),
    **{f"torchvision:{n}": (lambda n=n: torchvision(f"segmentation.{n}", PAIR, weights_backbone=None)) for n in (
        "fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large",
    )},
    **{f"torchvision:{n}": (lambda n=n: torchvision(f"video.{n}", FILM)) for n in ("r3d_18", "mc3_18", "r2plus1d_18")},
    "torchvision:raft_small": lambda: torchvision("optical_flow.raft_small", (pictures(128), pictures(128))),
    **{f"smp:{n}": (lambda n=n: segmenter(n)) for n in (
        "Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3Plus", "UPerNet",
    )},
    "smp:PAN": lambda: segmenter("PAN", side=128),
    "smp:Unet, mobilenet_v2": lambda: segmenter("Unet", encoder="mobilenet_v2"),
    "smp:Unet, timm-efficientnet-b0": lambda: segmenter("Unet", encoder="timm-efficientnet-b0"),
    "transformers:ResNet": lambda: transformer("ResNet"),
    "transformers:RegNet": lambda: transformer("RegNet"),
    "transformers:MobileNetV1": lambda: transformer("MobileNetV1"),
    "transformers:MobileNetV2": lambda: transformer("MobileNetV2"),
    "transformers:ConvNext": lambda: transformer("ConvNext"),
    "transformers:ConvNextV2": lambda: transformer("ConvNextV2"),
    "transformers:EfficientNet": lambda: transformer("EfficientNet"),
    "transformers:PoolFormer": lambda: transformer("PoolFormer"),
    "transformers:Bit": lambda: transformer("Bit"),
    "transformers:MobileViT": lambda: transformer("MobileViT"),
    "transformers:FocalNet": lambda: transformer("FocalNet", image_size=64),
    **{f"timm:{n}": (lambda n=n: timm(n)) for n in (
        "mobilenetv4_conv_small", "fastvit_t8", "repvit_m0_9", "efficientvit_b0", "inception_next_atto", "starnet_s1",
        "mambaout_femto", "rdnet_tiny", "hgnetv2_b0", "ghostnetv2_100", "repghostnet_050", "fasternet_t0", "skresnet18",
        "cspresnet50", "edgenext_xx_small", "mobileone_s0", "hrnet_w18_small", "nextvit_small",
    )},
    "facenet:InceptionResnetV1": lambda: face("InceptionResnetV1"),
    "facenet:ONet": lambda: face("ONet"),
    "text:CRNN": lambda: (CRNN(), torch.rand(1, 1, 32, 100, generator=torch.Generator().manual_seed(0))),
    "super-resolution:EDSR": lambda: (EDSR(), pictures(24)),
    "diffusers:UNet2D": lambda: diffusion(
        "UNet2DModel", NOISY, sample_size=32, block_out_channels=(32, 64, 64, 128), norm_num_groups=8, attention_head_dim=8
    ),
    "diffusers:AutoencoderKL": lambda: diffusion(
        "AutoencoderKL", pictures(32), block_out_channels=(32, 64), norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ),
    "diffusers:VQ": lambda: diffusion(
        "VQModel", pictures(32), block_out_channels=(32, 64), norm_num_groups=8, num_vq_embeddings=32,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ),
    "monai:UNet": lambda: volume(
        "UNet", spatial_dims=3, in_channels=1, out_channels=2, channels=(8, 16, 32, 64), strides=(2, 2, 2), num_res_units=2
    ),
    "monai:BasicUNet": lambda: volume("BasicUNet", spatial_dims=3, out_channels=2, features=(8, 8, 16, 32, 64, 8)),
    "monai:SegResNet": lambda: volume("SegResNet", spatial_dims=3, init_filters=8, out_channels=2),
    "monai:VNet": lambda: volume("VNet", out_channels=2),
    "monai:DynUNet": lambda: volume(
        "DynUNet", spatial_dims=3, in_channels=1, out_channels=2, kernel_size=[3, 3, 3], strides=[1, 2, 2],
        upsample_kernel_size=[2, 2], filters=[8, 16, 32],
    ),
    "monai:AttentionUnet": lambda: volume(
        "AttentionUnet", spatial_dims=3, in_channels=1, out_channels=2, channels=(8, 16, 32), strides=(2, 2)
    ),
    "monai:DenseNet121": lambda: volume("DenseNet121", count=2, spatial_dims=3, in_channels=1, out_channels=2),
    "monai:HighResNet": lambda: volume("HighResNet", spatial_dims=3, in_channels=1, out_channels=2),
}  # fmt: skip


# ---------------------------------------------------------------- one network, in a process of its own


def cut(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model, x = NETWORKS[name]()
    model.eval()
    begun = time.process_time()
    graph = es.trace(model, x, time_limit=LIMIT)
    found: dict[str, Any] = {
        "params": sum(p.numel() for p in model.parameters()),
        "trace_s": time.process_time() - begun,
    }
    if least(graph) > NOTHING_GOES:
        graph = es.with_blocks(graph, es.find_blocks(model, x).found)
    smallest = least(graph)
    found |= {"macs": es.cost(graph).macs, "smallest": smallest}
    if smallest > NOTHING_GOES:
        kept = Counter[str]()
        for frozen in graph.frozen:
            kept[f"{frozen.reason.text} ({frozen.reason.line})"] += frozen.count
        return found | {"proven": False, "why": f"stays whole: {kept.most_common(1)[0][0]}"}
    random = np.random.default_rng(0)
    scores = {g.name: random.random(g.size) for g in graph.groups}
    budget = es.Budget(macs=0.5 if smallest < NEARLY_HALF else (1 + smallest) / 2)
    begun = time.process_time()
    plan = es.solve(graph, scores, budget)
    found |= {"asked": budget.macs, "solve_s": time.process_time() - begun}
    begun = time.process_time()
    proof = es.verify(model, graph, plan, x, budget=budget)
    failed = [f"{check.name}: {check.detail}" for check in proof.checks if not check.passed]
    return (
        found
        | {"proven": proof.passed, "verify_s": time.process_time() - begun}
        | ({"error": failed[0]} if failed else {})
    )


def least(graph: es.Graph) -> float:
    """The share of the MACs that is left if of everything one is."""
    costs = CostModel(graph)
    return costs.cost(np.ones_like(graph.sizes)).macs / costs.cost(graph.sizes).macs


METHODS = {"tcp": es.TCP(), "mgp": es.MGP(), "dprp": es.DPRP(), "tt-lc": es.TTLC(search=0)}


def squares(output: Any) -> list[Tensor]:
    """The mean square of every floating tensor in ``output``."""
    if isinstance(output, Tensor):
        return [output.float().square().mean()] if output.is_floating_point() and output.requires_grad else []
    parts = output.values() if hasattr(output, "values") else output if isinstance(output, (list, tuple)) else ()
    return [loss for part in parts for loss in squares(part)]


def steps(name: str, method: str, count: int) -> dict[str, Any]:
    """``count`` steps of a method, then the finished network once more."""
    torch.manual_seed(0)
    model, x = NETWORKS[name]()
    detects = isinstance(x, list)
    model.eval()
    smallest = least(es.trace(model, x, time_limit=LIMIT))
    # Where no channel can go this would ask for all MACs, which any method holds: the question there is what ranks can do.
    share = max(0.6, (1 + smallest) / 2) if smallest < NOTHING_GOES else 0.6
    try:
        run = es.attach(model, x, budget=es.Budget(macs=share), method=METHODS[method])
    except es.BudgetError as error:  # layers that run several times keep their form: half of what ranks can do
        share = (1 + error.smallest.macs / es.cost(es.trace(model, x)).macs) / 2
        run = es.attach(model, x, budget=es.Budget(macs=share), method=METHODS[method])
    optimizer = torch.optim.SGD(run.model.parameters(), lr=1e-4, momentum=0.9)
    target = {"boxes": torch.tensor([[8.0, 8.0, 64.0, 64.0]]), "labels": torch.tensor([1])}
    target |= {"masks": torch.ones(1, 128, 128, dtype=torch.uint8), "keypoints": torch.ones(1, 17, 3) * 16}
    for step in range(count):
        run.model.train()
        output = run.model(x[0] * 2, [target] * 2) if detects else run_on(run.model, x)
        loss = sum(squares(output), run.penalty() * 1.0)
        loss.backward()
        nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        run.step(progress=(step + 1) / count, optimizer=optimizer)
    small = run.finish().eval()
    with torch.no_grad():
        run_on(small, x)
    held = all(getattr(run.cost, metric) <= limit for metric, limit in run.limits.items())
    return {"held": held, "asked": share, "left": run.cost.macs / run.dense.macs}


def run_on(model: nn.Module, x: Any) -> Any:
    if isinstance(x, dict):
        return model(**x)
    return model(*x) if isinstance(x, (tuple, list)) else model(x)


def child(jobs: Sequence[str], count: int) -> None:
    """Print a line for every network or, after a bar, its method."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    importlib.import_module(
        "espalier.optional"
    ).import_torchvision()  # as a CPU build of torch needs it; the others import it too
    signal.signal(signal.SIGALRM, _too_long)
    for job in jobs:
        name, _, method = job.partition("|")
        begun = time.perf_counter()
        signal.alarm(LIMIT)
        try:
            found = steps(name, method, count) if method else cut(name)
        except ModuleNotFoundError as error:
            found = {"missing": str(error)}
        except Exception as error:  # whatever happens belongs into the table
            found = {"proven": False, "held": False, "error": first_line(error)}
        signal.alarm(0)
        found["seconds"] = time.perf_counter() - begun
        print("\n" + json.dumps({"job": job, **rounded(found, 4)}), flush=True)


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"not done after {LIMIT} s")


def in_a_process(jobs: list[str], count: int) -> Iterator[dict[str, Any]]:
    """What became of all jobs of one package, which takes long to import; after a crash the rest in another process."""
    while jobs:
        command = [sys.executable, "-m", "benchmarks.architectures", *jobs, "--child", "--steps", str(count)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as running:
            for line in running.stdout or ():
                if line.startswith("{"):
                    found = json.loads(line)
                    jobs.remove(found["job"])
                    yield found
        if jobs:
            error = f"its process ended with {running.returncode}"
            yield {"job": jobs.pop(0), "proven": False, "held": False, "error": error}


# ---------------------------------------------------------------- all of them


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help="all by default")
    parser.add_argument("--steps", type=int, default=0, help="of every method, instead of the cut")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="of the steps; all by default"
    )
    parser.add_argument("--again", action="store_true", help="those in the results, too")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        child(options.networks, options.steps)
        return
    rows = (read_results(NAME) or {"rows": {}})["rows"]
    packages: dict[str, list[str]] = {}
    for name in options.networks:
        for method in options.methods if options.steps else ("",):
            if options.again or (method or "cut") not in rows.get(name, {}):
                packages.setdefault(name.partition(":")[0], []).append(f"{name}|{method}" if method else name)
    for jobs in packages.values():
        for found in in_a_process(jobs, options.steps):
            print(found, flush=True)
            if "missing" in found:
                break
            name, _, method = found.pop("job").partition("|")
            kept = read_results(NAME) or {"rows": {}}
            kept["rows"].setdefault(name, {})[method or "cut"] = found
            kept["environment"] = environment()
            kept["rows"] = {n: kept["rows"][n] for n in NETWORKS if n in kept["rows"]}
            write_results(NAME, kept)
    print(as_table(read_results(NAME)))


def summary(content: dict[str, Any]) -> str:
    """How many were proven, and how much can go."""
    rows = [row["cut"] for row in content["rows"].values() if "cut" in row]
    proven, goes = sum(r.get("proven", False) for r in rows), [1 - r["smallest"] for r in rows if "smallest" in r]
    much = sum(share >= 0.8 for share in goes)
    return (
        f"Of {len(rows)} networks of other packages, as they define them, {proven} are cut and pass every proof; "
        f"from {much} at least 80 % of the MACs can go. (`python -m benchmarks.architectures`)"
    )


def trained(found: dict[str, Any]) -> str:
    return "held" if found["held"] else found.get("error", "over its budget").replace("|", "/")


def as_table(content: dict[str, Any]) -> str:
    """A row for every network: what can go, what was asked and proven, and what every method held."""
    body: list[list[str | None]] = []
    for name, row in content["rows"].items():
        one = row.get("cut", {})
        outcome = "proven" if one.get("proven") else one.get("error") or one.get("why") or "not run"
        cells = [
            name,
            f"{one['params'] / 1e6:.1f}" if "params" in one else None,
            f"{100 * (1 - one['smallest']):.1f}" if "smallest" in one else None,
            f"{100 * one['asked']:.0f}" if "asked" in one else None,
            outcome.replace("|", "/"),
            *(f"{one[key]:.1f}" if key in one else None for key in ("trace_s", "verify_s")),
            *(trained(row[m]) if m in row else None for m in METHODS),
        ]  # fmt: skip
        body.append(cells)
    head = [
        "network",
        "parameters, M",
        "removable, % of the MACs",
        "asked, %",
        "outcome",
        "trace, CPU s",
        "verify, CPU s",
        *METHODS,
    ]
    used = [i for i in range(len(head)) if any(line[i] is not None for line in body)]
    return table([head[i] for i in used], [[line[i] for i in used] for line in body])


if __name__ == "__main__":
    main()
