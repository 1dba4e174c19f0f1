"""Train the tokenizer of the embedded corpus: ``python -m benchmarks.train_tokenizer``."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from titan_moe_lb.data import TOKENIZER_PATH, documents

VOCAB_SIZE = 2048
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"


def main() -> None:
    """Train a byte-level BPE over the corpus, and write it as Hugging Face tokenizer files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        documents(),
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[BEGIN, END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    folder = Path(TOKENIZER_PATH)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": BEGIN, "eos_token": END, "add_bos_token": True, "add_eos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    print(f"{tokenizer.get_vocab_size()} entries in {folder}")


if __name__ == "__main__":
    main()
