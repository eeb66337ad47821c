"""Several processes that train one network: the same as one process on the same batches, whatever ends them in between.

Two workers, forked from the test by torchrun's own engine, have everything imported already, and live once for all tests here.
"""

import io
import json
import os
import runpy
import signal
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed._composable import replicate
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel

import espalier as es
from espalier.methods.agreement import check_same, check_soon, once, share
from espalier.optional import import_lightning
from espalier.present.cli import app
from espalier.present.edge import stdout, stopped
from espalier.run.data import load_data
from tests.steps import measure_nothing

RECIPE = es.Recipe(epochs=2, batch_size=16, lr=0.05, device="cpu", sync_batchnorm=True)
METHODS = {
    "tcp": es.TCP(),
    "tcp, by variance": es.TCP(importance="share"),
    "mgp": es.MGP(),
    "joint": es.Joint(),
    "dprp": es.DPRP(importance="taylor"),
    "tt-lc": es.TTLC(iterations=2, search=2, held_out=12, sweeps=1),
    "magnitude": es.Magnitude(score="taylor"),
    "svd-oneshot": es.SVDOneShot(),
}
NORMALISED = ("tcp", "magnitude")  # the others are tried without BatchNorm, whose statistics are many messages
BUDGET = es.Budget(macs=0.6)
EXAMPLE = torch.zeros(1, 1, 8, 8)
SINGLE = [(EXAMPLE, torch.zeros(1, dtype=torch.int64))]


