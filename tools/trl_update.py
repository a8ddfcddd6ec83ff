"""One update by TRL's trainers on given completions: their own loss, backward and optimizer, nothing generated."""
from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from fixed_update import LEARNING_RATE, STUDENT, TEACHER, UNCLIPPED, Work
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

from copd_megatron.model.backbone import DTYPES
from copd_megatron.platform import device


class TrlUpdate:
    """Calls ``compute_loss`` with batches as the trainer prepares them after generation, one per prompt.

    Gradient checkpointing, which is TRL's default, is off unless ``--checkpointing`` is given: it takes a third
    longer. No KL term, so that no reference model is evaluated; no padding, as all lengths are equal.
    """

    def __init__(self, work: Work):
        logging.disable_progress_bar()
        self.work, options = work, work.options
        self.tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
        self.folder = tempfile.TemporaryDirectory()
        common: dict[str, Any] = dict(
            output_dir=self.folder.name, per_device_train_batch_size=options.group,
            gradient_accumulation_steps=options.prompts, learning_rate=LEARNING_RATE,
            max_grad_norm=UNCLIPPED, gradient_checkpointing=options.checkpointing, bf16=False, report_to=[],
            disable_tqdm=True, use_cpu=not torch.cuda.is_available(), max_completion_length=options.completion_tokens,
            weight_decay=0.0)
        model = PeftModel.from_pretrained(self._base(), work.adapters / STUDENT, is_trainable=True)
        rest = dict(train_dataset=Dataset.from_dict({"prompt": ["-"] * work.advantages.size}),
                    processing_class=self.tokenizer)
        if work.row == "opd":
            teacher = PeftModel.from_pretrained(self._base(), work.adapters / TEACHER).merge_and_unload()
            self.trainer = DistillationTrainer(model, teacher, args=DistillationConfig(**common, beta=1.0), **rest)
        else:
            args = GRPOConfig(**common, num_generations=options.group, beta=0.0, loss_type="grpo", epsilon=0.2,
                              epsilon_high=0.28)
            self.trainer = GRPOTrainer(model, lambda completions, **_: [0.0] * len(completions), args=args, **rest)
        self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = options.prompts
        self.trainer.model.train()
        if options.checkpointing:  # what Trainer.train does first
            self.trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.batches = [self._batch(number) for number in range(options.prompts)]

    def __call__(self) -> None:
        model, optimizer = self.trainer.model, self.trainer.optimizer
        optimizer.zero_grad(set_to_none=True)
        for batch in self.batches:
            with self.trainer.compute_loss_context_manager():
                loss = self.trainer.compute_loss(model, batch)
            self.trainer.accelerator.backward(loss)
        self.trainer.accelerator.clip_grad_norm_(model.parameters(), UNCLIPPED)
        optimizer.step()

    def gradients(self) -> dict[str, torch.Tensor]:
        """By our names."""
        return {"layers." + name.split(".layers.", 1)[1].removesuffix(".default.weight"): parameter.grad
                for name, parameter in self.trainer.model.named_parameters() if parameter.requires_grad}

    def _base(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.work.options.model, attn_implementation="sdpa",
                                                    dtype=DTYPES[self.work.options.dtype]).to(device())

    def _batch(self, number: int) -> dict[str, torch.Tensor]:
        """One prompt's part of what ``_generate_and_score_completions`` returns."""
        work, on = self.work, {"device": device()}
        completions = torch.tensor(work.completions[number], **on)
        prompts = torch.tensor(work.prompts[number], **on).expand(len(completions), -1).contiguous()
        return {"prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts), "completion_ids": completions,
                "completion_mask": torch.ones_like(completions),
                "advantages": torch.tensor(work.advantages[number], dtype=torch.float32, **on),
                "num_items_in_batch": torch.tensor(work.completions.size, **on)}
