"""Train a LoRA with Unsloth, as its notebooks do; run by `_peers.py` with the Python that Unsloth is installed for."""

from __future__ import annotations

import json
import sys

from unsloth import FastLanguageModel  # before trl, which it changes

from datasets import load_dataset  # isort: skip
from trl import SFTConfig, SFTTrainer  # isort: skip

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    """Train what the JSON of the first argument says."""
    work = json.loads(sys.argv[1])
    model, tokenizer = FastLanguageModel.from_pretrained(
        work["model"], max_seq_length=work["max_length"], dtype=work["dtype"], load_in_4bit=False
    )
    model = FastLanguageModel.get_peft_model(
        model, target_modules=TARGETS, use_gradient_checkpointing=False, random_state=work["seed"], **work["lora"]
    )
    arguments = SFTConfig(
        output_dir=work["output"], max_length=work["max_length"], completion_only_loss=True, logging_steps=1,
        save_strategy="no", report_to="none", gradient_checkpointing=False, seed=work["seed"], **work["train"],
    )  # fmt: skip
    rows = load_dataset("json", data_files=work["rows"], split="train")
    trainer = SFTTrainer(model=model, processing_class=tokenizer, args=arguments, train_dataset=rows)
    trainer.train()
    model.save_pretrained(work["output"])


if __name__ == "__main__":
    main()