def net(norm=nn.Identity, seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), norm(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), norm(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def digits():
    data = load_data("digits")
    return replace(data, train=data.train[:128], test=data.test[:61])


def facts(plan, model):
    """What two runs have to share: the plan, and what the network computes."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return {"plan": plan.to_json(), "answers": model.eval()(torch.randn(8, 1, 8, 8, generator=g)).tolist()}


def compressed(method, data=None, *, norm=nn.Identity, recipe=RECIPE, **options):
    result = es.compress(
        net(norm), data or digits(), budget=BUDGET, method=method, recipe=recipe, trained=False, verify=False, **options
    )
    log = [(e.loss, e.train_accuracy, e.accuracy) for e in result.history.epochs]
    return {**facts(result.plan, result.model), "log": log}


def by_name(name):
    return compressed(METHODS[name], norm=nn.BatchNorm2d if name in NORMALISED else nn.Identity)


def assert_alike(ours, theirs):
    assert ours["plan"] == theirs["plan"]
    assert torch.tensor(ours["answers"]) == pytest.approx(torch.tensor(theirs["answers"]), abs=2e-4)


# -- what two processes do in their one life


def batches(number):
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(17, 1, 8, 8, generator=g), torch.randint(10, (17,), generator=g)) for _ in range(number)]


class Interrupting(list):
    """Batches, of which the ninth, which only training asks for, ends the second process in epoch ``number``."""

    sent = number = None

    def __iter__(self):
        for place, batch in enumerate(super().__iter__()):
            if place == 8 and self.sent is not None:
                self.number -= 1
                if self.number == 0 and share().rank == 1:
                    os.kill(os.getpid(), self.sent)
            yield batch


def loaders(sent=None, number=1):
    """Batches of 17 do not fall into two equal parts."""
    train = Interrupting(batches(10))
    train.sent, train.number = sent, number
    return es.Loaders(train, batches(3), num_classes=10)


def own_loop(method, *, wrapped=False, around=lambda network: network, sent=()):
    """``sent`` is filled by others; returned is also by how much at most in a step that removes nothing."""
    own, most = share(), 0
    run = es.attach(net(seed=1 + own.rank), EXAMPLE, budget=BUDGET, method=method)  # all take the weights of the first
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.05, momentum=0.9)
    network = DistributedDataParallel(run.model, find_unused_parameters=True) if wrapped else around(run.model)
    for step, (x, y) in enumerate(batches(24)):
        mine = own.rows(16)
        loss = F.cross_entropy(network(x[mine]), y[mine]) + run.penalty()
        optimizer.zero_grad()
        loss.backward()
        before = len(sent)
        if not wrapped:
            es.average_gradients(run.model)
            run.averaged()
        optimizer.step()
        removed = run.step(progress=(step + 1) / 24, optimizer=optimizer)
        if wrapped and removed is not None:
            network = DistributedDataParallel(run.model, find_unused_parameters=True)
        most = most if removed is not None else max(most, len(sent) - before)
    return {**facts(run.plan, run.finish()), "sent": most}


def counted_loop():
    """``own_loop`` in which the calls that send something are counted."""
    sent = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "all_gather", "broadcast"):
            send = getattr(dist, name)
            patch.setattr(dist, name, lambda *a, _send=send, **k: (sent.append(_send), _send(*a, **k)))
        return own_loop(es.TCP(), sent=sent)


def decided_apart():
    """What a step says before which each process has decided something else."""
    check_soon("the keep-set", bytes([share().rank]), torch.device("cpu"))
    es.average_gradients(net())


def in_lightning(*, epochs=1, save=None, path=None, **options):
    """The wrapped loop, as Lightning has it; ``save``: a checkpoint when half of it is done."""
    L = import_lightning()

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net(seed=1 + share().rank)

        def training_step(self, batch, index):
            mine = share().rows(16)
            return F.cross_entropy(self.net(batch[0][mine]), batch[1][mine])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

        def on_train_epoch_end(self):
            if save is not None and self.trainer.current_epoch + 1 == epochs // 2:
                self.trainer.save_checkpoint(save)

    compression = es.lightning.Compression(BUDGET, es.TCP(), network="net", example=EXAMPLE)
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=2, strategy="ddp", use_distributed_sampler=False, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, callbacks=[compression], **options,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(batches(24 // epochs), batch_size=None)
    trainer.fit(Module(), loader, ckpt_path=path)
    return facts(compression.plan, compression.small)


def on_page(folder):
    """The first command of the page, on a smaller network: what each process prints."""
    lines = (Path(__file__).parents[1] / "docs" / "several_machines.md").read_text(encoding="utf-8").splitlines()
    command = next(line for line in lines if line.startswith("    torchrun --nproc-per-node 2 -m espalier")).split()[5:]
    smaller = {"resnet20": f"{__name__}:net", "2": "1", "runs/two": str(folder / "two")}
    printed = io.StringIO()
    with redirect_stdout(printed):
        stdout.file = printed
        app([smaller.get(word, word) for word in command], standalone_mode=False)
    return printed.getvalue()


def example(folder):
    """``examples/two_processes.py``, what each process prints."""
    script, printed = Path(__file__).parents[1] / "examples" / "two_processes.py", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(sys, "argv", [str(script), "--epochs", "1", "--out", str(folder / "example.safetensors")])
        runpy.run_path(str(script), run_name="__main__")
    return printed.getvalue()


def said(error, act):
    try:
        act()
    except error as found:
        return str(found)
    return None


def refused_by_first():
    if share().first:
        raise ValueError("only the first knows")


def everything(folder):
    torch.set_num_threads(1)  # a pool of threads does not live through a fork
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as a script has it that torchrun starts
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))  # a fault fails, and does not wait for half an hour
    into = folder / "stopped"
    found = {
        **{name: by_name(name) for name in METHODS},
        "uneven": compressed(es.TCP(), loaders()),
        "local statistics": compressed(
            es.TCP(), norm=nn.BatchNorm2d, recipe=replace(RECIPE, sync_batchnorm=False, ema=0.9, epochs=1)
        ),
        "loop": counted_loop(),
        "loop, wrapped": own_loop(es.TCP(), wrapped=True),
        "loop, replicated": said(ValueError, lambda: own_loop(es.TCP(), around=replicate)),
        "lightning": in_lightning(),
        "lightning, whole": in_lightning(epochs=4, save=folder / "half.ckpt"),
        "lightning, resumed": in_lightning(epochs=4, path=folder / "half.ckpt"),
        "lightning, synchronised": said(ValueError, lambda: in_lightning(sync_batchnorm=True)),
        "loop of factors, wrapped": own_loop(es.DPRP(every=0.2), wrapped=True),
        "stopped": said(es.TrainingStopped, lambda: compressed(es.TCP(), loaders(signal.SIGTERM), out=into)),
        "resumed": compressed(es.TCP(), loaders(), out=into, resume=True),
        "page": on_page(folder),
        "example": example(folder),
        "differs": said(ValueError, lambda: check_same("the plan", str(share().rank))),
        "decided apart": said(ValueError, decided_apart),
        "refused": said(ValueError, lambda: once(refused_by_first)),
        "too many": said(ValueError, lambda: compressed(es.TCP(), recipe=replace(RECIPE, devices=3))),
        "too small": said(ValueError, lambda: compressed(es.TCP(), es.Loaders(SINGLE, SINGLE, num_classes=10))),
    }
    (folder / f"{share().rank}.json").write_text(json.dumps(found))
    compressed(es.TCP(), loaders(signal.SIGKILL, 2), out=folder / "killed")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process finds; it has imported then what the two will need."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    import_lightning()
    with pytest.MonkeyPatch.context() as patch:  # nothing is timed or exported
        measure_nothing(patch)
        yield {**{name: by_name(name) for name in METHODS}, "uneven": compressed(es.TCP(), loaders(), out=folder)}


@pytest.fixture(scope="module")
def folder(alone, tmp_path_factory):
    """Where two processes wrote what they found, and the run in the middle of which the second was killed."""
    folder = tmp_path_factory.mktemp("pair")
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="test", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=0, start_method="fork", monitor_interval=0.05,
    )  # fmt: skip
    with pytest.raises(ChildFailedError, match="SIGKILL"):
        elastic_launch(config, everything)(folder)
    return folder


@pytest.fixture(scope="module")
def pair(folder):
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_end_where_one_does_on_the_same_batches(alone, pair, name):
    one = alone[name]
    for found in pair:
        assert_alike(found[name], one)
        assert torch.tensor(found[name]["log"]) == pytest.approx(torch.tensor(one["log"]), rel=1e-4)
    assert pair[0][name]["answers"] == pair[1][name]["answers"]


def test_batches_that_do_not_divide_count_by_image(alone, pair):
    one = alone["uneven"]
    assert pair[0]["uneven"]["plan"] == one["plan"]
    assert pair[0]["uneven"]["log"][0] == pytest.approx(one["log"][0], rel=1e-3)


def test_without_synchronisation_running_statistics_are_averaged_and_so_the_same(pair):
    assert pair[0]["local statistics"] == pair[1]["local statistics"]


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("loop", es.TCP()),
        ("loop, wrapped", es.TCP()),
        ("lightning", es.TCP()),
        ("loop of factors, wrapped", es.DPRP(every=0.2)),
    ],
)
def test_a_loop_of_ones_own_averages_its_gradients_or_wraps_anew_after_a_removal(pair, name, method):
    assert_alike(pair[0][name], own_loop(method))
    assert pair[0][name] == pair[1][name]


def test_a_step_that_removes_nothing_sends_one_message(pair):
    assert pair[0]["loop"]["sent"] == 1


def test_lightning_in_two_processes_goes_on_exactly_from_a_checkpoint(pair):
    assert pair[0]["lightning, resumed"] == pair[0]["lightning, whole"] == pair[1]["lightning, resumed"]


def test_a_signal_to_one_process_stops_all_at_the_same_step_and_the_run_goes_on(pair):
    assert all("in epoch 1 after step 9 of 10" in found["stopped"] for found in pair)
    assert pair[0]["resumed"] == pair[1]["resumed"]
    assert_alike(pair[0]["resumed"], pair[0]["uneven"])


def test_the_first_command_of_the_page_runs_and_one_process_prints(folder, pair):
    assert "test" in pair[0]["page"] and pair[1]["page"] == ""
    assert (folder / "two" / "model.safetensors").exists()
    assert "devices" not in (folder / "two" / "config.toml").read_text()


def test_the_example_runs_and_one_process_prints(folder, pair):
    assert "2 processes, " in pair[0]["example"] and pair[1]["example"] == ""
    assert (folder / "example.safetensors").exists()


def test_a_run_of_which_a_process_was_killed_goes_on_with_another_number_of_processes(folder, pair):
    assert_alike(compressed(es.TCP(), loaders(), out=folder / "killed", resume=True), pair[0]["uneven"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("differs", "the plan of process 1 is not that of process 0"),
        ("decided apart", "the keep-set of process 1 is not that of process 0"),
        ("refused", "only the first knows"),
        ("too many", "asks for 3 processes, and there are 2"),
        ("loop, replicated", "which holds the parameters of the network and does not follow"),
        ("lightning, synchronised", "replaces layers that are compressed"),
        ("too small", "a batch of 1 cannot be shared by 2 processes"),
    ],
)
def test_what_goes_wrong_is_said_in_every_process(pair, name, words):
    assert all(words in found[name] for found in pair)


def test_a_process_that_was_lost_is_told_with_the_command_that_goes_on(monkeypatch):
    """Gloo's own error was a traceback that ends in "Check the logs of the remote worker"."""
    lost = RuntimeError("[/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:12208: Connection reset by peer")
    for together, says in ((False, "Read error"), (True, "another process of this run has ended; go on with: this")):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda together=together: together)
        with pytest.raises((RuntimeError, ValueError), match=says) as caught, stopped("go on with: this"):
            raise lost
        assert isinstance(caught.value, ValueError) == together
    with pytest.raises(RuntimeError, match="of the user's own"), stopped("go on with: this"):
        raise RuntimeError("of the user's own")
