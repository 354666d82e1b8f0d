"""One-time checks for silent failures: weights that never move, ranks drawing identical numbers, a wrong final rate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainers.engine.distributed.sharding import part_of, trained_parameters
from trainers.engine.run.context import RunContext

MOVED_AFTER_STEPS = 10


class SanityChecks:
    """Prints a warning if a run does not do what it seems to do."""

    def __init__(
        self, ctx: RunContext, networks: dict[str, nn.Module], optimizer: Optimizer, rate_factor: Callable[[int], float]
    ) -> None:
        self.accelerator, self.optimizer, self.clock = ctx.accelerator, optimizer, ctx.clock
        self.parameters = trained_parameters(networks).values()
        self.initial_norms = self._norms()
        last = rate_factor(self.clock.total_steps - 1)
        self.last_rates = [group["initial_lr"] * last for group in optimizer.param_groups]

    def _norms(self) -> Tensor:
        """Returns the norm of each trained tensor, or of this process's part of it."""
        return torch.stack(torch._foreach_norm([part_of(parameter).tensor for parameter in self.parameters]))

    def after_step(self, steps_done: int, slots: Tensor) -> None:
        """Runs the checks that are due after this step; `slots` are of its last micro-batch. Collective."""
        done = steps_done - self.clock.origin_step
        if done == 1 and self.accelerator.num_processes > 1:
            self._compare_draws(slots)
        last = steps_done == self.clock.total_steps
        if done == MOVED_AFTER_STEPS or (last and self.clock.origin_step == 0 and done < MOVED_AFTER_STEPS):
            self._compare_weights(done)
        if last:
            self._compare_rates()

    def _compare_draws(self, slots: Tensor) -> None:
        """Drawing from torch's own generator here changes nothing, as it is reseeded for each micro-batch."""
        ambient = torch.rand((), device=slots.device, dtype=torch.float64)
        draws = self.accelerator.gather(torch.stack([slots[0].double(), ambient])[None])
        for what, values in zip(("examples", "random numbers in the network"), draws.T.tolist(), strict=True):
            if len(set(values)) < len(values):
                self._warn(
                    f"two processes drew the same {what} in step {self.clock.origin_step + 1}: something reseeds "
                    "them alike; a Trainer must draw from `rng` and leave torch's seeds alone"
                )

    def _compare_weights(self, steps: int) -> None:
        if torch.equal(self._norms(), self.initial_norms):
            rates = ", ".join(f"{group['lr']:.3g}" for group in self.optimizer.param_groups)
            self._warn(
                f"no trained parameter moved in {steps} steps: look at learning_rate (now {rates}), at skipped steps, "
                "and at whether the loss depends on the network"
            )

    def _compare_rates(self) -> None:
        for group, asked in zip(self.optimizer.param_groups, self.last_rates, strict=True):
            if group["lr"] != asked:
                self._warn(
                    f"the last learning rate of {group['name']} was {group['lr']:.6g}; the configuration asks for "
                    f"{asked:.6g}"
                )

    def _warn(self, text: str) -> None:
        self.accelerator.print(f"WARNING: {text}", flush=True)
