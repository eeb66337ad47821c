"""Networks that nobody here chose one by one: some of every model file of timm, cut and proven as they come.

    python -m benchmarks.families [--networks levit_128 ...]

Of every file that timm 1.0.31 has models in, one to three networks of different names, small ones, none above 45 million
parameters (files with none are left out); picked by a rule before any of them was tried.  Untrained weights, random
scores, half of the MACs; where attention or the like keeps nearly that much or more, half of what can go.  "Proven" is
``es.verify`` with all its obligations.  Espalier is told nothing about a network.
"""

from __future__ import annotations

import argparse
import contextlib
import time
import warnings
from collections import Counter
from typing import Any

import numpy as np
import torch

import espalier as es
from benchmarks.common import build, environment, first_line, rounded, write_results
from espalier.costs import CostModel
from espalier.graph import Graph
from espalier.graph.summary import overview
from espalier.optional import import_timm

NETWORKS = (
    "halonet26t", "botnet26t_256", "eca_halonext26ts", "gernet_s", "repvgg_a0", "resnext26ts", "coat_tiny", "convit_tiny",
    "convmixer_1024_20_ks9_p14", "convnext_atto", "test_convnext", "convnextv2_atto", "cpubone_s0", "crossvit_18_240",
    "csatv2", "cs3darknet_s", "darknet17", "cspresnet50", "cspnext_s", "davit_tiny", "deit_tiny_patch16_224", "densenet121",
    "dla102", "dla102x", "dla60x", "dpn48b", "edgenext_small", "efficientformer_l1", "efficientformerv2_s0", "mixnet_s",
    "tinynet_a", "fbnetc_100", "efficientvim_m1", "efficientvit_b0", "efficientvit_m0", "fasternet_s", "fastvit_t8",
    "focalnet_tiny_srf", "gcvit_tiny", "ghostnet_050", "ghostnetv2_100", "hardcorenas_a", "hgnet_tiny", "hgnetv2_b0",
    "hiera_tiny_224", "hieradet_small", "sam2_hiera_tiny", "hrnet_w18", "iformer_s", "inception_next_atto", "inception_v3",
    "inception_v4", "lcnetv2_small", "levit_128", "lowformer_e1", "mambaout_tiny", "test_mambaout", "test_coatnet",
    "maxvit_nano_rw_256", "coatnet_nano_cc_224", "caformer_s18", "convformer_s18", "poolformer_s12", "gmlp_s16_224",
    "mixer_s16_224", "gmixer_12_224", "lcnet_050", "mobilenetv3_small_050", "fbnetv3_d", "mobilevit_s", "mobilevitv2_050",
    "mvitv2_tiny", "nest_tiny", "nextvit_small", "test_nfnet", "nf_resnet26", "pit_s_224", "pvt_v2_b0", "rdnet_tiny",
    "regnetx_004_tv", "regnety_008_tv", "regnetv_040", "repghostnet_050", "repvit_m1", "res2net50_14w_8s", "res2net50d",
    "res2next50", "resnest14d", "resnest26d", "resnet18", "resnet10t", "resnet14t", "resnetv2_18", "rexnet_100",
    "rexnetr_100", "selecsls42", "selecsls42b", "sequencer2d_s", "shvit_s1", "skresnet18", "skresnet50d", "starnet_s1",
    "swiftformer_s", "swin_s3_tiny_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224", "tiny_vit_5m_224",
    "tnt_s_patch16_224", "twins_svt_small", "visformer_tiny", "test_vit", "flexivit_small", "vit_small_patch8_224",
    "vit_small_r26_s32_224", "test_vit_relpos", "vit_relpos_small_patch16_224", "vitamin_small_224", "volo_d1_224",
    "ese_vovnet19b_slim", "vovnet39a", "vovnet57a", "legacy_xception", "xception41", "xception41p",
)  # fmt: skip


def row_of(name: str) -> dict[str, Any]:
    """What became of one network."""
    network = f"timm:{name}"
    size = fitting_size(name)
    row: dict[str, Any] = {"network": network, "file": timm_file(name), "input": size}
    begun = time.perf_counter()
    try:
        row |= cut_and_proven(network, size)
    except Exception as error:  # whatever happens belongs into the table
        row |= {"proven": False, "error": f"{type(error).__name__}: {first_line(error)}"}
    row["seconds"] = time.perf_counter() - begun
    return row


def cut_and_proven(network: str, size: int) -> dict[str, Any]:
    model, x = build(network), torch.zeros(1, 3, size, size)
    graph = es.trace(model, x)
    random = np.random.default_rng(0)
    scores = {g.name: random.random(g.size) for g in graph.groups}
    model_of_costs = CostModel(graph)
    dense = model_of_costs.cost(graph.sizes).macs
    smallest = model_of_costs.cost(np.ones_like(graph.sizes)).macs / dense
    found = {"params": sum(p.numel() for p in model.parameters()), "groups": len(graph.groups), "smallest": smallest}
    if smallest > NOTHING_GOES:
        return found | {"proven": False, "asked": None, "why": main_reason(graph)}
    budget = es.Budget(macs=0.5 if smallest < NEARLY_HALF else (1 + smallest) / 2)
    proof = es.verify(model, graph, es.solve(graph, scores, budget), x, budget=budget)
    failed = [f"{check.name}: {check.detail}" for check in proof.checks if not check.passed]
    return found | {"proven": proof.passed, "asked": budget.macs} | ({"error": failed[0]} if failed else {})


NEARLY_HALF, NOTHING_GOES = 0.45, 0.99


def main_reason(graph: Graph) -> str:
    """Why most of what is frozen is frozen, beside outputs and inputs of the network."""
    reasons: Counter[str] = Counter()
    for frozen in overview(graph).frozen:
        if frozen.line:
            reasons[f"{frozen.reason} ({frozen.line})"] += frozen.channels
    return reasons.most_common(1)[0][0]


def timm_file(name: str) -> str:
    timm = import_timm()
    return timm.models.model_entrypoint(name).__module__.rpartition(".")[2]


def fitting_size(name: str) -> int:
    """64, 96 or 128 if the network takes it, else what it was made for."""
    timm = import_timm()
    model = timm.create_model(name).eval()
    made_for = model.default_cfg["input_size"][-1]
    for size in (64, 96, 128) if not model.default_cfg.get("fixed_input_size") else ():
        with contextlib.suppress(Exception), torch.no_grad():
            model(torch.zeros(1, 3, size, size))
            return size
    return made_for


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "networks": len(rows),
        "files": len({r["file"] for r in rows}),
        "proven": sum(r["proven"] for r in rows),
        "nothing can go": sum("why" in r for r in rows),
        "failed": sum("error" in r for r in rows),
        "half of the MACs": sum(r["proven"] and r["asked"] == 0.5 for r in rows),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--name", default="families", help="of the results file")
    chosen = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    rows = []
    for name in chosen.networks:
        rows.append(row_of(name))
        print({k: rows[-1].get(k) for k in ("network", "proven", "asked", "error", "why", "seconds")}, flush=True)
    content = {"environment": environment(), "summary": summarise(rows), "rows": rows}
    print(content["summary"])
    print(f"written to {write_results(chosen.name, rounded(content)).name}")


if __name__ == "__main__":
    main()
