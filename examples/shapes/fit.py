"""The training loop that every stage shares: warm-up, linear decay, clipping, averaged weights, resumable state."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from torch import Tensor, nn

log = logging.getLogger("shapes")


def begin(work: Path, threads: int) -> None:
    """Makes the work folder; what is logged goes to the terminal and to its `train.log`."""
    work.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.StreamHandler(), logging.FileHandler(work / "train.log")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)
    torch.set_num_threads(threads)


def training_options(home: Path) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command `--work`, `--out`, `--seed` and `--threads`; by default it keeps everything below `home`."""
    folder = click.Path(path_type=Path)
    options = (
        click.option("--work", type=folder, default=home, show_default=True, help="Training states and the log."),
        click.option("--out", type=folder, default=home / "checkpoint", show_default=True, help="The checkpoint."),
        click.option("--seed", default=0, show_default=True),
        click.option("--threads", default=2, show_default=True),
    )

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@dataclass(frozen=True)
class Fit:
    """How one stage is optimised."""

    name: str
    steps: int
    lr: float
    warmup: int = 100
    decay: float = 0.5
    """Share of the steps, at the end, over which the learning rate falls to zero."""
    average: float = 0.995
    """Decay of the exponential moving average of the weights."""
    weight_decay: float = 0.01
    clip: float = 1.0
    log_every: int = 50
    save_every: int = 100
    probe_every: int = 1000

    def rate(self, step: int) -> float:
        """The learning rate at `step`, relative to `lr`."""
        left = (self.steps - step) / max(1.0, self.steps * self.decay)
        return min(1.0, (step + 1) / self.warmup, left)


def fit(
    plan: Fit,
    module: nn.Module,
    loss_at: Callable[[int], Tensor],
    work: Path,
    seed: int,
    probe: Callable[[nn.Module], str] | None = None,
) -> None:
    """Minimises `loss_at(step)` over `module` and leaves the averaged weights in it.

    Every step is seeded by its number, so that a run which was stopped goes on from `work/{name}.pt` as if it had not been.
    `probe(module)` is called now and then with the averaged weights; what it returns is logged.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": plan.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=plan.lr,
        betas=(0.9, 0.98),
    )
    average = [p.detach().clone() for p in parameters]
    state = work / f"{plan.name}.pt"
    start = 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        start, average = saved["step"], saved["average"]
        optimiser.load_state_dict(saved["optimiser"])
        module.load_state_dict(saved["module"])
        log.info("%s: going on at step %d", plan.name, start)

    def save(step: int) -> None:
        bundle = {"step": step, "module": module.state_dict(), "average": average, "optimiser": optimiser.state_dict()}
        torch.save(bundle, state.with_suffix(".tmp"))
        state.with_suffix(".tmp").replace(state)

    module.train()
    began, total = time.monotonic(), 0.0
    for step in range(start, plan.steps):
        torch.manual_seed(seed * 1_000_003 + step)
        for group in optimiser.param_groups:
            group["lr"] = plan.lr * plan.rate(step)
        loss = loss_at(step)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, plan.clip)
        optimiser.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - min(plan.average, (step + 1) / (step + 10)))
        total += loss.item()
        done = step + 1
        if done % plan.log_every == 0:
            pace = (time.monotonic() - began) / (done - start)
            log.info("%s %d/%d  loss %.4f  %.3f s a step", plan.name, done, plan.steps, total / plan.log_every, pace)
            total = 0.0
        if done % plan.save_every == 0 or done == plan.steps:
            save(done)
        if probe and (done % plan.probe_every == 0 or done == plan.steps):
            with torch.no_grad():
                _swap(parameters, average)
                module.eval()
                log.info("%s %d: %s", plan.name, done, probe(module))
                module.train()
                _swap(parameters, average)
    with torch.no_grad():
        _swap(parameters, average)
    module.eval()


def _swap(left: list[nn.Parameter], right: list[Tensor]) -> None:
    for a, b in zip(left, right, strict=True):
        a.data, b.data = b.data, a.data
