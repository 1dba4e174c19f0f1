"""torchtitan's own Trainer in a script: ``python examples/trainer.py``."""

from titan_moe_lb import trainer_config


def main(steps: int = 5) -> None:
    """Train with flags of ``run_train.sh``; without a GPU, train on the host."""
    trainer = trainer_config(
        "--module=deepseek_v3", "--config=deepseek_v3_tiny", f"--training.steps={steps}"
    ).build()
    trainer.train()
    trainer.close()


if __name__ == "__main__":
    main()
