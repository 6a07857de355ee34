"""Which rollouts are forwarded: those that the loss learns from, in the fewest micro-batches of a step."""

import math

import torch

from posttrain.mechanisms import group_rewards


class KeptRows:
    """Leaves rows of zero advantage out of the buffer of micro-batches."""

    @property
    def _learns_from_advantages_alone(self) -> bool:
        """Return whether the loss has no KL, entropy or auxiliary term, which zero-advantage rows would learn from."""
        return self.beta == 0.0 and not self._entropy_bonus_enabled and not self.aux_loss_enabled

    @property
    def _drops_zero_advantage_rows(self) -> bool:
        """Return whether rows of zero advantage are left out of the loss."""
        return (
            self.args.drop_zero_advantage_rows
            and self._learns_from_advantages_alone
            and self.top_entropy_quantile == 1.0
        )

    @property
    def _leaves_out_rows(self) -> bool:
        """Return whether rows may be left out of the update, so that its means are kept as sums and counts."""
        return self._drops_zero_advantage_rows or self.args.learns_from_demonstrations

    # stands on GRPOTrainer._prepare_inputs, which refills the buffer once per generation
    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training:
            return inputs
        if self._buffered_inputs is not before and self._drops_zero_advantage_rows and "pixel_values" not in inputs:
            self._pack_buffer()
        inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        self._metrics["train"]["rows/forwarded"].append(float(inputs["completion_ids"].size(0)))
        return inputs

    def _pack_buffer(self) -> None:
        # micro-batches of one generation that are surely of one optimiser step
        size = math.gcd(self.args.steps_per_generation, self.args.gradient_accumulation_steps)
        buffer = self._buffered_inputs
        # padded, every row has its own prompt anyway
        shares = self._sharing is not None and self._sharing.active
        self._buffered_inputs = [
            batch
            for start in range(0, len(buffer), size)
            for batch in group_rewards.pack_kept_rows(
                buffer[start : start + size], self.loss_type, self._max_over_ranks, by_prompt=shares
            )
        ]

    def _max_over_ranks(self, number: int) -> int:
        """Return the largest `number` of all ranks; all of them call it."""
        if self.accelerator.num_processes == 1:
            return number
        return int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max())
